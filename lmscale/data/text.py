"""Plain text files and JSONL as documents.

Policy for bad input: invalid UTF-8 is replaced by U+FFFD and counted, a byte order mark is dropped, line ends and NUL are kept,
an empty text is no document. A JSONL line that gives no text is skipped and noted, up to `MAX_SKIPPED` per file. An
archive that breaks off is an error after its last whole line: no text is lost in silence.
"""

import hashlib
import json
import logging
import pathlib
from collections.abc import Iterator

from lmscale.data import document, files
from lmscale.errors import ConfigError

log = logging.getLogger(__name__)

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
    self.files = files.find_files(path, self.suffix)
    self.cache = cache

  def digest(self) -> str:
    """SHA-256 over the files' bytes in order; their names and places do not count."""
    total = hashlib.sha256(self.suffix.encode())
    for path in self.files:
      total.update(files.digest(path, self.cache))
    return total.hexdigest()

  def documents(self, skipped: list[str]) -> Iterator[document.Document]:
    """The documents in order of path. `skipped` receives a 'file:line: reason' for each one left out."""
    replaced = _Replaced()
    for path in self.files:
      for raw in _pieces(path):
        if text := replaced.valid(raw, path).encode():
          yield document.Document(text, document.split_key(text))
    replaced.report()


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

  def documents(self, skipped: list[str]) -> Iterator[document.Document]:
    replaced = _Replaced()
    for path in self.files:
      bad = 0
      for number, line in files.lines(path):
        text, reason = _parse(line, self.field, replaced, f'{path}:{number}')
        if reason:
          bad += 1
          skipped.append(f'{path}:{number}: {reason}')
          if bad > MAX_SKIPPED:
            raise ConfigError(f'{path}:{number}: {reason}; more than {MAX_SKIPPED} lines of this file '
                              f'give no text: is it JSON lines with a string field {json.dumps(self.field)}?')
        if text:
          yield document.Document(text, document.split_key(text))
    replaced.report()


class _Replaced:
  """Counts what is no text and becomes U+FFFD."""

  def __init__(self):
    self.count, self.first = 0, ''

  def note(self, count: int, place: object) -> None:
    self.first = self.first or (str(place) if count else '')
    self.count += count

  def valid(self, raw: bytes, place: object) -> str:
    """`raw` as text."""
    try:
      return raw.decode()
    except UnicodeDecodeError:
      text = raw.decode('utf-8', 'replace')
      self.note(text.count('\ufffd') - raw.count('\ufffd'.encode()), place)
      return text

  def report(self) -> None:
    if self.count:
      log.warning('%d pieces of invalid UTF-8 became U+FFFD, the first in %s', self.count, self.first)


def _pieces(path: pathlib.Path) -> Iterator[bytes]:
  """The file without its byte order mark, in pieces of at most `MAX_TEXT` bytes that end with a line if one does."""
  held, done = b'', 0

  def taken(size: int) -> bytes:
    nonlocal held, done
    piece, held = held[:size], held[size:]
    done += size
    return piece.removeprefix(files.BOM) if done == size else piece

  try:
    for block in files.blocks(path):
      held += block
      while len(held) > MAX_TEXT:
        yield taken(_cut(held))
  except files.Damaged as error:
    raise ConfigError(f'data file {path}: {error}, after {done + len(held):,} bytes of text') from error
  if held:
    yield taken(len(held))


def _cut(text: bytes) -> int:
  """Where to end a piece: after the last line of the first MAX_TEXT bytes, else before a character."""
  if at := text.rfind(b'\n', 0, MAX_TEXT) + 1:
    return at
  return next((at for at in range(MAX_TEXT, max(MAX_TEXT - 4, 0), -1) if text[at] & 0xc0 != 0x80), MAX_TEXT)


def _parse(line: bytes | None, field: str, replaced: _Replaced, place: str) -> tuple[bytes, str]:
  """(UTF-8 text, '') or (b'', why the line gives no text)."""
  if line is None:
    return b'', f'longer than {files.MAX_LINE} bytes'
  name = json.dumps(field)
  try:
    text = replaced.valid(line, place)
    record = json.loads(text)
    twice = text.count(name) > 1 and isinstance(record, dict) and _count(text, field) > 1
  except (ValueError, RecursionError) as error:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
    return b'', f'broken JSON ({reason})'
  if not isinstance(record, dict):
    return b'', 'not a JSON object'
  if field not in record:
    return b'', f'no field {name}'
  if twice:
    return b'', f'field {name} twice'
  if not isinstance(record[field], str):
    return b'', f'field {name} is not a string'
  replaced.note(sum('\ud800' <= c <= '\udfff' for c in record[field]) if '\\u' in text else 0, place)
  return document.to_utf8(record[field]), ''


def _count(text: str, field: str) -> int:
  """How often the outermost object has the key; json keeps only the last."""
  return sum(key == field for key, _ in json.loads(text, object_pairs_hook=list))
