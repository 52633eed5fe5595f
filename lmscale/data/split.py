"""Which tokens of a source are trained on and which are held out.

A source of many documents holds out whole documents, chosen by the hash of their content. Where that would hold out
nothing, or nearly everything, or another share than was asked for, because the documents are few or some are very long, the
ends of documents are held out: of each long one its share, of short ones, in the order of their hashes, up to `STRETCH`
tokens each until the share is reached. What is held out depends on the documents and the share alone, and copies of a
document are cut at the same place.
"""

from typing import NamedTuple

import numpy as np

from lmscale.data.token_cache import TokenStore

STRETCH = 1024  # tokens that a stretch has where its document and the share to hold out allow it
MANY = 8  # documents on each side that make a split by documents good, however long they are
OFF = 4  # how many times more or less than asked for may be held out where there are fewer


class Stretches(NamedTuple):
  """Parts of documents, in the documents' order; all arrays are int64 [n]."""

  documents: np.ndarray  # which document
  begins: np.ndarray  # its first token in the store
  lengths: np.ndarray  # tokens, at least 1
  whole: bool  # they are whole documents


def stretches(store: TokenStore, split: str, fraction: float) -> Stretches:
  """What of `store` is in `split`, 'train' or 'validation', where the share `fraction` is held out."""
  lengths = np.diff(store.offsets)
  held = np.zeros(len(lengths), np.int64)
  chosen = store.documents('validation', fraction)
  held[chosen] = lengths[chosen]
  whole = _by_documents(lengths, held, fraction)
  if not whole:
    held = _ends(lengths, store.split_keys, fraction)
  begins, found = (store.offsets[1:] - held, held) if split == 'validation' else (store.offsets[:-1], lengths - held)
  documents = np.flatnonzero(found > 0)  # Megatron's may be empty
  return Stretches(documents, begins[documents], found[documents], whole)


def _by_documents(lengths: np.ndarray, held: np.ndarray, fraction: float) -> bool:
  """Whether holding out the documents whose `held` tokens are not 0 is a good split."""
  total, out = int(lengths.sum()), int(held.sum())
  counts = np.count_nonzero(held), np.count_nonzero(lengths - held)
  if min(counts) >= MANY and 2 * int(lengths.max()) <= total:
    return True
  return fraction * total <= OFF * out and (1 - fraction) * total <= OFF * (total - out) and out <= OFF * fraction * total


def _ends(lengths: np.ndarray, keys: np.ndarray, fraction: float) -> np.ndarray:
  """int64 [documents]: how many tokens at each document's end are held out."""
  long = fraction * lengths >= STRETCH
  held = np.where(long, np.rint(fraction * lengths), 0).astype(np.int64)
  short = lengths[~long]
  _, first, group, copies = np.unique(keys[~long], return_index=True, return_inverse=True, return_counts=True)
  most = np.minimum(short[first], STRETCH)
  left = round(fraction * int(short.sum())) - (np.cumsum(most * copies) - most * copies)  # when it is each one's turn
  held[~long] = np.minimum(np.clip(left // copies, 0, most)[group], short)
  return held
