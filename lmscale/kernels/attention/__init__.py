"""Causal attention with grouped key-value heads, document masks and a key-value cache."""

from lmscale.kernels.attention.api import attention

__all__ = ['attention']
