"""Bytes to UTF-8: byte order marks are obeyed, what is no text is refused by name, what is damaged is counted.

A text without a mark is UTF-8. Invalid pieces become U+FFFD and are counted; where they and NULs are more than
`MAX_BAD` of the bytes (and more than `FEW` bytes), it is no damage but another encoding, or no text: an error.
"""

import codecs
import itertools
import pathlib
from collections.abc import Iterator

from lmscale.data import document
from lmscale.data.reading_notes import Notes
from lmscale.errors import ConfigError

MAX_BAD, FEW = 0.01, 64
START = 512  # bytes that tell what a file is
BOM = codecs.BOM_UTF8  # who cuts a file into lines or pieces takes it off the first
MARKS = {  # UTF-32's begins with UTF-16's
  codecs.BOM_UTF32_LE: 'utf-32-le',
  codecs.BOM_UTF32_BE: 'utf-32-be',
  codecs.BOM_UTF16_LE: 'utf-16-le',
  codecs.BOM_UTF16_BE: 'utf-16-be',
}
UNPACK = 'unpack it, or pack it as .gz or .zst'
CONVERT = 'convert it to JSON lines, for example with pandas and to_json(path, orient="records", lines=True)'
EXTRACT = 'extract its text first'
MAGICS = (
  (b'\xfd7zXZ\0', 'an xz archive', UNPACK),
  (b'BZh', 'a bzip2 archive', UNPACK),
  (b'PK\x03\x04', 'a zip archive', UNPACK),
  (b'PK\x05\x06', 'an empty zip archive', UNPACK),
  (b'PK\x07\x08', 'a zip archive', UNPACK),
  (b'7z\xbc\xaf\x27\x1c', 'a 7z archive', UNPACK),
  (b'Rar!\x1a\x07', 'a rar archive', UNPACK),
  (b'\x04\x22\x4d\x18', 'an lz4 archive', UNPACK),
  (b'\xff\x06\0\0sNaPpY', 'a snappy archive', UNPACK),
  (b'LZIP\x01', 'an lzip archive', UNPACK),
  (b'\x5d\0\0', 'an lzma archive', UNPACK),
  (b'\x1f\x9d', 'a .Z archive', UNPACK),
  (b'\x1f\x8b', 'a gzip archive in an archive', UNPACK),
  (b'\x28\xb5\x2f\xfd', 'a zstd archive in an archive', UNPACK),
  (b'PAR1', 'a parquet file', CONVERT),
  (b'ARROW1\0', 'an Arrow file', CONVERT),
  (b'FEA1', 'a Feather file', CONVERT),
  (b'\xff\xff\xff\xff', 'an Arrow stream', CONVERT),
  (b'Obj\x01', 'an Avro file', CONVERT),
  (b'ORC\x08', 'an ORC file', CONVERT),
  (b'\x89HDF\r\n\x1a\n', 'an HDF5 file', CONVERT),
  (b'\x93NUMPY', 'a NumPy array', CONVERT),
  (b'SQLite format 3\0', 'an SQLite data base', CONVERT),
  (b'MMIDIDX\0', 'the index of a Megatron data set', 'use kind megatron'),
  (b'%PDF-', 'a PDF', EXTRACT),
  (b'\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1', 'an old Office document', EXTRACT),
  (b'\x89PNG\r\n\x1a\n', 'an image', EXTRACT),
  (b'\xff\xd8\xff', 'an image', EXTRACT),
  (b'GIF87a', 'an image', EXTRACT),
  (b'GIF89a', 'an image', EXTRACT),
  (b'\x7fELF', 'a program', EXTRACT),
)
TAR, TAR_AT = b'ustar', 257


def _mark(error: UnicodeError) -> tuple[str, int]:
  return '\udfff', error.end  # no decoder gives a lone surrogate otherwise: they can be counted


codecs.register_error('lmscale-mark', _mark)


def refuse_binary(start: bytes, path: pathlib.Path) -> None:
  """Raises ConfigError where a file that begins with `start` is of a kind that is not text."""
  fitting = (kind for kind in MAGICS if start.startswith(kind[0]) and _is(kind[0], start, path))
  found = next(((name, advice) for _, name, advice in fitting), None)
  if start[TAR_AT:].startswith(TAR):
    found = 'a tar archive', UNPACK
  if found:
    raise ConfigError(f'data file {path}: is {found[0]}, not text: {found[1]}')


def _is(magic: bytes, start: bytes, path: pathlib.Path) -> bool:
  """Whether a file is what its magic says; some are letters that a text may begin with."""
  behind = start[len(magic) : len(magic) + 7]
  if magic == b'BZh':
    return behind[1:] in (b'1AY&SY', b'\x17\x72\x45\x38\x50\x90')
  if magic == b'\xff\xff\xff\xff':
    return behind[2:4] == b'\0\0'  # a length
  if magic in (b'PAR1', b'FEA1'):
    return any(byte < 9 or byte > 126 for byte in behind) or len(behind) > 4 and _end(path) == magic
  return True


def utf8_blocks(blocks: Iterator[bytes], path: pathlib.Path, notes: Notes) -> Iterator[bytes]:
  """The blocks of a file as UTF-8, which is not checked here. UTF-8's own mark is kept: see `BOM`.

  Raises:
    ConfigError: it is no text.
  """
  start, failure = b'', None
  try:
    for block in blocks:
      start += block
      if len(start) >= START:
        break
  except ValueError as error:  # what was whole is given first
    failure = error
  refuse_binary(start, path)
  mark, encoding = _marked(start)
  if encoding:
    notes.note_decoded(path)
    decode = codecs.getincrementaldecoder(encoding)('lmscale-mark').decode
  for block in itertools.chain([start[len(mark) :]], blocks):
    yield _encoded(decode(block), path, notes) if encoding else block
  if failure:
    raise failure
  if encoding:
    yield _encoded(decode(b'', True), path, notes)


def _marked(start: bytes) -> tuple[bytes, str]:
  """(byte order mark, encoding) of a text that is UTF-16 or UTF-32 by it."""
  return next(((mark, encoding) for mark, encoding in MARKS.items() if start.startswith(mark)), (b'', ''))


def _end(path: pathlib.Path) -> bytes:
  with path.open('rb') as file:
    file.seek(max(path.stat().st_size - 4, 0))
    return file.read(4)


def _encoded(text: str, place: object, notes: Notes) -> bytes:
  wrong = text.count('\udfff')
  notes.note_replaced(wrong, place)
  notes.note_bad(2 * wrong, place)
  return document.to_utf8(text)


def decoded(raw: bytes, place: object, notes: Notes) -> bytes:
  """A text that is known as a whole, by the same rules: UTF-8 without a mark, not checked here."""
  mark, encoding = _marked(raw)
  if not encoding and not raw.startswith(BOM):
    return raw
  notes.note_decoded(place)
  return _encoded(raw[len(mark) :].decode(encoding, 'lmscale-mark'), place, notes) if encoding else raw[len(BOM) :]


class Checked:
  """Checks UTF-8 and judges how much of a file, or of a part of it, is no text."""

  def __init__(self, place: object, notes: Notes):
    self.place, self.notes = place, notes
    self.size = self.bad = 0
    self._before = notes.bad  # what decoding replaces is noted there

  def text(self, raw: bytes, place: object) -> str:
    """`raw` as text; what is invalid becomes U+FFFD and is counted."""
    nul = raw.count(0)
    try:
      text, wrong = raw.decode(), 0
    except UnicodeDecodeError:
      text = raw.decode('utf-8', 'replace')
      pieces = text.count('\ufffd') - raw.count('\ufffd'.encode())
      wrong = len(raw) - len(text.encode()) + 3 * pieces
      self.notes.note_replaced(pieces, place)
    self.size += len(raw)
    self.notes.size += len(raw)
    self.notes.note_bad(nul + wrong, place)
    return text

  def judge(self) -> None:
    """Raises ConfigError where too much since the start is no text."""
    judge(self.size, self.notes.bad - self._before, self.place)


def judge(size: int, bad: int, place: object) -> None:
  """Raises ConfigError where `bad` of `size` bytes at `place` are more than damage."""
  if bad > FEW and bad > MAX_BAD * size:
    raise ConfigError(
      f'{place}: {bad:,} of {size:,} bytes are NUL or no UTF-8, {bad / size:.1%}, and {MAX_BAD:.0%} is the most that is '
      'taken for damage: it is in another encoding or no text; convert it, for example with iconv -f latin1 -t utf-8 '
      '(or -f utf-16le)'
    )
