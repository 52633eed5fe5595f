import dataclasses
import gzip
import hashlib
import json
import subprocess
import sys

import made
import numpy as np
import pytest

from lmscale import config as config_lib
from lmscale.data import document, entropy, file_digest
from lmscale.data import loader as loader_lib
from lmscale.data.loader import Loader
from lmscale.data.sources import megatron, stdlib
from lmscale.data.tokenizer import get_tokenizer
from lmscale.train.resume import check_identity

SEQ_LEN = 32
DATA_KEYS = {'tokens', 'labels', 'segment_ids', 'positions'}


@pytest.fixture
def config(tmp_path):
  """Two sources, `a` of plain text in upper case and `b` of JSON lines in lower case, weights 3 to 1."""
  rng = np.random.default_rng(0)
  (tmp_path / 'a').mkdir()
  for i in range(40):
    (tmp_path / 'a' / f'{i}.txt').write_bytes(bytes(rng.integers(65, 91, 20 + 5 * i, np.uint8)))
  with (tmp_path / 'b.jsonl').open('w') as file:
    for _ in range(40):
      file.write(json.dumps({'text': bytes(rng.integers(97, 123, rng.integers(1, 99), np.uint8)).decode()}) + '\n')
  sources = (config_lib.SourceConfig('a', 'text', str(tmp_path / 'a'), 3.0),
             config_lib.SourceConfig('b', 'jsonl', str(tmp_path / 'b.jsonl'), 1.0))
  data = config_lib.DataConfig(sources=sources, cache=str(tmp_path / 'cache'), validation=0.2)
  return config_lib.Config(seed=1, train=config_lib.TrainConfig(seq_len=SEQ_LEN), data=data)


def change(config, **fields):
  return dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))


def equal(a, b):
  return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_batch_form(config):
  batch = Loader(config).batch(5, range(6))
  assert set(batch) == DATA_KEYS
  for array in batch.values():
    assert array.shape == (6, SEQ_LEN) and array.dtype == np.int32
  assert equal(batch, Loader(config).batch(5, slice(0, 6))) and equal(batch, Loader(config).batch(0, range(5, 11)))
  assert Loader(config).batch(0, range(0))['tokens'].shape == (0, SEQ_LEN)


@pytest.mark.parametrize('hosts', [1, 2, 4])
@pytest.mark.parametrize('split', ['train', 'validation'])
def test_hosts_see_one_global_batch(config, hosts, split):
  whole = [Loader(config, split).batch(first, slice(0, 8)) for first in range(0, 64, 8)]
  loaders = [Loader(config, split) for _ in range(hosts)]
  for step in reversed(range(8)):  # another order of access, and a fresh loader for each host
    rows = 8 // hosts
    parts = [loader.batch(8 * step, slice(h * rows, (h + 1) * rows)) for h, loader in enumerate(loaders)]
    assert equal({key: np.concatenate([part[key] for part in parts]) for key in DATA_KEYS}, whole[step])


def test_another_process_gives_the_same_batch_and_identity(config, tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(dataclasses.asdict(config)))
  program = f"""
import json, pathlib, dataclasses, hashlib
from lmscale import config as c
from lmscale.data.loader import Loader
raw = json.loads(pathlib.Path({str(tmp_path / 'config.json')!r}).read_text())
data = raw['data'] | {{'sources': tuple(c.SourceConfig(**s) for s in raw['data']['sources'])}}
loader = Loader(c.Config(seed=raw['seed'], train=c.TrainConfig(seq_len=raw['train']['seq_len']),
                         data=c.DataConfig(**data)))
print(json.dumps(loader.identity), hashlib.sha256(loader.batch(100, range(16))['tokens'].tobytes()).hexdigest())
"""
  outputs = {subprocess.run([sys.executable, '-c', program], check=True, capture_output=True, text=True).stdout
             for _ in range(2)}
  loader = Loader(config)
  tokens = loader.batch(100, range(16))['tokens']
  assert outputs == {f'{json.dumps(loader.identity)} {hashlib.sha256(tokens.tobytes()).hexdigest()}\n'}


def test_seeds_differ_in_training_but_not_in_validation(config):
  other = dataclasses.replace(config, seed=2)
  assert not equal(Loader(config).batch(0, range(16)), Loader(other).batch(0, range(16)))
  assert equal(Loader(config, 'validation').batch(0, range(16)), Loader(other, 'validation').batch(0, range(16)))


def test_splits_hold_the_documents_of_their_side(config, tmp_path):
  texts = [path.read_bytes() for path in (tmp_path / 'a').iterdir()]
  texts += [json.loads(line)['text'].encode() for line in (tmp_path / 'b.jsonl').read_text().splitlines()]
  for split in ('train', 'validation'):
    expected = b'|'.join(text for text in texts if document.split_of(text, 0.2) == split)
    loader = Loader(config, split)
    batch = loader.batch(0, range(loader.samples_per_epoch * 3))
    for tokens, segments in zip(batch['tokens'], batch['segment_ids'], strict=True):
      for segment in range(1, segments.max() + 1):
        piece = tokens[segments == segment]
        assert bytes(piece[piece < 256].tolist()) in expected


def test_blend_counts_epochs_and_summary(config):
  loader = Loader(config)
  samples = 1024
  is_a = loader.batch(0, range(samples))['tokens']
  upper = ((is_a < 97).sum(axis=1) > SEQ_LEN / 2).sum()
  assert abs(upper - 0.75 * samples) < 1
  windows = {sampler.name: sampler.windows_per_epoch for sampler in loader.samplers}
  assert loader.epochs(samples) == {'a': 768 / windows['a'], 'b': 256 / windows['b']}
  assert loader.samples_per_epoch == sum(windows.values())
  train, held_out = loader.summary(), Loader(config, 'validation').summary()
  for a, b in zip(train, held_out, strict=True):
    assert a['documents'] + b['documents'] == 40 and a['weight'] == b['weight']
  assert [entry['name'] for entry in train] == ['a', 'b'] and [entry['weight'] for entry in train] == [0.75, 0.25]
  assert train[0]['tokens'] + held_out[0]['tokens'] == sum(20 + 5 * i + 1 for i in range(40))


def test_identity_names_everything_a_sample_depends_on(config, tmp_path):
  first = Loader(config).identity
  assert Loader(config).identity == first
  assert Loader(change(config, cache=str(tmp_path / 'other'))).identity == first
  others = [
    dataclasses.replace(config, seed=2),
    dataclasses.replace(config, train=dataclasses.replace(config.train, seq_len=16)),
    change(config, validation=0.3),
    change(config, sources=config.data.sources[::-1]),
    change(config, sources=(config.data.sources[0], dataclasses.replace(config.data.sources[1], weight=2.0))),
    change(config, sources=(config.data.sources[0], dataclasses.replace(config.data.sources[1], name='c'))),
  ]
  found = [Loader(other).identity for other in others] + [Loader(config, 'validation').identity, first]
  found = {json.dumps(identity) for identity in found}
  assert len(found) == len(others) + 2
  (tmp_path / 'a' / '0.txt').write_text('changed')
  assert Loader(config).identity != first


def test_sources_of_weight_zero_are_not_opened(config):
  missing = config_lib.SourceConfig('c', 'text', '/missing', 0.0)
  assert [entry['name'] for entry in Loader(change(config, sources=(*config.data.sources, missing))).summary()] == [
    'a', 'b']


def test_user_errors(config):
  for broken, message in [
      (change(config, tokenizer='bpe'), 'data.tokenizer'),
      (change(config, tokenizer='/missing.json'), 'data.tokenizer: /missing.json: No such file'),
      (change(config, sources=()), 'data.sources'),
      (change(config, sources=(config_lib.SourceConfig('x', 'text', '/missing'),)), '/missing'),
      (dataclasses.replace(config, train=dataclasses.replace(config.train, seq_len=10**6)), 'train.seq_len'),
      (dataclasses.replace(config, model=dataclasses.replace(config.model, vocab=256)), 'model.vocab: 256 rows.*257'),
  ]:
    with pytest.raises(config_lib.ConfigError, match=message) as caught:
      Loader(broken)
    assert '\n' not in str(caught.value)
  with pytest.raises(config_lib.ConfigError, match="'a': its validation split has 0 of 40 documents"):
    Loader(change(config, validation=0.0), 'validation')


def test_order1_entropy_is_that_of_the_blend(config):
  loader = Loader(config)
  assert loader.vocab == 257
  assert Loader(config, 'validation').order1_entropy() == loader.order1_entropy()
  single = [Loader(change(config, sources=(source,))).order1_entropy() for source in config.data.sources]
  # The two alphabets share no letter, so a byte tells its source: the blend's entropy is the mean.
  assert loader.order1_entropy() == pytest.approx(0.75 * single[0] + 0.25 * single[1], rel=1e-9)
  assert single[0] == pytest.approx(entropy.order1_entropy(loader.stores[0].tokens, 257, end=256))


def test_standard_library_through_the_loader(config, monkeypatch):
  listed = stdlib.stdlib_files
  monkeypatch.setattr(stdlib, 'stdlib_files', lambda root: [p for p in listed(root) if p.parent.name == 'json'])
  sources = tuple(config_lib.SourceConfig(name, 'stdlib', name, 1.0) for name in stdlib.STREAMS)
  loader = Loader(change(config, sources=sources, validation=0.0))
  batch = loader.batch(0, range(64))
  assert [entry['documents'] for entry in loader.summary()] == [5, 5]
  assert bytes(loader.stores[0].tokens[:4].tolist()) == b'r"""'
  assert (batch['segment_ids'] >= 1).all()


# Sampling weights of MT-NLG's fifteen sets in percent, in the order of its data table (arXiv 2201.11990).
MT_NLG = [14.3, 19.3, 5.7, 2.9, 4.8, 0.9, 1.0, 0.2, 9.4, 1.4, 1.6, 13.0, 15.7, 9.0, 0.9]


def test_the_fifteen_weights_of_mt_nlg(config, tmp_path):
  """The share of each source in what the loader gives: exact at the ends of blocks, within sampling error in between."""
  sources = []
  for i, weight in enumerate(MT_NLG):
    path = tmp_path / f'{i}.jsonl'
    path.write_text(f'{json.dumps({"text": chr(97 + i) * 50 * (i + 1)})}\n' * 4)  # 15 letters, and sizes that differ
    sources.append(config_lib.SourceConfig(chr(97 + i), 'jsonl', str(path), weight))
  loader = Loader(change(config, sources=tuple(sources), validation=0.0))
  shares = np.array(MT_NLG) / sum(MT_NLG)
  block = loader.blend.block
  first = loader.batch(0, range(2 * block))['tokens'].min(axis=1) - 97  # the smallest id of a row: its letter, not the end
  for samples in (block, 2 * block):
    counts = np.bincount(first[:samples], minlength=15)
    assert np.abs(counts - samples * shares).max() < 1
    epochs = loader.epochs(samples)
    assert epochs == {name: counts[i] / loader.samplers[i].windows_per_epoch for i, name in enumerate('abcdefghijklmno')}
  assert epochs['a'] > 1 > epochs['o']  # small sources are passed over several times
  half = np.bincount(first[:block // 2], minlength=15)
  assert (np.abs(half - block / 2 * shares) <= 1 + 4 * np.sqrt(block / 2 * shares * (1 - shares))).all()
  assert [entry['weight'] for entry in loader.summary()] == pytest.approx(shares.tolist())


@pytest.fixture(scope='module')
def bpe(tmp_path_factory):
  return made.make_bpe(tmp_path_factory.mktemp('bpe') / 'tokenizer.json')


def vocabulary(config, size):
  return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab=size))


def test_another_tokenizer_is_another_cache_and_is_told_on_resume(config, bpe):
  first, other = Loader(config), Loader(vocabulary(change(config, tokenizer=bpe), 320))
  assert other.vocab == 315 and other.tokenizer.identity == get_tokenizer(bpe).identity
  ids = other.stores[0].tokens[:other.stores[0].offsets[1] - 1]
  assert other.tokenizer.decode(ids) == first.tokenizer.decode(first.stores[0].tokens[:first.stores[0].offsets[1]])
  with pytest.raises(config_lib.ConfigError) as caught:
    check_identity(first.identity, other.identity, 'W')
  changed = str(caught.value).splitlines()[1:]
  assert changed == [f'  tokenizer: "bytes-v1" -> "{get_tokenizer(bpe).identity}"']
  with pytest.raises(config_lib.ConfigError, match='model.vocab: 264.*315'):
    Loader(change(config, tokenizer=bpe))


def test_the_end_of_documents_can_be_named(config, bpe):
  usual = Loader(vocabulary(change(config, tokenizer=bpe), 320))
  same = Loader(vocabulary(change(config, tokenizer=bpe, end_token='<|endoftext|>'), 320))
  other = Loader(vocabulary(change(config, tokenizer=bpe, end_token='<pad>'), 320))
  assert same.identity == usual.identity and same.stores[0].identity == usual.stores[0].identity
  assert other.identity['tokenizer'] == f'{usual.identity["tokenizer"]}:end=0'
  for loader, end in ((usual, 1), (other, 0)):
    store = loader.stores[0]
    assert (np.flatnonzero(store.tokens <= 1) == store.offsets[1:] - 1).all() and set(store.tokens[store.offsets[1:] - 1]) == {end}
  with pytest.raises(config_lib.ConfigError, match=r"data.end_token: it has no token '<pd>'; did you mean '<pad>'"):
    Loader(vocabulary(change(config, tokenizer=bpe, end_token='<pd>'), 320))


def test_bytes_per_token_are_those_of_the_samples(config, bpe):
  """Counted by decoding each predicted token; the documents' ends are predicted too and stand for no text."""
  for source, rel in ((config.data.sources, 0.03), (config.data.sources[:1], 0.03)):
    for tokenizer in ('bytes', bpe):
      loader = Loader(vocabulary(change(config, tokenizer=tokenizer, sources=source), 320), 'validation')
      samples = loader.samples_per_epoch
      labels = loader.batch(0, range(samples))['labels']
      labels = labels[labels >= 0]
      decoded = sum(len(loader.tokenizer.decode([i]).encode()) for i in labels)
      assert loader.bytes_per_token(samples) == pytest.approx(decoded / len(labels), rel=rel)
      assert loader.bytes_per_token(samples) == loader.bytes_per_token(samples)
  assert loader.bytes_per_token(0) is None


def test_bytes_per_token_are_exact_for_whole_documents(config, tmp_path):
  (tmp_path / 'one.txt').write_text('x' * 3 * SEQ_LEN)  # and its end: three windows of all its tokens but the first
  source = config_lib.SourceConfig('one', 'text', str(tmp_path / 'one.txt'))
  loader = Loader(change(config, sources=(source,), validation=0.0))
  assert loader.bytes_per_token(3) == pytest.approx(3 * SEQ_LEN / (3 * SEQ_LEN + 1), rel=1e-12)


def test_all_kinds_in_one_blend(config, tmp_path):
  with megatron.Writer(tmp_path / 'c', '<u2') as writer:
    for i in range(40):
      writer.add(np.array([*b'0123456789' * (i + 1), 256]))
  prepared = made.prepare(tmp_path / 'tfds')
  sources = (*config.data.sources, config_lib.SourceConfig('c', 'megatron', str(tmp_path / 'c.idx')),
             config_lib.SourceConfig('d', 'tfds', str(prepared), 1.0, 'tokens'))
  loader = Loader(change(config, sources=sources, validation=0.1))
  batch = loader.batch(0, range(600))
  digits = (batch['tokens'] >= 48) & (batch['tokens'] < 58)
  assert (digits.mean(axis=1) > 0.9).sum() == pytest.approx(100, abs=15)
  assert [entry['name'] for entry in loader.summary()] == ['a', 'b', 'c', 'd']
  assert Loader(change(config, sources=sources, validation=0.1)).identity == loader.identity
  assert loader.bytes_per_token(8) is None  # nobody knows the bytes behind c


def test_the_entropy_of_a_large_source_is_that_of_its_beginning(config, monkeypatch, caplog):
  loader = Loader(change(config, sources=config.data.sources[:1]))
  monkeypatch.setattr(loader_lib, 'ENTROPY_TOKENS', 500)
  assert loader.order1_entropy() == pytest.approx(entropy.order1_entropy(loader.stores[0].tokens[:500], 257, end=256))
  assert 'a: the order-1 entropy is that of its first 500 of 4,740 tokens' in caplog.text


def test_training_and_validation_hash_the_text_once(config, monkeypatch):
  hashed = []
  real = hashlib.file_digest
  monkeypatch.setattr(file_digest, 'SETTLED', -1.0)
  monkeypatch.setattr(hashlib, 'file_digest', lambda *args: hashed.append(1) or real(*args))
  Loader(config)
  assert len(hashed) == 41
  Loader(config, 'validation')
  assert len(hashed) == 41


def shown(loader, samples):
  """The rows of the first samples, without the segments' numbers."""
  return [row.tobytes() for row in loader.batch(0, range(samples))['tokens']]


def test_a_content_that_is_in_the_blend_twice_is_passed_over_in_two_orders_and_counted_as_one(config, tmp_path, caplog):
  """One file named twice, a copy of it, its archive, and the same texts in another form and order."""
  (tmp_path / 'copy.jsonl').write_bytes((tmp_path / 'b.jsonl').read_bytes())
  (tmp_path / 'c.jsonl.gz').write_bytes(gzip.compress((tmp_path / 'b.jsonl').read_bytes()))
  (tmp_path / 'texts').mkdir()
  for i, line in enumerate((tmp_path / 'b.jsonl').read_text().splitlines()):
    (tmp_path / 'texts' / f'{99 - i}.txt').write_text(json.loads(line)['text'])
  one = config.data.sources[1]
  others = {'named again': one.path, 'copied': 'copy.jsonl', 'packed': 'c.jsonl.gz', 'texts': 'texts'}
  alone = Loader(change(config, sources=(one,)))
  windows = alone.samples_per_epoch
  for name, path in others.items():
    other = config_lib.SourceConfig(name, 'text' if name == 'texts' else 'jsonl', str(tmp_path / path), 1.0)
    caplog.clear()
    loader = Loader(change(config, sources=(one, other)))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and f"'b' and '{name}'" in told[0] and 'the same' in told[0]
    assert [loader.samplers[0].sample(i)[0].tolist() for i in range(windows)] == [
      alone.samplers[0].sample(i)[0].tolist() for i in range(windows)]  # the first keeps its order
    assert len(set(shown(loader, 2 * windows))) > 1.4 * windows  # not every sample twice
    counts = loader.blend.counts(1000)
    assert loader.epochs(1000) == {'b': 1000 / windows, name: 1000 / windows} and counts.sum() == 1000
    assert loader.identity != alone.identity
    caplog.clear()
    Loader(change(config, sources=(one, other)), 'validation', tell=False)
    assert not caplog.records


def test_three_of_one_content_have_three_orders_and_distinct_sources_are_not_told(config, tmp_path, caplog):
  a, b = config.data.sources
  again = [dataclasses.replace(a, name=name, weight=weight) for name, weight in (('x', 1.0), ('y', 2.0))]
  loader = Loader(change(config, sources=(a, b, *again)))
  orders = [sampler.sample(0)[0].tolist() for sampler in loader.samplers]
  assert len({*map(tuple, orders)}) == 4
  counts = loader.blend.counts(700)
  together = (counts[0] + counts[2] + counts[3]) / loader.samplers[0].windows_per_epoch
  assert loader.epochs(700) == {'a': together, 'x': together, 'y': together, 'b': counts[1] / loader.samplers[1].windows_per_epoch}
  assert [entry.get('copy') for entry in loader.identity['sources']] == [None, None, 1, 2]
  assert len(caplog.records) == 2
  caplog.clear()
  assert [entry.keys() for entry in Loader(config).identity['sources']] == [{'name', 'weight', 'content'}] * 2
  assert not caplog.records


def test_the_order_of_distinct_sources_is_that_of_earlier_versions(config):
  """Resuming needs it: these are digests of what version 1 of the samples gave."""
  found = [hashlib.sha256(Loader(config, split).batch(0, range(64))['tokens'].tobytes()).hexdigest()[:16]
           for split in ('train', 'validation')]
  assert found == ['27644eb144441649', '2188abb5e1e5e7cf']


def test_notices_are_told_at_every_start_under_the_sources_name(config, tmp_path, caplog):
  with (tmp_path / 'b.jsonl').open('ab') as file:
    file.write(b'broken\n')
  (tmp_path / 'a' / '7.txt').write_bytes(b'\xff' + b'some more text')
  (tmp_path / 'a' / '7.txt.gz').write_bytes(gzip.compress(b'\xff' + b'some more text'))
  for start in ('the text is tokenised', 'the cache is hit'):
    caplog.clear()
    loader = Loader(config)
    Loader(config, 'validation', tell=False)
    assert [record.getMessage().replace(str(tmp_path), '.') for record in caplog.records] == [
      'a: 1 file with the text of another beside it, read once: the first is ./a/7.txt.gz, beside ./a/7.txt',
      'a: 1 pieces of invalid UTF-8 became U+FFFD, the first in ./a/7.txt',
      'b: 1 lines give no text and are skipped: ./b.jsonl:41: broken JSON (Expecting value)'], start
  assert [(entry['files'], entry['bytes']) for entry in loader.summary()] == [
    (40, sum(path.stat().st_size for path in (tmp_path / 'a').glob('*.txt'))), (1, (tmp_path / 'b.jsonl').stat().st_size)]
