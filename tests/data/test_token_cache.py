import json
import pathlib

import numpy as np
import pytest

from lmscale import config as config_lib
from lmscale.data import document, file_digest, token_cache
from lmscale.data.sources import opening
from lmscale.data.sources.text_files import JsonlSource, TextSource
from lmscale.data.tokenizer import ByteTokenizer


def write_files(folder, n=20):
  folder.mkdir(exist_ok=True)
  for i in range(n):
    (folder / f'{i:02}.txt').write_text(f'text {i}' * (i + 1))
  return folder


def open_store(folder, root):
  return token_cache.tokenise(TextSource(str(folder)), ByteTokenizer(), root)


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
  store = token_cache.tokenise(TextSource(str(write_files(tmp_path / 'text'))), Wide(), tmp_path / 'cache')
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


@pytest.mark.parametrize('damage', ['tokens.bin', 'offsets.npy', 'split_keys.npy', 'text_bytes.npy', 'meta.json', 'missing', 'bit',
                                    'zeros', 'one token', 'no checksums'])
def test_damage_is_found_told_and_repaired(tmp_path, damage, caplog):
  folder = write_files(tmp_path / 'text')
  whole = np.array(open_store(folder, tmp_path).tokens)
  stored, = (tmp_path / 'tokens').iterdir()
  if damage == 'missing':
    (stored / 'tokens.bin').unlink()
  elif damage == 'zeros':  # as a loss of power leaves it
    (stored / 'tokens.bin').write_bytes(bytes((stored / 'tokens.bin').stat().st_size))
  elif damage == 'one token':
    raw = bytearray((stored / 'tokens.bin').read_bytes())
    raw[-4] ^= 1
    (stored / 'tokens.bin').write_bytes(raw)
  elif damage == 'no checksums':  # as an earlier version wrote it
    meta = json.loads((stored / 'meta.json').read_text())
    del meta['blocks'], meta['self']
    (stored / 'meta.json').write_text(json.dumps({**meta, 'self': token_cache._hash(meta)}))
  elif damage == 'bit':
    raw = bytearray((stored / 'offsets.npy').read_bytes())
    raw[-20] ^= 1
    (stored / 'offsets.npy').write_bytes(raw)
  else:
    raw = (stored / damage).read_bytes()
    (stored / damage).write_bytes(raw[:len(raw) // 4 * 2])  # a whole number of tokens
  with pytest.raises((ValueError, KeyError, OSError)):
    token_cache._open(stored, tmp_path)
  caplog.clear()
  assert np.array_equal(open_store(folder, tmp_path).tokens, whole)
  assert [record.getMessage().partition(' is damaged and built again: ')[0] for record in caplog.records] == [str(stored)]
  token_cache._open(stored, tmp_path)


def test_what_was_odd_is_known_at_every_start(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'{"text": "one \xff"}\nbroken\n{"text": "two"}\n')
  for start in ('the text is tokenised', 'the cache is hit'):
    store = token_cache.tokenise(JsonlSource(str(path)), ByteTokenizer(), tmp_path)
    assert len(store.skipped) == 1 and f'{path}:2: broken JSON' in store.skipped[0]
    assert store.notices == (f'1 pieces of invalid UTF-8 became U+FFFD, the first in {path}:1',
                             f'1 lines give no text and are skipped: {path}:2: broken JSON (Expecting value)'), start


def test_too_many_broken_lines_leave_no_cache(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('broken\n' * 200)
  with pytest.raises(config_lib.ConfigError, match='a.jsonl:101: '):
    token_cache.tokenise(JsonlSource(str(path)), ByteTokenizer(), tmp_path)
  assert list((tmp_path / 'tokens').iterdir()) == []


def test_no_text_at_all_opens_as_empty(tmp_path):
  (tmp_path / 'a.txt').write_text('')
  store = open_store(tmp_path, tmp_path / 'cache')
  assert len(store.tokens) == 0 and store.offsets.tolist() == [0]


def test_meta_says_what_is_stored(tmp_path):
  store = open_store(write_files(tmp_path / 'text'), tmp_path)
  meta = json.loads((tmp_path / 'tokens' / f'{store.identity}-{token_cache.LAYOUT}' / 'meta.json').read_text())
  assert meta['tokens'] == len(store.tokens) and meta['documents'] == 20 and meta['tokenizer'] == 'bytes-v1'


def test_unknown_kind_is_a_config_error(tmp_path):
  with pytest.raises(config_lib.ConfigError, match="'parquet'.*stdlib, text, jsonl, megatron, tfds"):
    opening.open_source(config_lib.SourceConfig(kind='parquet'), tmp_path)


class Ids:
  """A source that comes tokenised."""

  def __init__(self, *ids):
    self.ids = [np.array(document, np.int64) for document in ids]

  def digest(self):
    return repr(self.ids)

  def documents(self, notes):
    return [document.Document(b'', i, ids) for i, ids in enumerate(self.ids)]


def test_documents_that_come_tokenised(tmp_path):
  store = token_cache.tokenise(Ids([0, 255], [7, 256], [256]), ByteTokenizer(), tmp_path)
  assert store.tokens.tolist() == [0, 255, 256, 7, 256, 256] and store.offsets.tolist() == [0, 3, 5, 6]
  assert store.text_bytes is None
  for ids in ([257], [-1, 5], [2**40]):
    with pytest.raises(config_lib.ConfigError, match=f'ids from {min(ids)} to {max(ids)}, but data.tokenizer has the ids 0 to 256'):
      token_cache.tokenise(Ids([1], ids), ByteTokenizer(), tmp_path)


def test_batches_hold_every_document_in_order(tmp_path, monkeypatch):
  whole = open_store(write_files(tmp_path / 'text'), tmp_path / 'one')
  monkeypatch.setattr(token_cache, 'BATCH_DOCUMENTS', 3)
  monkeypatch.setattr(token_cache, 'BATCH_BYTES', 40)
  parts = open_store(tmp_path / 'text', tmp_path / 'two')
  assert np.array_equal(whole.tokens, parts.tokens) and np.array_equal(whole.offsets, parts.offsets)
  assert parts.text_bytes.tolist() == [len(f'text {i}' * (i + 1)) for i in range(20)]


class Growing(TextSource):
  """Somebody else still writes the first file."""

  def documents(self, notes):
    for found in super().documents(notes):
      with self.files[0].open('a') as file:
        file.write('more')
      yield found


class Replaced(TextSource):
  """Somebody changes a file that was read, to a text of the same length."""

  def documents(self, notes):
    yield from super().documents(notes)
    self.files[1].write_text('TEXT 1' * 2)


@pytest.mark.parametrize(('kind', 'name'), [(Growing, '00.txt'), (Replaced, '01.txt')])
def test_a_source_that_changes_while_it_is_read_leaves_nothing(tmp_path, kind, name):
  folder = write_files(tmp_path / 'text', 3)
  with pytest.raises(config_lib.ConfigError, match=rf'text/{name} changed while it was read.*nothing of it was kept') as caught:
    token_cache.tokenise(kind(str(folder)), ByteTokenizer(), tmp_path / 'cache')
  assert '\n' not in str(caught.value) and list((tmp_path / 'cache' / 'tokens').iterdir()) == []
  now = b''.join(path.read_bytes() + b'|' for path in sorted(folder.iterdir()))
  tokens = open_store(folder, tmp_path / 'cache').tokens
  assert bytes(np.where(tokens == 256, ord('|'), tokens).astype(np.uint8)) == now  # the next start reads what is there then


def test_a_cache_that_is_only_read_serves(tmp_path, monkeypatch):
  """A shared cache of somebody else's: nothing can be written, not even that it was checked."""
  folder = write_files(tmp_path / 'text')
  whole = np.array(open_store(folder, tmp_path / 'cache').tokens)
  monkeypatch.setattr(file_digest, 'SETTLED', -1.0)
  monkeypatch.setattr(file_digest, 'KEPT_FROM', 1)

  def refuse(*args, **kwargs):
    raise PermissionError(13, 'Permission denied')
  for name in ('mkdir', 'rename', 'write_text', 'write_bytes'):
    monkeypatch.setattr(pathlib.Path, name, refuse)
  assert np.array_equal(open_store(folder, tmp_path / 'cache').tokens, whole)


def test_content_names_the_decoding_of_what_is_not_utf_8(tmp_path):
  """An earlier version read the same bytes as other text: a run that goes on must be told."""
  (tmp_path / 'a.txt').write_bytes('some text'.encode('utf-16'))
  (tmp_path / 'b.txt').write_bytes(b'some text')
  first, other = (open_store(tmp_path / name, tmp_path / 'cache') for name in ('a.txt', 'b.txt'))
  assert first.tokens.tolist() == other.tokens.tolist()
  assert first.content == TextSource(str(tmp_path / 'a.txt')).digest() + ' decoded'
  assert other.content == TextSource(str(tmp_path / 'b.txt')).digest()
  assert (first.files, first.size) == (1, 20)
