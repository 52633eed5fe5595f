import hashlib
import os

import pytest

from lmscale.data import file_digest


def write(tmp_path, name, raw):
  (tmp_path / name).write_bytes(raw)
  return tmp_path / name


def old(path):
  os.utime(path, (1, 1))
  return path


def test_digests_are_kept_until_the_file_changes(tmp_path, monkeypatch):
  hashed = []
  real = hashlib.file_digest
  monkeypatch.setattr(hashlib, 'file_digest', lambda *args: hashed.append(1) or real(*args))
  monkeypatch.setattr(file_digest, 'SETTLED', -1.0)
  monkeypatch.setattr(file_digest, 'KEPT_FROM', 4)
  path = old(write(tmp_path, 'a', b'12345'))
  first = file_digest.digest(path, tmp_path)
  assert first == hashlib.sha256(b'12345').digest() and len(hashed) == 1
  assert file_digest.digest(path, tmp_path) == first and len(hashed) == 1
  file_digest._known.clear()  # as in another process
  assert file_digest.digest(path, tmp_path) == first and len(hashed) == 1
  assert file_digest.digest(path, None) == first
  note, = (tmp_path / 'digests').iterdir()
  path.write_bytes(b'54321')  # same size and modification time: the time of the change still tells
  old(path)
  assert file_digest.digest(path, tmp_path) == hashlib.sha256(b'54321').digest()
  for damage in (b'', b'[]', b'{"of": 3, "sha256": "zz"}', note.read_bytes().replace(b'sha256', b'sha')):
    note.write_bytes(damage)
    file_digest._known.clear()
    assert file_digest.digest(path, tmp_path) == hashlib.sha256(b'54321').digest()


def test_a_file_just_written_is_not_trusted_to_stay(tmp_path):
  path = write(tmp_path, 'a', b'1')
  file_digest.digest(path)
  assert not any(key[0] == str(path) for key in file_digest._known)


def checksums(path, raw, sizes=(7,)):
  with path.open('wb') as file:
    writer = file_digest.BlockWriter(file)
    at = 0
    while at < len(raw):
      for size in sizes:
        writer.write(raw[at:at + size])
        at += size
    writer.finish()
  return writer.checksums


@pytest.mark.parametrize('size', [0, 1, 15, 16, 17, 32, 100])
def test_checksums_are_those_of_the_blocks_however_they_were_written(tmp_path, monkeypatch, size):
  monkeypatch.setattr(file_digest, 'BLOCK', 16)
  raw = os.urandom(size)
  expected = [hashlib.sha256(raw[at:at + 16]).hexdigest() for at in range(0, max(size, 1), 16)]
  for sizes in ((1,), (7, 40), (16,), (1000,)):
    assert checksums(tmp_path / 'a', raw, sizes) == expected
    assert (tmp_path / 'a').read_bytes() == raw
    file_digest.check_blocks(tmp_path / 'a', expected, tmp_path)
  for at in range(size):
    (tmp_path / 'a').write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1:])
    with pytest.raises(ValueError, match=f'a changed in its bytes from {at // 16 * 16} on'):
      file_digest.check_blocks(tmp_path / 'a', expected, tmp_path)
  for other in (raw + b'x', raw[:-1], raw + raw):
    if other != raw:
      (tmp_path / 'a').write_bytes(other)
      with pytest.raises(ValueError, match=r'a (changed|has)'):
        file_digest.check_blocks(tmp_path / 'a', expected, tmp_path)


def test_blocks_are_checked_once_per_state_and_machine(tmp_path, monkeypatch):
  monkeypatch.setattr(file_digest, 'SETTLED', -1.0)
  monkeypatch.setattr(file_digest, 'KEPT_FROM', 4)
  path = tmp_path / 'a'
  found = checksums(path, b'12345')
  made = []
  real = hashlib.sha256
  monkeypatch.setattr(file_digest.hashlib, 'sha256', lambda raw=b'': made.append(raw) or real(raw))
  reads = lambda: made.count(b'12345')
  file_digest.check_blocks(path, found, tmp_path)
  file_digest.check_blocks(path, found, tmp_path)
  file_digest._known.clear()  # as in another process
  file_digest.check_blocks(path, found, tmp_path)
  assert reads() == 1
  monkeypatch.setattr(file_digest.platform, 'node', lambda: 'another machine')
  file_digest.check_blocks(path, found, tmp_path)
  assert reads() == 2
  monkeypatch.setattr(file_digest, 'KEPT_FROM', 6)  # a small file is read at every start
  file_digest.check_blocks(path, found, tmp_path)
  assert reads() == 3
  monkeypatch.setattr(file_digest, 'KEPT_FROM', 4)
  path.write_bytes(bytes(5))  # zeros of the right length
  with pytest.raises(ValueError, match='a changed'):
    file_digest.check_blocks(path, found, tmp_path)
