"""Triton device code, and nothing else: installed as `fastvae.kernels`, launched by `fastvae.ops.triton` and `fastvae.data.gather`."""
