"""One token of state-space duality: what a decoding step runs."""

from lmscale.kernels.ssd_update.api import ssd_update

__all__ = ['ssd_update']
