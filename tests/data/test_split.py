import dataclasses
import json

import hypothesis
import hypothesis.strategies as st
import made
import numpy as np
import pytest

from lmscale import config as config_lib
from lmscale.data import document, split
from lmscale.data.loader import Loader
from lmscale.data.sources import megatron
from lmscale.data.token_cache import TokenStore
from lmscale.jobs import train

SEQ_LEN = 32


def make_store(lengths, keys=None):
  offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
  keys = [document.split_key(str(i).encode()) for i in range(len(lengths))] if keys is None else keys
  return TokenStore('store', np.broadcast_to(0, offsets[-1:]), offsets, np.array(keys, np.uint64))


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(lengths=st.lists(st.integers(0, 40) | st.integers(0, 200_000), max_size=30), copies=st.integers(1, 3),
                  fraction=st.sampled_from([0.0, 0.001, 0.02, 0.3, 0.9]))
def test_every_token_is_on_one_side_and_the_share_is_the_one_asked_for(lengths, copies, fraction):
  keys = [document.split_key(f'{i} {length}'.encode()) for i, length in enumerate(lengths)]
  store = make_store(lengths * copies, keys * copies)
  sides = [split.stretches(store, side, fraction) for side in ('train', 'validation')]
  begins, sizes = (np.concatenate([getattr(side, name) for side in sides]) for name in ('begins', 'lengths'))
  order = np.argsort(begins)
  assert np.array_equal(begins[order], np.cumsum(sizes[order]) - sizes[order]) and sizes.sum() == len(store.tokens)
  assert (sizes > 0).all()
  found = sides[1]
  share = found.lengths.sum() / max(len(store.tokens), 1)
  if not found.whole:
    assert abs(share - fraction) * len(store.tokens) <= (len(lengths) + 1) * copies
    by_document = dict(zip(found.documents.tolist(), found.lengths.tolist(), strict=True))
    for i in range(len(lengths)):  # copies of a document are cut at the same place
      assert len({by_document.get(i + k * len(lengths), 0) for k in range(copies)}) == 1
  elif len(store.tokens) and min(len(side.documents) for side in sides) < split.MANY:
    assert fraction / 4 <= share <= 4 * fraction


@pytest.mark.parametrize('fraction', [0.02, 0.2])
def test_many_documents_are_held_out_whole_as_ever(fraction):
  store = make_store(np.random.default_rng(0).pareto(1.2, 3000).astype(int) * 20 + 5)
  found = split.stretches(store, 'validation', fraction)
  assert found.whole
  assert np.array_equal(found.documents, np.flatnonzero(document.in_validation(store.split_keys, fraction)))
  assert np.array_equal(found.begins, store.offsets[found.documents])
  assert np.array_equal(found.lengths, np.diff(store.offsets)[found.documents])


@pytest.mark.parametrize('lengths', [[100_000], [70_000, 90_000, 80_000]])
def test_of_each_long_document_the_end_is_held_out(lengths):
  found = split.stretches(make_store(lengths), 'validation', 0.02)
  assert found.documents.tolist() == list(range(len(lengths))) and not found.whole
  assert found.lengths.tolist() == [length // 50 for length in lengths]
  assert (found.begins + found.lengths).tolist() == np.cumsum(lengths).tolist()


def test_of_short_documents_few_give_long_stretches():
  store = make_store([2000] * 20)
  found = split.stretches(store, 'validation', 0.02)
  assert len(found.documents) == 1 and found.lengths.tolist() == [800]
  smallest = np.argmin(store.split_keys)
  assert found.documents[0] == smallest and found.begins[0] + 800 == store.offsets[smallest + 1]


def test_one_giant_among_many_short_ones_gives_its_share():
  store = make_store([900_000] + [100] * 1000)
  found = split.stretches(store, 'validation', 0.02)
  assert not found.whole and found.documents[0] == 0 and found.lengths[0] == 18_000 and found.lengths[1:].sum() == 2000
  assert set(found.lengths[1:].tolist()) == {100}


def config_of(tmp_path, source, **changes):
  data = config_lib.DataConfig(sources=(source,), cache=str(tmp_path / 'cache'), validation=0.1)
  config = config_lib.Config(train=config_lib.TrainConfig(seq_len=SEQ_LEN), data=data)
  return dataclasses.replace(config, **changes)


def text_file(tmp_path):
  (tmp_path / 'a.txt').write_bytes(TEXT)
  return config_lib.SourceConfig('mine', 'text', str(tmp_path / 'a.txt'))


def megatron_files(tmp_path):
  with megatron.Writer(tmp_path / 'b', '<u2') as writer:
    writer.add(np.array([*TEXT, 256]))
  return config_lib.SourceConfig('mine', 'megatron', str(tmp_path / 'b'))


def tfds(tmp_path, monkeypatch, field):
  monkeypatch.setattr(made, 'TEXTS', [TEXT.decode()])
  made.prepare(tmp_path / 'tfds', 1)
  return config_lib.SourceConfig('mine', 'tfds', str(tmp_path / 'tfds'), field=field)


TEXT = bytes(np.random.default_rng(0).integers(97, 123, 5000, np.uint8))  # any 9 letters of it are there once
KINDS = ('text', 'megatron', 'tfds of text', 'tfds of tokens')


@pytest.fixture(params=KINDS)
def one_document(request, tmp_path, monkeypatch):
  if request.param.startswith('tfds'):
    source = tfds(tmp_path, monkeypatch, 'text' if 'text' in request.param else 'tokens')
  else:
    source = text_file(tmp_path) if request.param == 'text' else megatron_files(tmp_path)
  return config_of(tmp_path, source)


def pieces(loader):
  """(start, end, labels that are -1) in the text of every piece of a document in an epoch's rows."""
  batch = loader.batch(0, range(loader.samples_per_epoch))
  for tokens, labels, segments in zip(batch['tokens'], batch['labels'], batch['segment_ids'], strict=True):
    for segment in range(1, segments.max() + 1):
      inside = segments == segment
      piece = bytes(tokens[inside & (tokens < 256)].tolist())
      at = TEXT.index(piece)
      for label, following in zip(labels[inside], range(at + 1, at + 1 + inside.sum()), strict=True):
        assert label in (-1, 256) or label == TEXT[following]
      yield at, at + len(piece), labels[inside]


def test_one_document_is_trained_on_and_evaluated(one_document):
  """The whole way: a document of 5,000 tokens and its end, of which a tenth is held out at the end."""
  begin = 5001 - 500
  loaders = {side: Loader(one_document, side) for side in ('train', 'validation')}
  for side, (low, high) in {'train': (0, begin), 'validation': (begin, 5000)}.items():
    seen = np.zeros(5001, int)
    for start, end, labels in pieces(loaders[side]):
      assert low <= start and end <= high
      seen[start:end] += 1
      assert (labels[:-1] >= 0).all()
    assert (seen[low:high] <= 1).all() and seen.sum() >= high - low - SEQ_LEN - 1
  rows = loaders['train'].batch(0, range(loaders['train'].samples_per_epoch))
  assert (rows['tokens'] < 256).all() and (rows['labels'] < 256).all()  # the document does not end in this part
  assert loaders['train'].identity['sources'][0]['held_out'] == split_name(loaders['validation'])
  summary, = loaders['train'].summary()
  assert summary['other_split'] == pytest.approx(0.1, abs=1e-3) and summary['ends']


def split_name(loader):
  return loader.identity['sources'][0]['held_out']


def test_it_is_the_same_for_any_host_seed_and_restart(one_document):
  whole = Loader(one_document, 'validation').batch(0, range(8))
  for seed in (0, 7):
    for hosts in (1, 2, 4):
      loaders = [Loader(dataclasses.replace(one_document, seed=seed), 'validation') for _ in range(hosts)]
      rows = [loader.batch(0, range(h * 8 // hosts, (h + 1) * 8 // hosts)) for h, loader in enumerate(loaders)]
      assert all(np.array_equal(np.concatenate([row[key] for row in rows]), whole[key]) for key in whole)


def test_bytes_are_those_of_the_stretch(tmp_path):
  config = config_of(tmp_path, text_file(tmp_path))
  loader = Loader(config, 'validation')
  assert loader.bytes_per_token(loader.samples_per_epoch) == pytest.approx(5000 / 5001, rel=1e-12)


def test_the_end_of_a_document_is_predicted_in_the_held_out_part(tmp_path):
  config = config_of(tmp_path, text_file(tmp_path))
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, seq_len=499))
  labels = Loader(config, 'validation').batch(0, range(1))['labels']
  assert labels[0, -1] == 256


def test_what_is_held_out_is_shown_and_the_file_is_named(tmp_path):
  loader = Loader(config_of(tmp_path, text_file(tmp_path)))
  assert train.format_data(loader, 140) == ('data mine         4,501 tokens in 1 document, 100% of the blend, 1.00 epochs, '
                                            f'1 file of 5,000 bytes ({tmp_path}/a.txt), 10.0% held out at the ends of documents')
  path = tmp_path / 'many.jsonl'
  path.write_text(''.join(json.dumps({'text': f'document number {i}'}) + '\n' for i in range(1000)))
  many = Loader(config_of(tmp_path, config_lib.SourceConfig('many', 'jsonl', str(path))))
  assert train.format_data(many, 10).endswith('% held out') and 'held_out' not in many.identity['sources'][0]


def test_too_little_says_what_would_do(tmp_path):
  config = config_of(tmp_path, text_file(tmp_path))
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, validation=0.002))
  with pytest.raises(config_lib.ConfigError, match=r'1 of 1 documents and 10 tokens of .*a.txt, one window takes train.seq_len \+ 1 '
                     r'= 33: .* raise data.validation from 0.002 to 0.01 \(of 5,001 tokens\), or set loop.eval_every=0'):
    Loader(config, 'validation')
  assert Loader(dataclasses.replace(config, data=dataclasses.replace(config.data, validation=0.01)), 'validation')
