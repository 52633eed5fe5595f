import hashlib
import json
import shutil

import numpy as np
import pytest

from lmscale.data import document
from lmscale.data.sources import megatron, megatron_source
from lmscale.data.tokenizer import ByteTokenizer
from lmscale.errors import ConfigError

DOCUMENTS = [[*b'one', 256], [*b'two two', 256], [], [*b'three', 256]]


class Other(ByteTokenizer):
  identity = 'other'


@pytest.fixture
def prefix(tmp_path):
  with megatron.Writer(tmp_path / 'mine', '<u2') as writer:
    for ids in DOCUMENTS:
      writer.add(np.array(ids, np.int64))
  return tmp_path / 'mine'


def open_store(prefix, tokenizer=None):
  return megatron_source.open_store(str(prefix), tokenizer or ByteTokenizer(), prefix.parent / 'cache')


def add_sidecar(prefix, tokenizer='bytes-v1'):
  texts = [bytes(ids[:-1]) for ids in DOCUMENTS]
  arrays = np.array([[document.split_key(text) for text in texts], [len(text) for text in texts]], np.uint64)
  np.save(f'{prefix}.documents.npy', arrays)
  hashes = {name: hashlib.sha256(prefix.with_name(f'mine.{ending}').read_bytes()).hexdigest()
            for name, ending in (('bin', 'bin'), ('idx', 'idx'), ('documents', 'documents.npy'))}
  meta = {'tokenizer': tokenizer, 'sha256': hashes}
  prefix.with_name('mine.meta.json').write_text(json.dumps(meta))
  return arrays


def test_documents_are_those_of_the_index(prefix):
  store = open_store(prefix)
  assert [store.tokens[a:b].tolist() for a, b in zip(store.offsets, store.offsets[1:], strict=False)] == DOCUMENTS
  assert store.split_keys.tolist() == [document.split_key(np.array(ids, '<i8').tobytes()) for ids in DOCUMENTS]
  assert store.text_bytes is None and isinstance(store.tokens, np.memmap) and not store.tokens.flags.writeable
  assert store.notices == (f'{prefix}: no .meta.json beside it says which tokenizer made it; check that it was data.tokenizer',)
  assert (store.files, store.size) == (2, sum(prefix.with_name(f'mine.{end}').stat().st_size for end in ('bin', 'idx')))
  again = open_store(prefix)
  assert np.array_equal(again.split_keys, store.split_keys) and again.identity == store.identity


def test_a_full_scan_is_made_once(prefix, monkeypatch):
  open_store(prefix)
  monkeypatch.setattr(document, 'split_key', None)
  open_store(prefix)
  shutil.rmtree(prefix.parent / 'cache')
  with pytest.raises(TypeError):
    open_store(prefix)


def test_what_a_scan_found_is_checked_and_never_that_of_other_files(prefix, monkeypatch, caplog):
  keys = open_store(prefix).split_keys
  kept, = (prefix.parent / 'cache' / 'megatron').glob('*/split_keys.npy')
  raw = kept.read_bytes()
  kept.write_bytes(raw[:-8] + bytes(8))
  assert np.array_equal(open_store(prefix).split_keys, keys) and kept.read_bytes() == raw
  assert caplog.messages == [f'{kept.parent} is damaged and built again: split_keys.npy changed']
  shutil.rmtree(prefix.parent / 'cache')
  real = document.split_key

  def changing(raw):
    prefix.with_name('mine.bin').write_bytes(bytes(prefix.with_name('mine.bin').stat().st_size))
    return real(raw)
  monkeypatch.setattr(document, 'split_key', changing)
  with pytest.raises(ConfigError, match='the .bin and .idx files changed while they were read'):
    open_store(prefix)
  assert list((prefix.parent / 'cache' / 'megatron').iterdir()) == []


@pytest.mark.parametrize(('ids', 'dtype', 'message'), [
  ([5, 257], '<u2', 'ids from 0 to 257, but data.tokenizer has the ids 0 to 256'),
  ([-1, 5], '<i4', 'ids from -1 to 5'),
  ([2**40], '<i8', 'ids from 0 to 1099511627776'),
])
def test_ids_the_tokenizer_has_not_are_rejected(tmp_path, ids, dtype, message):
  with megatron.Writer(tmp_path / 'a', dtype) as writer:
    writer.add(np.array(ids))
  with pytest.raises(ConfigError, match=message):
    open_store(tmp_path / 'a')


def test_floats_are_no_ids(tmp_path):
  with megatron.Writer(tmp_path / 'a', '<f4') as writer:
    writer.add(np.array([1.0]))
  with pytest.raises(ConfigError, match='tokens of float32 are no ids'):
    open_store(tmp_path / 'a')


def test_the_sidecar_brings_split_and_text_bytes(prefix):
  bare = open_store(prefix)
  arrays = add_sidecar(prefix)
  store = open_store(prefix)
  assert not store.notices
  assert store.split_keys.tolist() == arrays[0].tolist() and store.text_bytes.tolist() == [3, 7, 0, 5]
  assert store.identity != bare.identity and store.content != bare.content


def test_another_tokenizer_is_refused(prefix):
  add_sidecar(prefix)
  with pytest.raises(ConfigError, match='made with the tokenizer bytes-v1, but data.tokenizer is other'):
    open_store(prefix, Other())


@pytest.mark.parametrize('damage', ['bin', 'idx', 'documents.npy'])
def test_a_sidecar_of_other_files_is_refused(prefix, damage):
  add_sidecar(prefix)
  path = prefix.with_name(f'mine.{damage}')
  raw = bytearray(path.read_bytes())
  if damage == 'idx':
    megatron.write_index(prefix, '<u2', np.array([4, 8, 0, 6]), np.array([0, 1, 4]))
  else:
    raw[-4] ^= 1
    path.write_bytes(raw)
  with pytest.raises(ConfigError, match=rf'mine.meta.json: belongs to other files: \.{damage} has changed'):
    open_store(prefix)


@pytest.mark.parametrize('text', ['', '[]', '{}', '{"tokenizer": "bytes-v1", "sha256": {}}', '{"tokenizer": 3, "sha256": "x"}'])
def test_a_damaged_sidecar_is_refused(prefix, text):
  add_sidecar(prefix)
  prefix.with_name('mine.meta.json').write_text(text)
  with pytest.raises(ConfigError, match=r'mine\.meta\.json: (damaged|belongs to other)'):
    open_store(prefix)
  prefix.with_name('mine.meta.json').unlink()
  open_store(prefix)


def test_an_empty_path_is_a_config_error(tmp_path):
  for path in ('', 'a\0b', str(tmp_path)):
    with pytest.raises(ConfigError):
      megatron_source.open_store(path, ByteTokenizer(), tmp_path)
