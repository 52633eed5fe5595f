"""Data sets as JSON lines on this machine."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

from lmscale.errors import ConfigError

LONGEST = 1 << 26  # bytes of a line
Doc = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class DataSet:
  """docs, and the SHA-256 of the file they are from."""

  docs: list[Doc]
  digest: str


def read(folder: pathlib.Path, name: str, columns: dict[str, type | tuple[type, ...]], task: str) -> DataSet:
  """FOLDER/NAME.jsonl, each line an object that has `columns`.

  Raises:
    ConfigError: no such file, a line that is none, or a column that is missing or of another type.
  """
  path = folder / f'{name}.jsonl'
  if not path.is_file():
    raise ConfigError(f'task {task}: no file {path}; it is JSON lines with the columns {", ".join(columns)}')
  docs, digest = [], hashlib.sha256()
  with path.open('rb') as file:
    for number, line in enumerate(iter(lambda: file.readline(LONGEST), b''), 1):
      digest.update(line)
      if line.strip():
        docs.append(_checked(line, columns, f'{path}:{number}'))
  if not docs:
    raise ConfigError(f'task {task}: {path} has no lines')
  return DataSet(docs, digest.hexdigest())


def _checked(line: bytes, columns: dict[str, type | tuple[type, ...]], where: str) -> Doc:
  try:
    doc = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise ConfigError(f'{where}: not JSON ({error})') from error
  if not isinstance(doc, dict):
    raise ConfigError(f'{where}: not an object; expected one with the columns {", ".join(columns)}')
  for column, kind in columns.items():
    if column not in doc:
      raise ConfigError(f'{where}: no column {column!r}; expected {", ".join(columns)}')
    if not isinstance(doc[column], kind):
      kinds = ' or '.join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
      raise ConfigError(f'{where}: column {column!r} is {type(doc[column]).__name__}, not {kinds}')
  return doc


def each(data: DataSet, make: Callable[[Doc], Any], path: str) -> list[Any]:
  """make(doc) of every line; what is wrong in one is an error that names the line."""
  made = []
  for number, doc in enumerate(data.docs, 1):
    try:
      made.append(make(doc))
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
      raise ConfigError(f'{path}: entry {number} cannot be asked: {type(error).__name__}: {error}') from error
  return made
