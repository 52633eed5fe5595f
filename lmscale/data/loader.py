"""Batches as a pure function of (seed, data identity, sequence length, sample index).

A step reads a range of sample numbers, a host its rows of that range: however the rows are shared out, and wherever a
run was interrupted, sample i is the same.
"""

import logging
import pathlib
from typing import Any

import numpy as np

from lmscale import config as config_lib
from lmscale.batch import ROWS
from lmscale.cache_root import cache_root
from lmscale.data import entropy, same_content, token_cache
from lmscale.data import tokenizer as tokenizer_lib
from lmscale.data.blend import Blend
from lmscale.data.sampler import Sampler
from lmscale.data.sources import opening

VERSION = 1  # raise when the same data and seed would give other samples
SPLITS = ('train', 'validation')
ENDS = 'ends of documents'  # in the identity of a source that does not hold out whole documents
ENTROPY_TOKENS = 1 << 24  # of each source that the bigram baseline is counted on

log = logging.getLogger(__name__)


def _open(index: int, source: config_lib.SourceConfig, tokenizer: tokenizer_lib.Tokenizer,
          root: pathlib.Path) -> token_cache.TokenStore:
  try:
    return opening.open_store(source, tokenizer, root)
  except config_lib.ConfigError as error:
    where = '' if source.path in str(error) else f' ({source.path})'
    raise config_lib.ConfigError(f'data.sources.{index} {source.name!r}{where}: {error}') from error


def _path(source: config_lib.SourceConfig) -> str:
  """Where the texts of a source lie, if that is the user's choice."""
  return '' if source.kind == 'stdlib' else source.path


class Loader:
  """The blended, packed samples of one split of config.data."""

  def __init__(self, config: config_lib.Config, split: str = 'train', tell: bool = True):
    """Tokenises what is not in the cache yet. Sources of weight 0 are not opened. `tell`: log what is odd about them.

    The validation samples do not depend on config.seed, so that runs with other seeds are measured on the same text.
    Raises ConfigError for missing or unusable data.
    """
    if split not in SPLITS:
      raise ValueError(f'split {split!r} is none of {SPLITS}')
    data = config.data
    self.split = split
    self.seq_len = config.train.seq_len
    self.tokenizer = tokenizer_lib.fitting_tokenizer(config)
    self.sources = [source for source in data.sources if source.weight]
    seed = config.seed if split == 'train' else 0
    self.blend = Blend([source.weight for source in self.sources], seed, split)
    root = cache_root(data.cache)
    self.stores = [_open(data.sources.index(source), source, self.tokenizer, root) for source in self.sources]
    identities = [store.identity for store in self.stores]
    self.copies = [identities[:i].count(identity) for i, identity in enumerate(identities)]
    self.samplers = [
      Sampler(source.name, store, split, data.validation, self.seq_len, seed, copy, _path(source))
      for source, store, copy in zip(self.sources, self.stores, self.copies, strict=True)
    ]
    self.contents = same_content.first_equal(self.stores)
    if tell:
      self._tell()
    self.identity = self._identity(seed, data.validation)

  def _identity(self, seed: int, fraction: float) -> dict[str, Any]:
    """Everything a sample depends on, in parts, so that a run that goes on with other data is told what has changed."""
    parts = zip(self.sources, self.blend.weights, self.stores, self.copies, self.samplers, strict=True)
    sources = [{'name': source.name, 'weight': weight, 'content': store.content, **({'copy': copy} if copy else {}),
                **({} if sampler.whole else {'held_out': ENDS})} for source, weight, store, copy, sampler in parts]
    return {'tokenizer': self.tokenizer.identity, 'sources': sources, 'seq_len': self.seq_len, 'seed': seed,
            'split': self.split, 'validation': fraction, 'version': [VERSION, token_cache.FORMAT]}

  def _tell(self) -> None:
    for source, store in zip(self.sources, self.stores, strict=True):
      for notice in store.notices:
        log.warning('%s: %s', source.name, notice)
    for i, first in enumerate(self.contents):
      if first != i:
        log.warning('data.sources %r and %r hold the same texts: they are passed over together, each in an order of its '
                    'own', self.sources[first].name, self.sources[i].name)

  @property
  def vocab(self) -> int:
    """Ids the tokenizer uses."""
    return self.tokenizer.size

  @property
  def samples_per_epoch(self) -> int:
    """Windows of all sources together. A blend passes over some sources sooner than others: see `epochs`."""
    return sum(sampler.windows_per_epoch for sampler in self.samplers)

  def batch(self, first_sample: int, rows: slice | range) -> dict[str, np.ndarray]:
    """tokens, labels, segment_ids, positions: int32 [len(rows), seq_len] of samples first_sample + rows.

    A slice needs a stop. labels are -1 where nothing is to be predicted; segment_ids number a row's documents from 1.
    """
    if isinstance(rows, slice):
      rows = range(rows.start or 0, rows.stop, rows.step or 1)
    out = {key: np.empty((len(rows), self.seq_len), np.int32) for key in ROWS}
    for i, row in enumerate(rows):
      source, k = self.blend.source_of(first_sample + row)
      self.samplers[source].fill(k, *(out[key][i] for key in ROWS))
    return out

  def summary(self) -> list[dict[str, Any]]:
    """Per source: name, path (empty where it has none), documents and tokens of this split, weight (they sum to 1), lines
    skipped when reading, files and bytes that were read, the share of all tokens that is in the other split, and whether the
    splits are parts of documents."""
    return [{'name': sampler.name, 'path': _path(source), 'documents': len(sampler.documents), 'tokens': sampler.tokens,
             'weight': weight, 'skipped': len(sampler.store.skipped), 'files': sampler.store.files, 'bytes': sampler.store.size,
             'other_split': 1 - sampler.tokens / len(sampler.store.tokens), 'ends': not sampler.whole}
            for source, sampler, weight in zip(self.sources, self.samplers, self.blend.weights, strict=True)]

  def epochs(self, samples: int) -> dict[str, float]:
    """How many times the first `samples` samples pass over each source's texts, by name; sources with the same texts pass
    over them together."""
    counts = np.bincount(self.contents, self.blend.counts(samples))
    return {sampler.name: float(counts[content] / sampler.windows_per_epoch)
            for sampler, content in zip(self.samplers, self.contents, strict=True)}

  def bytes_per_token(self, samples: int) -> float | None:
    """Bytes of text per predicted token in the first `samples` samples; None where a source does not know its texts."""
    found = np.zeros(2)
    for sample in range(samples):
      source, k = self.blend.source_of(sample)
      if self.stores[source].text_bytes is None:
        return None
      found += self.samplers[source].text_bytes(k)
    return float(found[0] / found[1]) if found.all() else None

  def order1_entropy(self) -> float:
    """H(next token | token) in nats of the corpus, train and validation, blended by the weights.

    Of a source of more than ENTROPY_TOKENS tokens it is that of the first so many, and a log line says so.
    """
    joint = 0.0
    for sampler, weight, store in zip(self.samplers, self.blend.weights, self.stores, strict=True):
      if len(store.tokens) > ENTROPY_TOKENS:
        log.warning('%s: the order-1 entropy is that of its first %s of %s tokens', sampler.name,
                    f'{ENTROPY_TOKENS:,}', f'{len(store.tokens):,}')
      counts = entropy.pair_counts(store.tokens[:ENTROPY_TOKENS], self.vocab, self.tokenizer.end)
      joint = joint + weight * (counts / counts.sum())
    return entropy.conditional_entropy(joint)
