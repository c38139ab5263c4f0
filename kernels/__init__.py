"""Triton device code, and nothing else: installed as `fastvae.kernels`.

Launched by `fastvae.ops.triton` and, for the loader, by `fastvae.data.gather`.
"""
