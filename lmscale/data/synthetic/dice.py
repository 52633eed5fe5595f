"""Random draws that stay the same over versions of Python and NumPy."""

import hashlib
import uuid
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar('T')


class Dice:
  """Draws that depend on `key` alone, made of a bit generator's raw output: of nothing else NumPy promises the stream."""

  def __init__(self, *key: str | int):
    self._key = key
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:16], 'big')
    self._raw = np.random.Philox(key=seed)

  def split(self, *key: str | int) -> 'Dice':
    """Others, which depend on these dice's key and `key`, not on what has been drawn."""
    return Dice(*self._key, *key)

  def below(self, n: int) -> int:
    """An integer in 0 .. n - 1, n far below 2^64."""
    return int(self._raw.random_raw()) % n

  def choice(self, values: Sequence[T]) -> T:
    return values[self.below(len(values))]

  def shuffled(self, values: Sequence[T]) -> list[T]:
    """All of them in another order."""
    order = np.argsort(self._raw.random_raw(len(values)), kind='stable') if len(values) else []
    return [values[i] for i in order]

  def distinct(self, n: int, sides: int) -> list[int]:
    """n different integers in 0 .. sides - 1, in any order."""
    if n > sides:
      raise ValueError(f'{n} different numbers below {sides}')
    if 3 * n > sides:
      return self.shuffled(range(sides))[:n]
    found: dict[int, None] = {}
    while len(found) < n:  # each turn finds a new one with a chance of two in three, or more
      found[self.below(sides)] = None
    return list(found)

  def number(self, digits: int) -> str:
    """A decimal number of so many digits, the first not 0."""
    low = 10 ** (digits - 1)
    return str(low + self.below(9 * low))

  def uuid(self) -> str:
    return str(uuid.UUID(int=(self.below(1 << 62) << 64) + self.below(1 << 62), version=4))
