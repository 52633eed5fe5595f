"""Texts of different lengths, read side by side some tokens at a time."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Chunk(NamedTuple):
  """The tokens from `start` on of each row's text, as `Engine.prefill` takes them: int32 [rows, width], slots [rows]."""

  start: int
  tokens: np.ndarray
  positions: np.ndarray
  segments: np.ndarray
  slots: np.ndarray


def chunks(texts: Sequence[Sequence[int]], held: np.ndarray, width: int) -> Iterator[Chunk]:
  """The texts, one a row, behind the held[i] tokens (int32 [rows]) of row i's cache. Rows without a text are padding.

  width: tokens at a time, at most; fewer where no text has so many, in powers of two, so that few widths are compiled.
  """
  rows = len(held)
  lengths = np.zeros(rows, np.int32)
  lengths[: len(texts)] = [len(text) for text in texts]
  longest = int(lengths.max())
  width = min(width, 1 << max(longest - 1, 0).bit_length())
  for start in range(0, longest, width):
    places = start + np.arange(width, dtype=np.int32)[None]
    segments = (places < lengths[:, None]).astype(np.int32)
    yield Chunk(start, cut(texts, start, (rows, width)), held[:, None] + places, segments, held + np.minimum(lengths, start))


def cut(texts: Sequence[Sequence[int]], start: int, shape: tuple[int, int]) -> np.ndarray:
  """int32 [rows, width]: the ids from `start` on of each row's text, 0 behind its end."""
  found = np.zeros(shape, np.int32)
  for row, text in enumerate(texts):
    part = text[start : start + shape[1]]
    found[row, : len(part)] = part
  return found
