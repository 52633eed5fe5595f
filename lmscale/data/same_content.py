"""Which sources of a blend hold the same documents, under whatever name and in whatever form and order."""

from collections.abc import Sequence

import numpy as np

from lmscale.data.token_cache import TokenStore

COMPARED = 1 << 24  # tokens at a time


def first_equal(stores: Sequence[TokenStore]) -> list[int]:
  """For each store the number of the first one with its documents: its own where there is none before it."""
  firsts: list[int] = []
  for i, store in enumerate(stores):
    firsts.append(next((k for k in sorted({*firsts}) if hold_the_same(stores[k], store)), i))
  return firsts


def hold_the_same(a: TokenStore, b: TokenStore) -> bool:
  """Whether two stores of one tokenizer have the same documents, judged by the documents' hashes and lengths in any
  order, or, where Megatron's files know no texts to hash, by the tokens in their order."""
  if a.identity == b.identity:
    return True
  if len(a.split_keys) != len(b.split_keys) or len(a.tokens) != len(b.tokens):
    return False
  if np.array_equal(_documents(a), _documents(b)):
    return True
  parts = (slice(at, at + COMPARED) for at in range(0, len(a.tokens), COMPARED))
  return np.array_equal(a.offsets, b.offsets) and all(
    np.array_equal(a.tokens[part], b.tokens[part]) for part in parts
  )


def _documents(store: TokenStore) -> np.ndarray:
  """uint64 [documents, 2]: hash and length of each document, sorted."""
  found = np.stack([store.split_keys, np.diff(store.offsets).astype(np.uint64)], axis=1)
  return found[np.lexsort(found.T)]
