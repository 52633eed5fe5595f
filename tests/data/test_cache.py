import json
import logging

import numpy as np
import pytest

from lmscale import config as config_lib
from lmscale.data import cache, document, source
from lmscale.data.text import JsonlSource, TextSource
from lmscale.data.tokenizer import ByteTokenizer


def write_files(folder, n=20):
  folder.mkdir(exist_ok=True)
  for i in range(n):
    (folder / f'{i:02}.txt').write_text(f'text {i}' * (i + 1))
  return folder


def open_store(folder, root):
  return cache.tokenise(TextSource(str(folder)), ByteTokenizer(), root)


def test_tokens_offsets_and_split(tmp_path):
  folder = write_files(tmp_path / 'text')
  store = open_store(folder, tmp_path / 'cache')
  assert store.tokens.dtype == np.dtype('<u2') and not store.tokens.flags.writeable
  texts = [path.read_bytes() for path in sorted(folder.iterdir())]
  for i, text in enumerate(texts):
    found = store.tokens[store.offsets[i]:store.offsets[i + 1]]
    assert found.tolist() == [*text, 256]
  assert len(store.tokens) == store.offsets[-1]
  for split in ('train', 'validation'):
    assert [texts[i] for i in store.documents(split, 0.4)] == [t for t in texts if document.split_of(t, 0.4) == split]
  assert len(store.documents('validation', 0.0)) == 0


def test_large_vocabularies_take_int32(tmp_path):
  class Wide(ByteTokenizer):
    identity, size, end = 'wide', 70000, 69999
  store = cache.tokenise(TextSource(str(write_files(tmp_path / 'text'))), Wide(), tmp_path / 'cache')
  assert store.tokens.dtype == np.dtype('<i4') and store.tokens[store.offsets[1] - 1] == 69999


def test_the_key_is_content_and_tokenizer(tmp_path, monkeypatch):
  first = open_store(write_files(tmp_path / 'a'), tmp_path)
  assert open_store(write_files(tmp_path / 'b'), tmp_path).identity == first.identity
  assert len(list((tmp_path / 'tokens').iterdir())) == 1
  monkeypatch.setattr(ByteTokenizer, 'identity', 'bytes-v2')
  assert open_store(tmp_path / 'a', tmp_path).identity != first.identity
  monkeypatch.undo()
  (tmp_path / 'a' / '00.txt').write_text('changed')
  assert open_store(tmp_path / 'a', tmp_path).identity != first.identity


@pytest.mark.parametrize('damage', ['tokens.bin', 'offsets.npy', 'split_keys.npy', 'meta.json', 'missing', 'bit'])
def test_damage_is_found_and_repaired(tmp_path, damage):
  folder = write_files(tmp_path / 'text')
  whole = np.array(open_store(folder, tmp_path).tokens)
  stored, = (tmp_path / 'tokens').iterdir()
  if damage == 'missing':
    (stored / 'tokens.bin').unlink()
  elif damage == 'bit':
    raw = bytearray((stored / 'offsets.npy').read_bytes())
    raw[-20] ^= 1
    (stored / 'offsets.npy').write_bytes(raw)
  else:
    raw = (stored / damage).read_bytes()
    (stored / damage).write_bytes(raw[:len(raw) // 4 * 2])  # a whole number of tokens
  with pytest.raises((ValueError, OSError)):
    cache._open(stored)
  assert np.array_equal(open_store(folder, tmp_path).tokens, whole)
  cache._open(stored)


def test_skipped_lines_are_kept_and_logged_once(tmp_path, caplog):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "one"}\nbroken\n{"text": "two"}\n')
  for _ in range(2):
    with caplog.at_level(logging.WARNING):
      store = cache.tokenise(JsonlSource(str(path)), ByteTokenizer(), tmp_path)
    assert len(store.skipped) == 1 and f'{path}:2: broken JSON' in store.skipped[0]
  assert len(caplog.records) == 1 and f'{path}:2' in caplog.text


def test_too_many_broken_lines_leave_no_cache(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('broken\n' * 200)
  with pytest.raises(config_lib.ConfigError, match='a.jsonl:101: '):
    cache.tokenise(JsonlSource(str(path)), ByteTokenizer(), tmp_path)
  assert list((tmp_path / 'tokens').iterdir()) == []


def test_no_text_at_all_opens_as_empty(tmp_path):
  (tmp_path / 'a.txt').write_text('')
  store = open_store(tmp_path, tmp_path / 'cache')
  assert len(store.tokens) == 0 and store.offsets.tolist() == [0]


def test_meta_says_what_is_stored(tmp_path):
  store = open_store(write_files(tmp_path / 'text'), tmp_path)
  meta = json.loads((tmp_path / 'tokens' / f'{store.identity}-{cache.LAYOUT}' / 'meta.json').read_text())
  assert meta['tokens'] == len(store.tokens) and meta['documents'] == 20 and meta['tokenizer'] == 'bytes-v1'


def test_unknown_kind_is_a_config_error(tmp_path):
  with pytest.raises(config_lib.ConfigError, match="'parquet'.*stdlib, text, jsonl, megatron, tfds"):
    source.open_source(config_lib.SourceConfig(kind='parquet'), tmp_path)


class Ids:
  """A source that comes tokenised."""

  def __init__(self, *ids):
    self.ids = [np.array(document, np.int64) for document in ids]

  def digest(self):
    return repr(self.ids)

  def documents(self, skipped):
    return [document.Document(b'', i, ids) for i, ids in enumerate(self.ids)]


def test_documents_that_come_tokenised(tmp_path):
  store = cache.tokenise(Ids([0, 255], [7, 256], [256]), ByteTokenizer(), tmp_path)
  assert store.tokens.tolist() == [0, 255, 256, 7, 256, 256] and store.offsets.tolist() == [0, 3, 5, 6]
  assert store.text_bytes is None
  for ids in ([257], [-1, 5], [2**40]):
    with pytest.raises(config_lib.ConfigError, match=f'ids from {min(ids)} to {max(ids)}, but data.tokenizer has the ids 0 to 256'):
      cache.tokenise(Ids([1], ids), ByteTokenizer(), tmp_path)


def test_batches_hold_every_document_in_order(tmp_path, monkeypatch):
  whole = open_store(write_files(tmp_path / 'text'), tmp_path / 'one')
  monkeypatch.setattr(cache, 'BATCH_DOCUMENTS', 3)
  monkeypatch.setattr(cache, 'BATCH_BYTES', 40)
  parts = open_store(tmp_path / 'text', tmp_path / 'two')
  assert np.array_equal(whole.tokens, parts.tokens) and np.array_equal(whole.offsets, parts.offsets)
  assert parts.text_bytes.tolist() == [len(f'text {i}' * (i + 1)) for i in range(20)]
