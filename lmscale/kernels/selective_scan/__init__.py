"""The selective scan, the sequence mixer of Mamba-1."""

from lmscale.kernels.selective_scan.api import selective_scan

__all__ = ['selective_scan']
