"""fastvae: a training engine for variational autoencoders.

Names are imported when they are first used, so that `fastvae --help` need not wait for torch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import DataLoader
    from .distributions import DiagonalGaussian
    from .loss import ELBOLoss
    from .models import VAE, load
    from .ops import ELBOTerms, elbo, fused_elbo, reparameterize, sample_and_kl
    from .training.callbacks import Callback
    from .training.trainer import Trainer

__version__ = version("fastvae")

__all__ = [
    "VAE",
    "Callback",
    "DataLoader",
    "DiagonalGaussian",
    "ELBOLoss",
    "ELBOTerms",
    "Trainer",
    "elbo",
    "fused_elbo",
    "load",
    "reparameterize",
    "sample_and_kl",
]

_HOMES = {
    "VAE": ".models",
    "Callback": ".training.callbacks",
    "DataLoader": ".data",
    "DiagonalGaussian": ".distributions",
    "ELBOLoss": ".loss",
    "Trainer": ".training.trainer",
    "load": ".models",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fastvae' has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, ".ops"), __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
