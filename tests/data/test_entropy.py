import math

import numpy as np
import pytest

from lmscale.data import entropy


def test_by_hand():
  # Pairs of 0 0 1 0 1 1: 00 once, 01 twice, 10 once, 11 once.
  # After 0 (3 of 5): H(1/3); after 1 (2 of 5): H(1/2).
  after_0 = -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)
  expected = 3 / 5 * after_0 + 2 / 5 * math.log(2)
  assert entropy.order1_entropy(np.array([0, 0, 1, 0, 1, 1], np.uint16), 2) == pytest.approx(expected, rel=1e-12)


def test_nothing_follows_the_end_of_a_document():
  # Documents 0 1 and 0 0 with end 2: pairs 01, 12, 00, 02.
  tokens = np.array([0, 1, 2, 0, 0, 2])
  assert entropy.order1_entropy(tokens, 3, end=2) == pytest.approx(3 / 4 * math.log(3))
  assert entropy.pair_counts(tokens, 3, end=2).tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]


def test_extremes():
  assert entropy.order1_entropy(np.tile([0, 1, 2], 100), 3) == pytest.approx(0, abs=1e-12)
  uniform = np.random.default_rng(0).integers(0, 16, 200_000)
  assert entropy.order1_entropy(uniform, 16) == pytest.approx(math.log(16), abs=2e-3)


def test_blocks_do_not_lose_or_repeat_pairs(monkeypatch):
  tokens = np.random.default_rng(0).integers(0, 5, 1000)
  whole = entropy.pair_counts(tokens, 5)
  assert whole.sum() == 999
  for block in (7, 333, 999, 1000):
    monkeypatch.setattr(entropy, 'BLOCK', block)
    assert np.array_equal(entropy.pair_counts(tokens, 5), whole)
