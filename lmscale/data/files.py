"""Files as streams: found by name, folder or glob, decompressed on the way, cut into lines, hashed once.

Memory is bounded whatever a file holds: blocks of it are read, `.gz` and `.zst` are decompressed a little at a time, and
a line longer than `MAX_LINE` is given up. Whether a file is compressed is told by its first bytes.
"""

import glob
import hashlib
import json
import os
import pathlib
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from lmscale.data.extras import need
from lmscale.errors import ConfigError

BLOCK = 1 << 20  # bytes read at a time from a plain file
GZIP_INPUT, ZSTD_INPUT = 1 << 14, 1 << 11  # compressed bytes decoded at a time: at most 16 and 64 MiB come out
ZSTD_WINDOW = 1 << 31  # bytes; the largest that `zstd --long=31` makes
MAX_LINE = 1 << 28  # bytes of one line held in memory
BOMB_RATIO, BOMB_BYTES = 200, 1 << 30  # an archive that grows beyond both is refused; text grows 3 to 20 times
GZIP, ZSTD = b'\x1f\x8b', b'\x28\xb5\x2f\xfd'
BOM = b'\xef\xbb\xbf'
SETTLED = 2.0  # seconds: a file changed more recently may change again without its time telling
KEPT_FROM = 1 << 26  # bytes of a file whose digest is worth keeping on disk

_digests: dict[tuple, bytes] = {}


class Damaged(ValueError):
  """A file stops giving bytes before its end."""


def find_files(path: str, suffix: str) -> list[pathlib.Path]:
  """Sorted files that `path` names: a file, a folder (every `suffix` file below, `.gz` and `.zst` too) or a glob.

  Raises:
    ConfigError: there is none.
  """
  root = pathlib.Path(path).expanduser()
  if not path:
    raise ConfigError('path: empty; give a file, a folder or a glob')
  if '\0' in path:
    raise ConfigError(f'path {path!r}: holds a NUL')
  if root.is_file():
    return [root]
  if root.is_dir():
    files = [p for p in root.rglob('*') if p.name.endswith((suffix, f'{suffix}.gz', f'{suffix}.zst')) and p.is_file()]
    problem = f'the folder has no *{suffix} file (nor *{suffix}.gz, *{suffix}.zst)'
  elif glob.has_magic(path):
    files = [p for p in map(pathlib.Path, glob.glob(str(root), recursive=True)) if p.is_file()]
    problem = 'the glob matches no file'
  else:
    files, problem = [], 'no such file or folder' if not root.exists() else 'neither a file nor a folder'
  if not files:
    raise ConfigError(f'path {path!r}: {problem}')
  return sorted(set(files))


def unreadable(path: pathlib.Path, error: OSError) -> ConfigError:
  """The error for a file that the system does not let us read."""
  return ConfigError(f'data file {path}: cannot be read: {error.strerror}')


def blocks(path: pathlib.Path) -> Iterator[bytes]:
  """The content in blocks, decompressed. Raises Damaged where a compressed file breaks off, ConfigError if unreadable."""
  try:
    with path.open('rb') as file:
      start = file.read(4)
      file.seek(0)
      if start.startswith(GZIP):
        yield from _limited(_decompressed(file, lambda: zlib.decompressobj(31), GZIP_INPUT, zlib.error), path)
      elif start.startswith(ZSTD):
        zstd = need('zstandard', f'data file {path}')
        make = zstd.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj
        yield from _limited(_decompressed(file, make, ZSTD_INPUT, zstd.ZstdError), path)
      elif path.suffix in ('.gz', '.zst'):
        raise Damaged(f'is no {path.suffix} archive: its first bytes are {start.hex(" ") or "missing"}')
      else:
        yield from iter(lambda: file.read(BLOCK), b'')
  except OSError as error:
    raise unreadable(path, error) from error


def _decompressed(file: BinaryIO, make: Callable[[], Any], size: int, failure: type[Exception]) -> Iterator[bytes]:
  """Members or frames one after the other, as `cat a.gz b.gz` makes them; zeros after the last are padding."""
  decoder = make()
  try:
    while raw := file.read(size):
      while raw:
        if decoder.eof:
          raw = raw.lstrip(b'\0')
          if not raw:
            break
          decoder = make()
        if text := decoder.decompress(raw):
          yield text
        raw = decoder.unused_data if decoder.eof else b''
  except failure as error:
    raise Damaged(f'the archive is damaged ({error})') from error
  if not decoder.eof:
    raise Damaged('the archive is truncated')


def _limited(parts: Iterator[bytes], path: pathlib.Path) -> Iterator[bytes]:
  limit, size = max(BOMB_BYTES, BOMB_RATIO * path.stat().st_size), 0
  for part in parts:
    size += len(part)
    if size > limit:
      raise Damaged(f'the archive of {path.stat().st_size:,} bytes unpacks to more than {limit:,}: unpack it yourself '
                    'if that is what it should do')
    yield part


def lines(path: pathlib.Path) -> Iterator[tuple[int, bytes | None]]:
  """(line number from 1, line without its end) of the lines that are not blank; None for one longer than `MAX_LINE`.

  Raises:
    ConfigError: the file cannot be read, or an archive breaks off: then after its last whole line.
  """
  number, parts, size = 1, [], 0

  def line() -> bytes | None:
    return None if size > MAX_LINE else b''.join(parts).removeprefix(BOM if number == 1 else b'')

  try:
    for block in blocks(path):
      for i, piece in enumerate(block.split(b'\n')):
        if i:
          whole = line()
          if whole is None or whole.strip():
            yield number, whole
          number, parts, size = number + 1, [], 0
        size += len(piece)
        parts = [*parts, piece] if size <= MAX_LINE else []
  except Damaged as error:
    raise ConfigError(f'data file {path}: {error}; its last whole line is line {number - 1}') from error
  whole = line()
  if whole is None or whole.strip():
    yield number, whole


def digest(path: pathlib.Path, cache: pathlib.Path | None = None) -> bytes:
  """SHA-256 of the stored bytes. A file that has not changed is read once per process, and once at all below `cache`
  if it is large. Raises ConfigError if it cannot be read."""
  try:
    status = path.stat()
    key = (str(path.absolute()), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    settled = time.time() - max(status.st_mtime, status.st_ctime) > SETTLED
    kept = cache if status.st_size >= KEPT_FROM else None
    if settled and (found := _digests.get(key) or _read_digest(kept, key)):
      return found
    with path.open('rb') as file:
      found = hashlib.file_digest(file, 'sha256').digest()
  except OSError as error:
    raise unreadable(path, error) from error
  if settled:
    _digests[key] = found
    _write_digest(kept, key, found)
  return found


def _note(cache: pathlib.Path, key: tuple) -> pathlib.Path:
  return cache / 'digests' / f'{hashlib.sha256(key[0].encode(errors="surrogatepass")).hexdigest()[:32]}.json'


def _read_digest(cache: pathlib.Path | None, key: tuple) -> bytes | None:
  try:
    note = json.loads(_note(cache, key).read_text()) if cache else {}
    return bytes.fromhex(note['sha256']) if note.get('of') == list(key) else None
  except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
    return None


def _write_digest(cache: pathlib.Path | None, key: tuple, found: bytes) -> None:
  if cache is None:
    return
  note = _note(cache, key)
  temporary = note.with_suffix(f'.{uuid.uuid4().hex}')
  try:
    note.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps({'of': key, 'sha256': found.hex()}))
    os.replace(temporary, note)
  except (OSError, UnicodeError):  # only the time to hash it again is lost
    temporary.unlink(missing_ok=True)
