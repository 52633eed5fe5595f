"""Hashes of files: of the whole, and of blocks with which damage is found. Each file is read once until it changes.

What was found out is kept per process, and below the cache if the file is large, under the file's state: size, times,
inode.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import platform
import time
import uuid
from collections.abc import Sequence
from typing import BinaryIO

from lmscale.errors import ConfigError

SETTLED = 2.0  # seconds: a file changed more recently may change again without its time telling
KEPT_FROM = 1 << 26  # bytes of a file of which it is worth keeping on disk what was found
BLOCK = 1 << 24  # bytes under one checksum

_known: dict[tuple, bytes] = {}


def unreadable(path: pathlib.Path, error: OSError) -> ConfigError:
  """The error for a file that the system does not let us read."""
  return ConfigError(f'data file {path}: cannot be read: {error.strerror}')


def digest(path: pathlib.Path, cache: pathlib.Path | None = None) -> bytes:
  """SHA-256 of the stored bytes. A file that has not changed is read once per process, and once at all below `cache`
  if it is large. Raises ConfigError if it cannot be read."""
  try:
    status = path.stat()
    if found := _recall(str(path.absolute()), status, cache):
      return found
    with path.open('rb') as file:
      found = hashlib.file_digest(file, 'sha256').digest()
  except OSError as error:
    raise unreadable(path, error) from error
  _remember(str(path.absolute()), status, cache, found)
  return found


class BlockWriter:
  """Writes a file; `checksums` are the SHA-256 of its blocks of `BLOCK` bytes, complete after `finish`."""

  def __init__(self, file: BinaryIO):
    self.checksums: list[str] = []
    self._file, self._hash, self._left = file, hashlib.sha256(), BLOCK

  def write(self, raw: bytes) -> None:
    """Appends bytes."""
    self._file.write(raw)
    view = memoryview(raw)
    while len(view) >= self._left:
      self._hash.update(view[: self._left])
      view = view[self._left :]
      self._end_block()
    self._hash.update(view)
    self._left -= len(view)

  def finish(self) -> None:
    """Ends the last block."""
    if self._left < BLOCK or not self.checksums:
      self._end_block()

  def _end_block(self) -> None:
    self.checksums.append(self._hash.hexdigest())
    self._hash, self._left = hashlib.sha256(), BLOCK


def check_blocks(path: pathlib.Path, checksums: Sequence[str], cache: pathlib.Path) -> None:
  """Compares a file with its blocks' checksums: always if it is small, else once until it changes, on each machine.

  Raises:
    ValueError: it is not what was written.
    OSError: it cannot be read.
  """
  status, expected = path.stat(), hashlib.sha256(' '.join(checksums).encode()).digest()
  name = f'{path.absolute()} on {platform.node()}'
  if status.st_size >= KEPT_FROM and _recall(name, status, cache) == expected:
    return
  if len(checksums) != max(1, -(-status.st_size // BLOCK)):
    raise ValueError(f'{path.name} has {status.st_size} bytes, which are not {len(checksums)} blocks')

  def read(number: int) -> str:
    with path.open('rb') as file:
      file.seek(number * BLOCK)
      return hashlib.sha256(file.read(BLOCK)).hexdigest()

  with concurrent.futures.ThreadPoolExecutor(min(len(checksums), os.cpu_count() or 1)) as pool:
    for number, found in enumerate(pool.map(read, range(len(checksums)))):
      if found != checksums[number]:
        raise ValueError(f'{path.name} changed in its bytes from {number * BLOCK:,} on')
  _remember(name, status, cache, expected)


def _state(name: str, status: os.stat_result) -> tuple:
  return (name, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _settled(status: os.stat_result) -> bool:
  return time.time() - max(status.st_mtime, status.st_ctime) > SETTLED


def _recall(name: str, status: os.stat_result, cache: pathlib.Path | None) -> bytes | None:
  """What was remembered about a file in this state."""
  state = _state(name, status)
  if not _settled(status):
    return None
  return _known.get(state) or (_read_note(cache, state) if status.st_size >= KEPT_FROM else None)


def _remember(name: str, status: os.stat_result, cache: pathlib.Path | None, found: bytes) -> None:
  """`status` is that from before the file was read."""
  state = _state(name, status)
  if _settled(status):
    _known[state] = found
    if status.st_size >= KEPT_FROM:
      _write_note(cache, state, found)


def _note(cache: pathlib.Path, state: tuple) -> pathlib.Path:
  return cache / 'digests' / f'{hashlib.sha256(state[0].encode(errors="surrogatepass")).hexdigest()[:32]}.json'


def _read_note(cache: pathlib.Path | None, state: tuple) -> bytes | None:
  try:
    note = json.loads(_note(cache, state).read_text()) if cache else {}
    return bytes.fromhex(note['sha256']) if note.get('of') == list(state) else None
  except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
    return None


def _write_note(cache: pathlib.Path | None, state: tuple, found: bytes) -> None:
  if cache is None:
    return
  note = _note(cache, state)
  temporary = note.with_suffix(f'.{uuid.uuid4().hex}')
  try:
    note.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps({'of': state, 'sha256': found.hex()}))
    os.replace(temporary, note)
  except (OSError, UnicodeError):  # only the time to read the file again is lost
    temporary.unlink(missing_ok=True)
