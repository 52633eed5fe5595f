"""Kernels for an accelerator have to prove themselves on it before `choice` takes one by itself."""

from lmscale.kernels.proof.verdicts import Verdict, adopt, known, verdict

__all__ = ['Verdict', 'adopt', 'known', 'verdict']
