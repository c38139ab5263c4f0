"""fastvae: a training engine for variational autoencoders."""

from .loss import ELBOLoss
from .ops import ELBOTerms, elbo, fused_elbo, reparameterize, sample_and_kl

__all__ = ["ELBOLoss", "ELBOTerms", "elbo", "fused_elbo", "reparameterize", "sample_and_kl"]
