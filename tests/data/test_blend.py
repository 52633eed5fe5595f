import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from lmscale import config as config_lib
from lmscale.data.blend import BLOCK, Blend

# Sampling weights of MT-NLG's fifteen sets in percent (arXiv 2201.11990's data blend).
MT_NLG = [14.3, 19.3, 5.7, 2.9, 4.8, 0.9, 1.0, 0.2, 9.4, 1.4, 1.6, 13.0, 15.7, 9.0, 0.9]


def dealt(blend, samples):
  return np.array([blend.source_of(i) for i in range(samples)])


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(st.lists(st.floats(0, 1e3), min_size=1, max_size=20).filter(lambda w: sum(w) > 0),
                  st.integers(0, 10**9))
def test_counts_at_block_ends_differ_by_less_than_one(weights, block):
  try:
    blend = Blend(weights)
  except config_lib.ConfigError:
    hypothesis.assume(False)  # a share too small to deal
  for samples in (block * blend.block, (block + 1) * blend.block):
    counts = blend._shared(samples)
    assert counts.sum() == samples
    assert np.abs(counts - samples * np.array(blend.weights)).max() < 1 + 1e-12 * samples
    assert (counts[np.array(weights) == 0] == 0).all()
  assert (blend._shared((block + 1) * blend.block) >= blend._shared(block * blend.block)).all()


def test_mt_nlg_blend():
  blend = Blend(MT_NLG, 0)
  samples = 5 * BLOCK
  found = dealt(blend, samples)
  shares = np.array(MT_NLG) / sum(MT_NLG)
  counts = np.bincount(found[:, 0], minlength=15)
  assert np.abs(counts - samples * shares).max() < 1
  # Inside a block the order is random: half a block has the shares within four standard deviations.
  half = np.bincount(found[:BLOCK // 2, 0], minlength=15)
  assert (np.abs(half - BLOCK / 2 * shares) <= 1 + 4 * np.sqrt(BLOCK / 2 * shares * (1 - shares))).all()
  assert (half != np.round(BLOCK / 2 * shares)).any()


def test_each_source_is_read_in_order_without_gaps():
  found = dealt(Blend([0.5, 0.3, 0.2], 3), 3 * BLOCK)
  for source in range(3):
    k = found[found[:, 0] == source, 1]
    assert k.tolist() == list(range(len(k)))


def test_counts_match_what_was_dealt():
  blend = Blend([3, 1, 0, 0.01], 1)
  found = dealt(blend, 2 * BLOCK + 100)[:, 0]
  for samples in (0, 1, 500, BLOCK, BLOCK + 1, 2 * BLOCK + 100):
    assert blend.counts(samples).tolist() == np.bincount(found[:samples], minlength=4).tolist()


def test_random_access_and_seeds():
  forward = dealt(Blend([2, 1], 0), 3000)
  backward = Blend([2, 1], 0)
  assert [list(row) for row in forward[::-1]] == [list(backward.source_of(i)) for i in range(2999, -1, -1)]
  assert not np.array_equal(forward, dealt(Blend([2, 1], 1), 3000))


def test_rare_sources_get_a_longer_block():
  blend = Blend([1, 1e-5])
  assert blend.block >= 1e5
  assert blend.counts(blend.block * 10).tolist() == [blend.block * 10 - 10, 10]


@pytest.mark.parametrize('weights', [[], [0.0, 0.0], [1, -0.1], [1, float('nan')], [1, float('inf')], [1, 1e-9]])
def test_nonsense_weights_are_a_config_error(weights):
  with pytest.raises(config_lib.ConfigError, match='data.sources weights'):
    Blend(weights)
