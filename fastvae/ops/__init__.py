"""The ELBO operators: one specification, several implementations."""

from .api import elbo, fused_elbo, reparameterize, sample_and_kl
from .dispatch import resolve_impl
from .types import ELBOTerms
from .vector_math import choose_code

__all__ = ["ELBOTerms", "elbo", "fused_elbo", "reparameterize", "resolve_impl", "sample_and_kl"]

choose_code()
