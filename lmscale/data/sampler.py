"""Random access to the training windows of one source: concatenate and split.

Epoch e is the source's documents in an order permuted by (seed, identity, e), one after the other, cut into windows
of seq_len tokens with one more to look ahead at: window k covers stream positions k*T .. k*T + T, and the next window
begins with the token that was looked at. The windows are visited in a second permuted order. What is left at the
end of an epoch's stream (fewer than T + 1 tokens, other ones in each epoch) is dropped.
"""

import dataclasses
import functools

import numpy as np

from lmscale import config as config_lib
from lmscale.data import order
from lmscale.data.cache import TokenStore

EPOCHS_KEPT = 2  # a batch may lie across the end of an epoch


@dataclasses.dataclass(frozen=True)
class Epoch:
  """One pass: `documents` [n] in stream order, `starts` [n + 1] in the stream, `windows` in visiting order."""

  documents: np.ndarray
  starts: np.ndarray
  windows: np.ndarray


class Sampler:
  """Samples of one source. Sample i is window `windows[i % windows_per_epoch]` of epoch `i // windows_per_epoch`."""

  def __init__(self, name: str, store: TokenStore, split: str, fraction: float, seq_len: int, seed: int):
    """The documents of `split` where `fraction` is held out. Raises ConfigError if they do not fill one window."""
    self.name, self.store, self.seq_len = name, store, seq_len
    documents = store.documents(split, fraction)
    lengths = store.offsets[documents + 1] - store.offsets[documents]
    self.documents, self.lengths = documents[lengths > 0], lengths[lengths > 0]  # Megatron's may be empty
    self.tokens = int(self.lengths.sum())
    self.windows_per_epoch = max(self.tokens - 1, 0) // seq_len
    self._key = (store.identity, seed, split)
    self._epoch = functools.lru_cache(EPOCHS_KEPT)(self._make_epoch)
    if not self.windows_per_epoch:
      whole = '; documents (text files, JSONL lines) are held out whole: give more of them, or set loop.eval_every=0'
      raise config_lib.ConfigError(
        f'data source {name!r}: its {split} split has {len(self.documents)} of {len(store.split_keys)} documents and '
        f'{self.tokens} tokens, one window takes train.seq_len + 1 = {seq_len + 1}: add text, lower train.seq_len or '
        f'change data.validation ({fraction})' + whole * (split == 'validation'))

  def _make_epoch(self, epoch: int) -> Epoch:
    shuffled = order.permutation(len(self.documents), 'documents', epoch, *self._key)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths[shuffled])])
    windows = order.permutation(self.windows_per_epoch, 'windows', epoch, *self._key)
    return Epoch(self.documents[shuffled], starts, windows)

  def _window(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    """(documents [n] that sample `index` touches, where each begins in its row, and seq_len + 1: int64 [n + 1])."""
    epoch = self._epoch(index // self.windows_per_epoch)
    begin = int(epoch.windows[index % self.windows_per_epoch]) * self.seq_len
    end = begin + self.seq_len + 1
    first, last = np.searchsorted(epoch.starts, (begin, end - 1), 'right') - 1
    return epoch.documents[first:last + 1], epoch.starts[first:last + 2] - begin

  def sample(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, labels, segment_ids, positions), each int32 [seq_len].

    segment_ids number the row's documents from 1; positions restart at 0 at each document and at the row's start.
    labels are the next tokens, -1 at a document's last token: what follows it is another document.
    """
    length = self.seq_len + 1
    documents, starts = self._window(index)
    begins, ends = np.clip(starts[:-1], 0, length), np.clip(starts[1:], 0, length)
    row = np.empty(length, np.int32)
    sources = self.store.offsets[documents] - starts[:-1]
    for source, begin, end in zip(sources.tolist(), begins.tolist(), ends.tolist(), strict=True):
      row[begin:end] = self.store.tokens[source + begin:source + end]
    counts = ends - begins
    segments = np.repeat(np.arange(1, len(documents) + 1, dtype=np.int32), counts)
    positions = np.arange(length, dtype=np.int32) - np.repeat(begins.astype(np.int32), counts)
    labels = row[1:].copy()
    lasts = starts[1:] - 1
    labels[lasts[lasts < self.seq_len]] = -1
    return row[:-1], labels, segments[:-1], positions[:-1]

  def text_bytes(self, index: int) -> tuple[float, int]:
    """(bytes of text that the labels of sample `index` stand for, labels).

    A document's bytes are spread evenly over its tokens, its end included: exact for whole documents.

    Raises:
      ValueError: the store does not know its texts.
    """
    if self.store.text_bytes is None:
      raise ValueError(f'source {self.name!r}: the bytes of its texts are not known')
    documents, starts = self._window(index)
    labels = np.diff(np.clip(starts, 0, self.seq_len + 1)) - 1
    tokens = self.store.offsets[documents + 1] - self.store.offsets[documents]
    return float(np.sum(labels * (self.store.text_bytes[documents] / tokens))), int(labels.sum())
