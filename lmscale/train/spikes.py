"""Sudden spikes of the gradient norm, which often go before a loss that does not come back.

Nothing is skipped: what a step computes must not depend on what was logged before a restart. Clipping bounds the update, and
the message names the samples to look at.
"""

import collections
import math
import statistics

WINDOW = 64  # steps that are looked back on
ENOUGH = 16  # of them, before which nothing is said: the first steps' norms fall fast
TIMES = 10.0  # above the median


class SpikeWatch:
  """Compares each step's gradient norm with those before."""

  def __init__(self) -> None:
    self._norms: collections.deque[float] = collections.deque(maxlen=WINDOW)

  def add(self, norm: float) -> float | None:
    """How many times the median of the steps before `norm` is, if that is a spike; else None. Not finite is no spike."""
    usual = statistics.median(self._norms) if len(self._norms) >= ENOUGH else 0.0
    if not math.isfinite(norm):
      return None
    self._norms.append(norm)
    return norm / usual if usual and norm > TIMES * usual else None
