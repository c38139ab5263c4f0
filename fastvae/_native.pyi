from collections.abc import Sequence

_View = tuple[int, int, int, int, int] | None
_PerRow = tuple[int, int] | None

def elbo(
    real64: bool,
    extents: Sequence[int],
    threads: int,
    likelihood: int,
    half: bool,
    per_sample: bool,
    clamp: tuple[float, float] | None,
    factors: Sequence[float],
    x_hat: _View,
    x: _View,
    mu: _View,
    logvar: _View,
    kl: int,
    weight: int,
    beta_latents: int,
    noise: Sequence[int] | None,
    values: Sequence[int],
    upstream: tuple[_PerRow, _PerRow, _PerRow, _View, _PerRow] | None,
    gradients: Sequence[int],
    instruction_set: str | None = None,
) -> None: ...
def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def instruction_sets() -> list[str]: ...
def bf16_supported() -> bool: ...
