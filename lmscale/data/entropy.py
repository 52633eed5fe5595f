"""The bigram baseline: the order-1 conditional entropy H(next token | token) of a corpus.

It is the loss of the best model that sees one token of context, so a language model that learnt anything about
context beyond one byte is below it. Counted as the loss is: the end-of-document id is predicted, a document's first
token is not.
"""

import numpy as np

BLOCK = 1 << 24  # tokens counted at a time


def pair_counts(tokens: np.ndarray, vocab: int, end: int | None = None) -> np.ndarray:
  """int64 [vocab, vocab]: how often id j follows id i in `tokens` [n]; nothing follows `end`.

  Dense, so it is meant for byte-sized vocabularies.
  """
  counts = np.zeros(vocab * vocab, np.int64)
  for at in range(0, len(tokens) - 1, BLOCK):
    block = np.asarray(tokens[at:at + BLOCK + 1], np.int64)
    counts += np.bincount(block[:-1] * vocab + block[1:], minlength=vocab * vocab)
  counts = counts.reshape(vocab, vocab)
  if end is not None:
    counts[end] = 0
  return counts


def conditional_entropy(joint: np.ndarray) -> float:
  """H(j | i) in nats of a joint distribution or counts [i, j], not normalised."""
  joint = joint / joint.sum()
  given = joint.sum(axis=1, keepdims=True)
  seen = joint > 0
  return float(-np.sum(joint[seen] * np.log((joint / np.where(given > 0, given, 1))[seen])))


def order1_entropy(tokens: np.ndarray, vocab: int, end: int | None = None) -> float:
  """H(next | token) in nats per token of `tokens` [n], with the statistics of `tokens` itself."""
  return conditional_entropy(pair_counts(tokens, vocab, end))
