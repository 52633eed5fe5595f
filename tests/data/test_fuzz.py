"""Damaged files of every kind: a reader says so in one line, or gives what is there. Never a crash, a hang, or lost text."""

import gzip
import json
import os
import shutil
import threading

import hypothesis
import hypothesis.strategies as st
import made
import numpy as np
import pytest
import zstandard

from lmscale.data import document, token_cache
from lmscale.data.reading_notes import Notes
from lmscale.data.sources import encoding, file_streams, megatron, megatron_source, text_files
from lmscale.data.sources.tfds_source import TfdsSource
from lmscale.data.tokenizer import ByteTokenizer, get_tokenizer
from lmscale.errors import ConfigError

SETTINGS = hypothesis.settings(deadline=None, max_examples=60,
                               suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture,
                                                      hypothesis.HealthCheck.too_slow])
SECONDS = 300


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
  monkeypatch.setattr(os, 'fsync', lambda descriptor: None)


@pytest.fixture(autouse=True)
def no_hang():
  """A hang inside a library cannot be interrupted, but it can be told."""
  def tell():
    os.write(2, b'\nfuzzing: a reader hangs\n')
    os._exit(70)
  timer = threading.Timer(SECONDS, tell)
  timer.start()
  yield
  timer.cancel()


@st.composite
def damage(draw, raw):
  """`raw` after one to three of: bytes changed, cut out, put in, doubled, or all the rest cut off."""
  raw = bytearray(raw)
  for _ in range(draw(st.integers(1, 3))):
    at = draw(st.integers(0, max(len(raw) - 1, 0)))
    size = draw(st.integers(1, 12))
    kind = draw(st.sampled_from(['change', 'flip', 'cut', 'insert', 'double', 'truncate']))
    if kind == 'change':
      raw[at:at + size] = draw(st.binary(min_size=size, max_size=size))
    elif kind == 'flip' and raw:
      raw[at] ^= 1 << draw(st.integers(0, 7))
    elif kind == 'cut':
      del raw[at:at + size]
    elif kind == 'insert':
      raw[at:at] = draw(st.binary(max_size=size))
    elif kind == 'double':
      raw[at:at] = raw[at:at + size]
    else:
      del raw[at:]
  return bytes(raw)


def one_line(error):
  message = str(error.value)
  assert message and '\n' not in message and len(message) < 1000
  return message


DOCUMENTS = [[*b'one', 256], [*b'two two', 256], [256], [*b'three', 256]]


def make_pair(folder):
  with megatron.Writer(folder / 'a', '<u2') as writer:
    for ids in DOCUMENTS:
      writer.add(np.array(ids))
  return [(folder / f'a{ending}').read_bytes() for ending in ('.idx', '.bin')]


@SETTINGS
@hypothesis.given(data=st.data())
def test_megatron_pair(tmp_path, data):
  folder = tmp_path / 'pair'
  folder.mkdir(exist_ok=True)
  raw = make_pair(folder)
  which = data.draw(st.integers(0, 1))
  broken = data.draw(damage(raw[which]))
  (folder / ('a.idx', 'a.bin')[which]).write_bytes(broken)
  try:
    store = megatron_source.open_store(str(folder / 'a'), ByteTokenizer(), tmp_path / 'cache')
  except ConfigError as error:
    assert '\n' not in str(error)
    return
  assert len(store.tokens) * store.tokens.dtype.itemsize == (folder / 'a.bin').stat().st_size
  assert store.offsets[0] == 0 and store.offsets[-1] == len(store.tokens) and (np.diff(store.offsets) >= 0).all()
  assert len(store.tokens) == 0 or 0 <= store.tokens.min() and store.tokens.max() < 257
  found = [store.tokens[a:b].tolist() for a, b in zip(store.offsets, store.offsets[1:], strict=False)]
  assert [i for ids in found for i in ids] == store.tokens.tolist()
  if which == 0 and broken[34:] == raw[0][34:] and store.tokens.dtype == np.uint16:
    assert found == DOCUMENTS


@SETTINGS
@hypothesis.given(st.binary(max_size=200))
def test_megatron_index_of_noise(tmp_path, raw):
  (tmp_path / 'a.bin').write_bytes(b'')
  (tmp_path / 'a.idx').write_bytes(megatron.MAGIC + raw)
  with pytest.raises(ConfigError) as error:
    megatron.read_index(tmp_path / 'a')
    raise ConfigError('an index of no sequence is right')
  one_line(error)


RECORDS = [json.dumps({'text': f'line {i} ü', 'meta': {'n': i}}).encode() for i in range(6)]
PACKED = {'.jsonl': bytes, '.jsonl.gz': lambda raw: gzip.compress(raw, mtime=0),
          '.jsonl.zst': zstandard.ZstdCompressor(write_checksum=True).compress}


def reference(line):
  """The text of a line, by other means than `text._parse`; None where it gives none."""
  try:
    pairs = json.loads(line.decode('utf-8', 'replace'), object_pairs_hook=lambda pairs: ('object', pairs))
  except (ValueError, RecursionError):
    return None
  if not (isinstance(pairs, tuple) and pairs[0] == 'object'):
    return None
  found = [value for key, value in pairs[1] if key == 'text']
  if len(found) != 1 or not isinstance(found[0], str):
    return None
  return found[0].encode('utf-8', 'replace') if found[0].isascii() else ''.join(
    '\ufffd' if '\ud800' <= c <= '\udfff' else c for c in found[0]).encode()


@SETTINGS
@hypothesis.given(data=st.data())
def test_jsonl(tmp_path, data):
  raw = data.draw(damage(b'\n'.join(RECORDS)))
  hypothesis.assume(not raw.startswith((file_streams.GZIP, file_streams.ZSTD, *encoding.MARKS, *(magic for magic, _, _ in encoding.MAGICS))))
  path = tmp_path / 'a.jsonl'
  path.write_bytes(raw)
  notes = Notes()
  found = [d.text for d in text_files.JsonlSource(str(path)).documents(notes)]
  lines = [line for line in raw.removeprefix(encoding.BOM).split(b'\n') if line.strip()]
  expected = [reference(line) for line in lines]
  assert found == [value for value in expected if value]
  assert len(notes.skipped) == expected.count(None)  # what gives no text is counted


@pytest.mark.parametrize('ending', ['.jsonl.gz', '.jsonl.zst'])
@SETTINGS
@hypothesis.given(data=st.data())
def test_archives(tmp_path, ending, data):
  raw = PACKED[ending](b'\n'.join(RECORDS))
  path = tmp_path / f'a{ending}'
  path.write_bytes(data.draw(damage(raw)))
  found, notes = [], Notes()
  try:
    for entry in text_files.JsonlSource(str(path)).documents(notes):
      found.append(entry.text)
  except ConfigError as error:
    assert str(path) in str(error) and '\n' not in str(error)
    return
  # Checksums leave only what does not matter: nothing, or whole archives one after the other.
  whole = [json.loads(line)['text'].encode() for line in RECORDS]
  assert not notes.skipped and found == whole * (len(found) // len(whole)) and found


@pytest.fixture(scope='module')
def tokenizers_raw(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tokenizers')
  names = made.make_bpe(folder / 'tokenizer.json'), made.make_sentencepiece(folder / 'spiece.model')
  return [(ending, open_bytes(name)) for ending, name in zip(('.json', '.model'), names, strict=True)]


def open_bytes(name):
  with open(name, 'rb') as file:
    return file.read()


@pytest.mark.parametrize('which', [0, 1], ids=['tokenizer.json', 'model'])
@SETTINGS
@hypothesis.given(data=st.data())
def test_tokenizer_file(tmp_path, tokenizers_raw, which, data):
  ending, raw = tokenizers_raw[which]
  path = tmp_path / f'a{ending}'
  path.write_bytes(data.draw(damage(raw)))
  try:
    tokenizer = get_tokenizer(str(path))
    ids = tokenizer.encode('def encode(self): the dog\n é \0')
    assert 0 <= tokenizer.end < tokenizer.size and (ids < tokenizer.size).all()
    assert isinstance(tokenizer.decode(range(tokenizer.size)), str)
  except ConfigError as error:
    assert str(error).startswith('data.tokenizer: ') and '\n' not in str(error)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  return made.prepare(tmp_path_factory.mktemp('tfds'))


def read(path):
  notes = Notes()
  return list(TfdsSource(str(path), 'train', 'text').documents(notes)), notes.skipped


@hypothesis.settings(SETTINGS, max_examples=40)
@hypothesis.given(data=st.data())
def test_tfds_folder(tmp_path, prepared, data):
  whole, _ = read(prepared)
  folder = tmp_path / 'copy'
  shutil.rmtree(folder, ignore_errors=True)
  shutil.copytree(prepared, folder)
  path = data.draw(st.sampled_from(sorted(p for p in folder.rglob('*') if p.is_file())))
  broken = data.draw(damage(path.read_bytes()))
  path.write_bytes(broken)
  try:
    found, skipped = read(folder)
  except ConfigError as error:
    assert '\n' not in str(error)
    return
  assert [d.text for d in found] == [d.text for d in whole] and not skipped


@SETTINGS
@hypothesis.given(data=st.data())
def test_token_cache(tmp_path, data):
  (tmp_path / 'a.txt').write_text('some text')
  source = text_files.TextSource(str(tmp_path / 'a.txt'))
  shutil.rmtree(tmp_path / 'tokens', ignore_errors=True)
  tokens = token_cache.tokenise(source, ByteTokenizer(), tmp_path).tokens.tolist()
  folder, = (tmp_path / 'tokens').iterdir()
  path = data.draw(st.sampled_from(sorted(folder.iterdir())))
  path.write_bytes(data.draw(damage(path.read_bytes())))
  first = token_cache.tokenise(source, ByteTokenizer(), tmp_path / 'other')
  again = token_cache.tokenise(source, ByteTokenizer(), tmp_path)
  assert again.identity == first.identity
  assert again.tokens.tolist() == tokens
  assert again.split_keys.tolist() == [document.split_key(b'some text')]
