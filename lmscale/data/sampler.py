"""Random access to the training windows of one source: concatenate and split.

Epoch e is the split's documents (`split.py`: whole ones, or a stretch of each) in an order permuted by (seed, identity, split, e), one after the other, cut into windows
of seq_len tokens with one more to look ahead at: window k covers stream positions k*T .. k*T + T, and the next window
begins with the token that was looked at. The windows are visited in a second permuted order. What is left at the
end of an epoch's stream (fewer than T + 1 tokens, other ones in each epoch) is dropped.
"""

import dataclasses
import functools
import math

import numpy as np

from lmscale import config as config_lib
from lmscale.data import permutations
from lmscale.data import split as split_lib
from lmscale.data.token_cache import TokenStore

EPOCHS_KEPT = 2  # a batch may lie across the end of an epoch


@dataclasses.dataclass(frozen=True)
class Epoch:
  """One pass: `documents` [n] in stream order, as numbers of the split's, `starts` [n + 1] in the stream, `windows` in visiting order."""

  documents: np.ndarray
  starts: np.ndarray
  windows: np.ndarray


class Sampler:
  """Samples of one source. Sample i is window `windows[i % windows_per_epoch]` of epoch `i // windows_per_epoch`."""

  def __init__(self, name: str, store: TokenStore, split: str, fraction: float, seq_len: int, seed: int, copy: int = 0,
               path: str = ''):
    """The documents of `split` where `fraction` is held out, in order number `copy`: one blend may hold a store twice.

    `path` tells the user which source an error is about.

    Raises:
      ConfigError: they do not fill one window.
    """
    self.name, self.store, self.seq_len = name, store, seq_len
    self._tokens = np.asarray(store.tokens)  # not as a memmap, whose slices take five times as long
    self._count = np.arange(seq_len, dtype=np.int32)
    self.documents, self.begins, self.lengths, self.whole = split_lib.stretches(store, split, fraction)
    self.tokens = int(self.lengths.sum())
    self.windows_per_epoch = max(self.tokens - 1, 0) // seq_len
    self._key = (store.identity, seed, split, copy) if copy else (store.identity, seed, split)
    self._epoch = functools.lru_cache(EPOCHS_KEPT)(self._make_epoch)
    if not self.windows_per_epoch:
      raise config_lib.ConfigError(self._too_little(split, fraction, path))

  def _too_little(self, split: str, fraction: float, path: str) -> str:
    window, total = self.seq_len + 1, len(self._tokens)
    enough = math.ceil(100 * window / max(total, 1)) / 100
    share = f'change data.validation ({fraction})'
    if split == 'validation':
      larger = f'raise data.validation from {fraction} to {enough:g} (of {total:,} tokens)' if fraction < enough <= 0.5 else share
      share = f'{larger}, or set loop.eval_every=0'
    return (f'data source {self.name!r}: its {split} split has {len(self.documents)} of {len(self.store.split_keys)} documents '
            f'and {self.tokens} tokens{path and f" of {path}"}, one window takes train.seq_len + 1 = {window}: add text, lower '
            f'train.seq_len or {share}')

  def _make_epoch(self, epoch: int) -> Epoch:
    shuffled = permutations.permutation(len(self.documents), 'documents', epoch, *self._key)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths[shuffled])])
    windows = permutations.permutation(self.windows_per_epoch, 'windows', epoch, *self._key)
    return Epoch(shuffled, starts, windows)

  def _window(self, index: int) -> tuple[np.ndarray, list[int], int]:
    """(numbers [n] of the split's documents that sample `index` touches, where each begins and the last ends in the
    stream, the sample's begin)."""
    epoch = self._epoch(index // self.windows_per_epoch)
    begin = int(epoch.windows[index % self.windows_per_epoch]) * self.seq_len
    first = int(epoch.starts.searchsorted(begin, 'right')) - 1
    last = int(epoch.starts.searchsorted(begin + self.seq_len, 'right'))
    return epoch.documents[first:last], epoch.starts[first:last + 1].tolist(), begin

  def sample(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, labels, segment_ids, positions), each int32 [seq_len].

    segment_ids number the row's documents from 1; positions restart at 0 at each document and at the row's start.
    labels are the next tokens, -1 at a document's last token: what follows it is another document.
    """
    arrays = tuple(np.empty(self.seq_len, np.int32) for _ in range(4))
    self.fill(index, *arrays)
    return arrays

  def fill(self, index: int, tokens: np.ndarray, labels: np.ndarray, segments: np.ndarray, positions: np.ndarray) -> None:
    """Writes `sample(index)` into arrays [seq_len]."""
    documents, starts, begin = self._window(index)
    for k, source in enumerate(self.begins[documents].tolist()):
      at, end = max(starts[k] - begin, 0), min(starts[k + 1] - begin, self.seq_len + 1)  # in the row and its look-ahead
      source += begin - starts[k]
      inside = min(end, self.seq_len)
      tokens[at:inside] = self._tokens[source + at:source + inside]
      labels[at:end - 1] = self._tokens[source + at + 1:source + end]
      if end <= self.seq_len:
        labels[end - 1] = -1
      segments[at:inside] = k + 1
      positions[at:inside] = self._count[:inside - at]

  def text_bytes(self, index: int) -> tuple[float, int]:
    """(bytes of text that the labels of sample `index` stand for, labels).

    A document's bytes are spread evenly over its tokens, its end included: exact for whole documents.

    Raises:
      ValueError: the store does not know its texts.
    """
    if self.store.text_bytes is None:
      raise ValueError(f'source {self.name!r}: the bytes of its texts are not known')
    documents, starts, begin = self._window(index)
    labels = np.diff(np.clip(starts, begin, begin + self.seq_len + 1)) - 1
    whole = self.documents[documents]
    per_token = self.store.text_bytes[whole] / (self.store.offsets[whole + 1] - self.store.offsets[whole])
    return float(np.sum(labels * per_token)), int(labels.sum())
