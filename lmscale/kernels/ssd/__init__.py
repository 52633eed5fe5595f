"""State-space duality, the sequence mixer of Mamba-2."""

from lmscale.kernels.ssd.api import ssd

__all__ = ['ssd']
