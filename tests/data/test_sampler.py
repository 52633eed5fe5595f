import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from lmscale import config as config_lib
from lmscale.data.sampler import Sampler
from lmscale.data.token_cache import TokenStore

END = 9999


def make_store(lengths):
  """Every token of the corpus is another number, except END at the documents' ends."""
  offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
  tokens = np.arange(offsets[-1], dtype=np.int32)
  tokens[offsets[1:] - 1] = END
  return TokenStore('store', tokens, offsets, np.arange(len(lengths), dtype=np.uint64) << 40, ())


def make_sampler(lengths, seq_len, seed=0):
  return Sampler('source', make_store(lengths), 'train', 0.0, seq_len, seed)


@st.composite
def corpora(draw):
  lengths = draw(st.lists(st.integers(2, 30), min_size=1, max_size=12))
  return lengths, draw(st.integers(1, max(1, min(40, sum(lengths) - 1)))), draw(st.integers(0, 5))


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(corpora())
def test_packing_invariants(corpus):
  lengths, seq_len, seed = corpus
  sampler = make_sampler(lengths, seq_len, seed)
  store = sampler.store
  owner = np.repeat(np.arange(len(lengths)), lengths)
  for epoch in range(2):
    seen, ends = [], 0
    for i in range(sampler.windows_per_epoch):
      tokens, labels, segments, positions = sampler.sample(epoch * sampler.windows_per_epoch + i)
      assert all(a.dtype == np.int32 and a.shape == (seq_len,) for a in (tokens, labels, segments, positions))
      inner = tokens != END
      assert (labels[~inner] == -1).all()  # what follows a document's end is not to be predicted
      assert (labels[inner] >= 0).all()
      for t in np.flatnonzero(inner):  # the label is the next token of the same document
        following = tokens[t] + 1
        assert labels[t] == store.tokens[following] and owner[following] == owner[tokens[t]]
      # Documents are numbered from 1 in order and change exactly after an end; positions restart there.
      assert segments.tolist() == [1, *(1 + np.cumsum(~inner)[:-1])]
      starts = np.flatnonzero(np.diff(segments, prepend=0))
      assert positions.tolist() == [t - starts[starts <= t][-1] for t in range(seq_len)]
      seen += tokens[inner].tolist()
      ends += int((~inner).sum())
    assert len(seen) == len(set(seen))  # no token twice
    dropped = sampler.tokens - len(seen) - ends
    assert 1 <= dropped <= seq_len  # only the tail, which holds at least the last look-ahead


def test_windows_follow_each_other_in_the_stream():
  sampler = make_sampler([50, 7, 31, 12], 8)
  windows = {}
  order = sampler._epoch(0).windows
  for i in range(sampler.windows_per_epoch):
    windows[int(order[i])] = sampler.sample(i)
  for k in range(len(windows) - 1):
    last, following = windows[k][1][-1], windows[k + 1][0][0]
    assert last in (following, -1)


@pytest.mark.parametrize('lengths', [[20] * 30, [600]], ids=['documents', 'windows'])
def test_epochs_and_seeds_have_their_own_orders(lengths):
  rows = {}
  for seed in (0, 1):
    sampler = make_sampler(lengths, 16, seed)
    n = sampler.windows_per_epoch
    for epoch in (0, 1):
      rows[seed, epoch] = np.stack([sampler.sample(epoch * n + i)[0] for i in range(n)])
      assert np.array_equal(sampler.sample(epoch * n + 3)[0], rows[seed, epoch][3])
  keys = list(rows)
  for i, a in enumerate(keys):
    for b in keys[i + 1:]:
      assert (rows[a] == rows[b]).all(axis=1).mean() < 0.2
      if len(lengths) > 1:  # not only the windows' order: other windows
        assert len({*map(tuple, rows[a])} & {*map(tuple, rows[b])}) < len(rows[a]) / 2


def test_random_access_and_restarts_agree():
  first = make_sampler([13, 40, 5, 90, 22], 16)
  n = first.windows_per_epoch
  forward = [first.sample(i) for i in range(3 * n)]
  again = make_sampler([13, 40, 5, 90, 22], 16)
  for i in np.random.default_rng(0).permutation(3 * n):
    for a, b in zip(forward[i], again.sample(int(i)), strict=True):
      assert np.array_equal(a, b)


def test_one_window_exactly_and_one_token_less():
  assert make_sampler([9], 8).windows_per_epoch == 1
  with pytest.raises(config_lib.ConfigError, match=r"'source': its train split has 2 of 2 documents and 8 tokens.*= 9"):
    make_sampler([4, 4], 8)
  with pytest.raises(config_lib.ConfigError, match='validation split has 0 of 2 documents and 0 tokens.*eval_every=0'):
    Sampler('source', make_store([40, 40]), 'validation', 0.0, 8, 0)


@pytest.mark.parametrize('lengths', [[13, 40, 5, 90, 22], [0, 13, 0, 0, 40, 5, 90, 22, 0]])
def test_text_bytes_count_the_labels_and_empty_documents_are_left_out(lengths):
  sizes = np.array([3 * max(n - 1, 0) for n in lengths])
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  keys = np.arange(len(lengths), dtype=np.uint64) << 40
  store = dataclasses.replace(make_store([n for n in lengths if n]), offsets=offsets, split_keys=keys, text_bytes=sizes)
  owner = np.repeat(np.arange(len(lengths)), lengths)
  sampler = Sampler('source', store, 'train', 0.0, 16, 0)
  assert len(sampler.documents) == 5
  for i in range(2 * sampler.windows_per_epoch):
    tokens, labels, segments, _ = sampler.sample(i)
    assert set(np.diff(segments, prepend=0)) <= {0, 1}  # numbered without gaps
    found, counted = sampler.text_bytes(i)
    assert counted == (labels >= 0).sum()
    predicted = owner[tokens[labels >= 0]]  # every token is its place, and its label is of the same document
    assert found == pytest.approx(sum(sizes[d] / lengths[d] for d in predicted))
  with pytest.raises(ValueError, match="'source': the bytes of its texts are not known"):
    make_sampler([9], 8).text_bytes(0)
