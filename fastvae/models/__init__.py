"""What a VAE is, the architectures that come with fastvae, and models on disk."""

from .files import ModelFilesError, load, save
from .model import Model, ModelError, as_model
from .vae import VAE

__all__ = ["VAE", "Model", "ModelError", "ModelFilesError", "as_model", "load", "save"]
