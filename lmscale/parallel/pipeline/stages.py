"""Which layers are in which pipeline stage. Stage u of pipe * virtual lies on device u % pipe."""

import bisect
import itertools
import math
from collections.abc import Sequence

import numpy as np


def cut_layers(pattern: str, stages: int, costs: Sequence[int], last: int = 0) -> list[range]:
  """The canonical layer indices of each stage.

  Cut at the `|` of the pattern where they make `stages` parts; else so that the dearest stage costs the least, and
  among such cuts the sum of squares is least.

  Args:
    pattern: model.pattern, of at least `stages` layers.
    costs: of each layer, in any unit, not negative.
    last: what the last stage costs besides: final norm, head and loss. (The embedding, in the first, is a look-up.)
  """
  parts = pattern.split('|')
  sizes = [len(part) for part in parts] if len(parts) == stages else balance([*costs[:-1], costs[-1] + last], stages)
  ends = np.cumsum(sizes).tolist()
  return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def cut_text(pattern: str, stages: int) -> str:
  """Where `cut_layers` cuts, in words."""
  parts = pattern.count('|') + 1
  if parts == stages:
    return 'cut at the | of model.pattern'
  ignored = f'; the | of model.pattern make {parts} parts, not {stages}, and are not used' if parts > 1 else ''
  return f'balanced by FLOPs{ignored}'


def device_layers(stages: Sequence[range], pipe: int) -> list[list[int]]:
  """The canonical layers of each device, those of its first stage first."""
  return [[layer for stage in stages[device::pipe] for layer in stage] for device in range(pipe)]


def balance(costs: Sequence[int], parts: int) -> list[int]:
  """Sizes of contiguous, non-empty parts: least maximum first, then least sum of squares, then fewer items in front.

  (Stages in front hold more microbatches.)
  Dynamic programming over the number of parts: `best[i]` is the least sum of squares of the first i items; a part of `size`
  items is allowed where it costs no more than the least maximum, which was found before by bisection.
  """
  n, most, unit = len(costs), _least_maximum(costs, parts), math.gcd(*costs) or 1
  total = list(itertools.accumulate(costs, initial=0))
  start = np.array([bisect.bisect_left(total, total[i] - most) for i in range(n + 1)])  # the first of a part that ends at i
  sums = np.array([t // unit for t in total], float)
  best = np.where(np.arange(n + 1) == 0, 0.0, math.inf)
  sizes = np.zeros((parts, n + 1), int)
  for part in range(parts):
    new = np.full(n + 1, math.inf)
    for size in range(1, int((np.arange(n + 1) - start).max()) + 1):
      tried = best[:-size] + (sums[size:] - sums[:-size]) ** 2
      better = size + np.flatnonzero((tried <= new[size:]) & (start[size:] <= np.arange(n + 1 - size)))
      new[better], sizes[part, better] = tried[better - size], size
    best = new
  chosen, end = [], n
  for part in reversed(range(parts)):
    chosen.append(int(sizes[part, end]))
    end -= chosen[-1]
  return chosen[::-1]


def _least_maximum(costs: Sequence[int], parts: int) -> int:
  """The least X for which `parts` contiguous parts of at most X hold everything."""

  def needed(most: int) -> int:
    count, room = 0, 0
    for cost in costs:
      if not count or cost > room:
        count, room = count + 1, most
      room -= cost
    return count

  low, high = max(costs), sum(costs)
  while low < high:
    middle = (low + high) // 2
    low, high = (low, middle) if needed(middle) <= parts else (middle + 1, high)
  return low
