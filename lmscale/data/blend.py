"""Which source each sample of a weighted blend comes from, with random access.

Samples are dealt in blocks. At every block end the source counts are the total shared out by cumulative rounding, so
each differs from samples * weight by less than 1; inside a block the order is permuted by the seed.
"""

import fractions
import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np

from lmscale import config as config_lib
from lmscale.data import permutations

BLOCK = 1024  # samples; more where a weight is below 1 / BLOCK
MAX_BLOCK = 1 << 22
BITS = 60  # of the fixed-point cumulative weights: sums of any length round the same on every machine


class Blend:
  """Deals samples 0, 1, 2, … to sources in proportion to `weights`."""

  def __init__(self, weights: Sequence[float], *key: str | int):
    """`weights` need not sum to 1; `key` seeds the order. ConfigError if they are no weights (or one is tiny)."""
    if not weights or not all(math.isfinite(w) and w >= 0 for w in weights) or not sum(weights) > 0:
      raise config_lib.ConfigError(f'data.sources weights {list(weights)}: must be finite, >= 0 and not all zero')
    shares = [fractions.Fraction(w) for w in weights]
    total = sum(shares)
    self.weights = tuple(float(share / total) for share in shares)
    smallest = min(w for w in self.weights if w > 0)
    if smallest * MAX_BLOCK < 1:
      raise config_lib.ConfigError(f'data.sources weights {list(weights)}: the share {smallest:.3g} is below '
                                   f'1/{MAX_BLOCK}; raise it or set it to 0')
    self.block = max(BLOCK, math.ceil(1 / smallest))  # a block then never owes a source a negative number
    self._sums = [0] + [int(s / total * 2**BITS) for s in itertools.accumulate(shares)]
    self._key = key
    self._cached = functools.lru_cache(2)(self._make_block)

  def _shared(self, samples: int) -> np.ndarray:
    """int64 [sources]: `samples` shared out by cumulative rounding."""
    return np.diff([(samples * s + (1 << BITS - 1)) >> BITS for s in self._sums])

  def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(source of each sample, how many earlier samples came from it), int64 [block] each."""
    before = self._shared(block * self.block)
    quotas = self._shared((block + 1) * self.block) - before
    dealt = np.repeat(np.arange(len(quotas)), quotas)
    sources = dealt[permutations.permutation(self.block, 'blend', block, *self._key)]
    earlier = np.empty(self.block, np.int64)
    rank = np.arange(self.block) - np.repeat(np.cumsum(quotas) - quotas, quotas)
    earlier[np.argsort(sources, kind='stable')] = rank + before[dealt]
    return sources, earlier

  def source_of(self, sample: int) -> tuple[int, int]:
    """(source of the sample, k): it is that source's sample number k, counted from 0."""
    sources, earlier = self._cached(sample // self.block)
    return int(sources[sample % self.block]), int(earlier[sample % self.block])

  def counts(self, samples: int) -> np.ndarray:
    """int64 [sources]: how many of the first `samples` samples come from each source."""
    block, rest = divmod(samples, self.block)
    within = np.bincount(self._cached(block)[0][:rest], minlength=len(self.weights)) if rest else 0
    return self._shared(block * self.block) + within
