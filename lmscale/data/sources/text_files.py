"""Plain text files and JSONL as documents.

Policy for bad input: see `encoding.py` for what is no UTF-8; line ends and NUL are kept, an empty text is no document. A JSONL
line that gives no text is skipped and noted, up to `MAX_SKIPPED` per file. An archive that breaks off is an error after
its last whole line: no text is lost in silence.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterator

from lmscale.data import document, file_digest
from lmscale.data.reading_notes import Notes
from lmscale.data.sources import encoding, file_streams
from lmscale.data.sources.find_files import find_files
from lmscale.errors import ConfigError

MAX_SKIPPED = 100  # lines of one file
MAX_TEXT = 1 << 24  # bytes of a text file that are one document; a longer file is cut after line ends


class TextSource:
  """Plain text: one document per file, or one per `MAX_TEXT` bytes of a longer file."""

  suffix = '.txt'

  def __init__(self, path: str, cache: pathlib.Path | None = None):
    """`path` is a file, a folder (every `suffix` file below it) or a glob; large files' digests are kept in `cache`.

    Raises:
      ConfigError: that is no file.
    """
    self.files, self.notices = find_files(path, self.suffix)
    self.cache = cache

  def digest(self) -> str:
    """SHA-256 over the files' bytes in order; their names and places do not count."""
    total = hashlib.sha256(self.suffix.encode())
    for path in self.files:
      total.update(file_digest.digest(path, self.cache))
    return total.hexdigest()

  def documents(self, notes: Notes) -> Iterator[document.Document]:
    """The documents in order of path. `notes` receives what was odd. ConfigError where too much is no text."""
    for path in self.files:
      check = encoding.Checked(f'data file {path}', notes)
      for raw in _pieces(path, notes):
        text = check.text(raw, path).encode()
        check.judge()
        if text:
          yield document.Document(text, document.split_key(text))
    self._judge_all(notes)

  def _judge_all(self, notes: Notes) -> None:
    """Many small files, each with a little that is no text."""
    encoding.judge(notes.size, notes.bad, f'{len(self.files)} data files, the first of them {notes.first_bad}')


class JsonlSource(TextSource):
  """JSON lines: one document per line, in the field `field`."""

  suffix = '.jsonl'

  def __init__(self, path: str, cache: pathlib.Path | None = None, field: str = 'text'):
    super().__init__(path, cache)
    self.field = field

  def digest(self) -> str:
    """As for text files; another field is another content."""
    found = super().digest()
    return found if self.field == 'text' else f'{found} {self.field!r}'

  def documents(self, notes: Notes) -> Iterator[document.Document]:
    """As for text files. `notes.skipped` receives a 'file:line: reason' for each line without text."""
    for path in self.files:
      bad, check = 0, encoding.Checked(f'data file {path}', notes)
      for number, line in file_streams.lines(path, notes):
        text, reason = _parse(line, self.field, check, f'{path}:{number}')
        if reason:
          bad += 1
          notes.skipped.append(f'{path}:{number}: {reason}')
          if bad > MAX_SKIPPED:
            check.judge()
            raise ConfigError(f'{path}:{number}: {reason}; more than {MAX_SKIPPED} lines of this file '
                              f'give no text: is it JSON lines with a string field {json.dumps(self.field)}?')
        if text:
          yield document.Document(text, document.split_key(text))
      check.judge()
    self._judge_all(notes)


def _pieces(path: pathlib.Path, notes: Notes) -> Iterator[bytes]:
  """The file as UTF-8 in pieces of at most `MAX_TEXT` bytes that end with a line if one does."""
  held, done = b'', 0

  def taken(size: int) -> bytes:
    nonlocal held, done
    piece, held = held[:size], held[size:]
    done += size
    return piece.removeprefix(encoding.BOM) if done == size else piece

  try:
    for block in encoding.utf8_blocks(file_streams.blocks(path), path, notes):
      held += block
      while len(held) > MAX_TEXT:
        yield taken(_cut(held))
  except file_streams.Damaged as error:
    raise ConfigError(f'data file {path}: {error}, after {done + len(held):,} bytes of text') from error
  if held:
    yield taken(len(held))


def _cut(text: bytes) -> int:
  """Where to end a piece: after the last line of the first MAX_TEXT bytes, else before a character."""
  if at := text.rfind(b'\n', 0, MAX_TEXT) + 1:
    return at
  return next((at for at in range(MAX_TEXT, max(MAX_TEXT - 4, 0), -1) if text[at] & 0xc0 != 0x80), MAX_TEXT)


def _parse(line: bytes | None, field: str, check: encoding.Checked, place: str) -> tuple[bytes, str]:
  """(UTF-8 text, '') or (b'', why the line gives no text)."""
  if line is None:
    return b'', f'longer than {file_streams.MAX_LINE} bytes'
  name = json.dumps(field, ensure_ascii=False)
  try:
    record = json.loads(check.text(line, place), object_pairs_hook=_Pairs)
  except (ValueError, RecursionError) as error:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
    return b'', f'broken JSON ({reason})'
  if not isinstance(record, _Pairs):
    return b'', 'not a JSON object'
  values = [value for key, value in record if key == field]
  if not values:
    return b'', f'no field {name}'
  if len(values) > 1:
    return b'', f'field {name} twice'
  if not isinstance(values[0], str):
    return b'', f'field {name} is not a string'
  check.notes.note_replaced(_surrogates(values[0]) if b'\\u' in line else 0, place)
  return document.to_utf8(values[0]), ''


class _Pairs(list):
  """A JSON object as (key, value) pairs: a dict would keep the last of equal keys."""


def _surrogates(text: str) -> int:
  return sum('\ud800' <= c <= '\udfff' for c in text)
