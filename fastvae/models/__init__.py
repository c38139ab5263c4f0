"""What a VAE is, the architectures that come with fastvae, and models on disk."""

from .files import ModelFilesError, load, save
from .vae import VAE

__all__ = ["VAE", "ModelFilesError", "load", "save"]
