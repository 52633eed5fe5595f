"""Seeded permutations that stay the same over library versions."""

import hashlib

import numpy as np


def permutation(n: int, *key: str | int) -> np.ndarray:
  """int64 [n]: a permutation of range(n) that depends on n and `key` alone.

  NumPy promises a stable stream only for a bit generator's raw output, so the raw 64-bit numbers are sorted, not
  `Generator.permutation` used.
  """
  seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:16], 'big')
  return np.argsort(np.random.Philox(key=seed).random_raw(n), kind='stable')
