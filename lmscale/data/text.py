"""Plain text files and JSONL as documents.

Policy for bad input: invalid UTF-8 is replaced by U+FFFD, a byte order mark is dropped, line ends and NUL are kept,
an empty text is no document. A JSONL line that gives no text is skipped and noted, up to `MAX_SKIPPED` per file.
"""

import glob
import hashlib
import json
import pathlib
from collections.abc import Iterator

from lmscale import config as config_lib
from lmscale.data import document
from lmscale.data import tokenizer as tokenizer_lib

MAX_SKIPPED = 100  # lines of one file
MAX_LINE = 1 << 28  # bytes of one JSONL line held in memory
BOM = b'\xef\xbb\xbf'
BLOCK = 1 << 20


class TextSource:
  """Plain text: one document per file."""

  suffix = '.txt'

  def __init__(self, path: str):
    """`path` is a file, a folder (every `suffix` file below it) or a glob. Raises ConfigError if that is no file."""
    self.files = find_files(path, self.suffix)

  def digest(self) -> str:
    """SHA-256 over the files' bytes in order; their names and places do not count."""
    total = hashlib.sha256(self.suffix.encode())
    for path in self.files:
      total.update(_file_digest(path))
    return total.hexdigest()

  def documents(self, skipped: list[str]) -> Iterator[document.Document]:
    """The documents in order of path. `skipped` receives a 'file:line: reason' for each one left out."""
    for path in self.files:
      text = _clean(_read(path))
      if text:
        yield document.Document(text, document.split_key(text))


class JsonlSource(TextSource):
  """JSON lines: one document per line, in the field `text`."""

  suffix = '.jsonl'

  def documents(self, skipped: list[str]) -> Iterator[document.Document]:
    for path in self.files:
      bad = 0
      for number, line in _lines(path):
        text, reason = _parse(line)
        if reason:
          bad += 1
          skipped.append(f'{path}:{number}: {reason}')
          if bad > MAX_SKIPPED:
            raise config_lib.ConfigError(f'{path}:{number}: {reason}; more than {MAX_SKIPPED} lines of this file '
                                         'give no text: is it JSON lines with a string field "text"?')
        if text:
          yield document.Document(text, document.split_key(text))


def find_files(path: str, suffix: str) -> list[pathlib.Path]:
  """Sorted files that `path` names: a file, a folder (every `suffix` file below) or a glob. ConfigError if none."""
  root = pathlib.Path(path).expanduser()
  if not path:
    raise config_lib.ConfigError('path: empty; give a file, a folder or a glob')
  if root.is_file():
    return [root]
  if root.is_dir():
    files = [p for p in root.rglob('*') if p.suffix == suffix and p.is_file()]
    problem = f'the folder has no *{suffix} file'
  elif glob.has_magic(path):
    files = [p for p in map(pathlib.Path, glob.glob(str(root), recursive=True)) if p.is_file()]
    problem = 'the glob matches no file'
  else:
    files, problem = [], 'no such file or folder' if not root.exists() else 'neither a file nor a folder'
  if not files:
    raise config_lib.ConfigError(f'path {path!r}: {problem}')
  return sorted(files)


def _file_digest(path: pathlib.Path) -> bytes:
  try:
    with path.open('rb') as file:
      return hashlib.file_digest(file, 'sha256').digest()
  except OSError as error:
    raise _unreadable(path, error) from error


def _read(path: pathlib.Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as error:
    raise _unreadable(path, error) from error


def _unreadable(path: pathlib.Path, error: OSError) -> config_lib.ConfigError:
  return config_lib.ConfigError(f'data file {path}: cannot be read: {error.strerror}')


def _clean(raw: bytes) -> bytes:
  raw = raw.removeprefix(BOM)
  try:
    raw.decode()
    return raw
  except UnicodeDecodeError:
    return raw.decode('utf-8', 'replace').encode()


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes | None]]:
  """(line number from 1, line) of the lines that are not blank; None for a line longer than `MAX_LINE`."""
  try:
    with path.open('rb') as file:
      number = 0
      while line := file.readline(MAX_LINE):
        number += 1
        whole = len(line) < MAX_LINE or line.endswith(b'\n')
        rest = line
        while not whole and rest and not rest.endswith(b'\n'):
          rest = file.readline(BLOCK)
        if number == 1:
          line = line.removeprefix(BOM)
        if not whole:
          yield number, None
        elif line.strip():
          yield number, line
  except OSError as error:
    raise _unreadable(path, error) from error


def _parse(line: bytes | None) -> tuple[bytes, str]:
  """(UTF-8 text, '') or (b'', why the line gives no text)."""
  if line is None:
    return b'', f'longer than {MAX_LINE} bytes'
  try:
    record = json.loads(line.decode('utf-8', 'replace'))
  except (ValueError, RecursionError) as error:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
    return b'', f'broken JSON ({reason})'
  if not isinstance(record, dict):
    return b'', 'not a JSON object'
  if 'text' not in record:
    return b'', 'no field "text"'
  if not isinstance(record['text'], str):
    return b'', 'field "text" is not a string'
  return tokenizer_lib.to_utf8(record['text']), ''
