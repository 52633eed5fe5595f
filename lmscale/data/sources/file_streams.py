"""Files as streams: decompressed and decoded on the way, cut into lines.

Memory is bounded whatever a file holds: blocks of it are read, `.gz` and `.zst` are decompressed a little at a time, and
a line longer than `MAX_LINE` is given up. Whether a file is compressed is told by its first bytes.
"""

import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from lmscale.data.file_digest import unreadable
from lmscale.data.optional_packages import need
from lmscale.data.reading_notes import Notes
from lmscale.data.sources import encoding
from lmscale.errors import ConfigError

BLOCK = 1 << 20  # bytes read at a time from a plain file
GZIP_INPUT, ZSTD_INPUT = 1 << 14, 1 << 11  # compressed bytes decoded at a time: at most 16 and 64 MiB come out
ZSTD_WINDOW = 1 << 31  # bytes; the largest that `zstd --long=31` makes
MAX_LINE = 1 << 28  # bytes of one line held in memory
BOMB_RATIO, BOMB_BYTES = 200, 1 << 30  # an archive that grows beyond both is refused; text grows 3 to 20 times
GZIP, ZSTD = b'\x1f\x8b', b'\x28\xb5\x2f\xfd'
ZSTD_SKIPPED = b'\x2a\x4d\x18'  # behind a byte 0x50 to 0x5f: a frame of other data, with which pzstd begins


class Damaged(ValueError):
  """A file stops giving bytes before its end."""


def blocks(path: pathlib.Path) -> Iterator[bytes]:
  """The content in blocks, decompressed. Raises Damaged where a compressed file breaks off, ConfigError if unreadable."""
  try:
    with path.open('rb') as file:
      start = file.read(4)
      file.seek(0)
      if start.startswith(GZIP):
        yield from _limited(_decompressed(file, lambda: zlib.decompressobj(31), GZIP_INPUT, zlib.error), path)
      elif start.startswith(ZSTD) or (start[1:] == ZSTD_SKIPPED and start[0] >> 4 == 5):
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


def lines(path: pathlib.Path, notes: Notes) -> Iterator[tuple[int, bytes | None]]:
  """(line number from 1, line as UTF-8 without its end) of the lines that are not blank; None for one longer than `MAX_LINE`.

  Raises:
    ConfigError: the file cannot be read or is no text, or an archive breaks off: then after its last whole line.
  """
  number, parts, size = 1, [], 0

  def line() -> bytes | None:
    return None if size > MAX_LINE else b''.join(parts).removeprefix(encoding.BOM if number == 1 else b'')

  try:
    for block in encoding.utf8_blocks(blocks(path), path, notes):
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
