"""A TFDS data set in array_record files as documents, read without TensorFlow.

TFDS can lose examples without an error (its parquet files do), so what it offers is compared with the records that lie
in the files and with the number that was written.
"""

import contextlib
import hashlib
import io
import json
import logging
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from lmscale.data import document, file_digest
from lmscale.data.reading_notes import Notes
from lmscale.data.sources import encoding
from lmscale.errors import ConfigError

FORMAT = 'array_record'
READ = 256  # examples at a time
MAX_INFO = 1 << 26  # bytes of a file that describes the data set


class TfdsSource:
  """One split of a data set, by its folder or its name; a document is an example's text or tokens."""

  def __init__(self, path: str, split: str, field: str, cache: pathlib.Path | None = None):
    """`path`: the folder with dataset_info.json, or a name as `lm1b/subwords8k:1.0.0` that is prepared in TFDS' own folder.

    Raises:
      ConfigError: no such data set, or it is not in array_record files, or the split or the feature does not exist.
    """
    self.folder = find_folder(path)
    self.split, self.cache = split, cache
    self.examples, self.files = open_split(self.folder, split)
    self.field = field
    feature = self._features().get(field)
    if feature is None:
      raise ConfigError(f'path {path!r}: the data set has no feature {field!r} (field); it has {", ".join(sorted(self._features()))}')
    self.is_text = isinstance(feature, tfds.features.Text)
    if not self.is_text and not (len(feature.shape or ()) == 1 and np.issubdtype(feature.np_dtype, np.integer)):
      raise ConfigError(f'path {path!r}: the feature {field!r} is neither text nor a list of integers')

  def _features(self) -> dict[str, Any]:
    return dict(self.examples.dataset_info.features)

  def digest(self) -> str:
    """SHA-256 over the split's files, its name and the field."""
    total = hashlib.sha256(f'{self.split} {self.field}'.encode())
    for path in [self.folder / 'features.json', *self.files]:
      total.update(file_digest.digest(path, self.cache))
    return total.hexdigest()

  def documents(self, notes: Notes) -> Iterator[document.Document]:
    """The examples in order. `notes` receives what was odd, a line in `skipped` for each without text.

    Raises:
      ConfigError: an example cannot be read, or too much is no text.
    """
    place = f'{self.folder}:{self.split}'
    check = encoding.Checked(place, notes)
    for number, value in self._values():
      raw = (value if isinstance(value, bytes) else str(value).encode()) if self.is_text else b''
      text = check.text(encoding.decoded(raw, f'{place}:{number}', notes), f'{place}:{number}').encode()
      if not (text if self.is_text else len(value)):
        notes.skipped.append(f'{place}:{number}: empty {self.field}')
      elif self.is_text:
        yield document.Document(text, document.split_key(text))
      else:
        ids = np.asarray(value)
        yield document.Document(b'', document.split_key(ids.astype('<i8').tobytes()), ids)
      if number % READ == 0:
        check.judge()
    check.judge()

  def _values(self) -> Iterator[tuple[int, Any]]:
    """(number, the field's value) of each example."""
    for first in range(0, len(self.examples), READ):
      numbers = range(first, min(first + READ, len(self.examples)))
      try:
        found = self.examples.__getitems__(list(numbers))
      except Exception as error:  # whatever a damaged file makes the libraries raise
        raise ConfigError(f'{self.folder}: examples {first}.. cannot be read: {one_line(error)}') from error
      if len(found) != len(numbers):
        raise ConfigError(f'{self.folder}: {len(found)} examples were read where {len(numbers)} are stored')
      yield from ((number, example[self.field]) for number, example in zip(numbers, found, strict=True))


def find_folder(path: str) -> pathlib.Path:
  """The prepared data set that a folder or a name means. Raises ConfigError if there is none; nothing is downloaded."""
  if not path:
    raise ConfigError('path: empty; give a prepared TFDS folder or a name')
  folder = pathlib.Path(path).expanduser()
  if '\0' not in path and folder.is_dir():
    found = sorted(folder.rglob('dataset_info.json'))
    if len(found) == 1:
      return found[0].parent
    raise ConfigError(f'path {path!r}: {len(found)} data sets in the folder (files dataset_info.json); give the folder of one')
  try:
    with quiet():
      return pathlib.Path(tfds.core.read_only_builder.builder_from_files(path).data_dir)
  except Exception as error:
    raise ConfigError(f'path {path!r}: neither a folder nor a data set that TFDS has prepared on this machine '
                      f'({one_line(error)[:120]}); prepare it with file_format={FORMAT!r}') from error


def open_split(folder: pathlib.Path, split: str) -> tuple[Sequence[dict], list[pathlib.Path]]:
  """(the examples, the files) of a split such as `train` or `train[:90%]`.

  Raises:
    ConfigError: unless TFDS' record of the split, the source's length and the records in the files agree (for array_record
      the first two come from one place, so they alone would prove nothing).
  """
  _check_description(folder)
  try:
    with quiet():
      builder = tfds.builder_from_directory(folder)
      info, stored_as = builder.info, builder.info.file_format
      if stored_as is None or stored_as.value != FORMAT:
        raise ConfigError(f'{folder}: stored as {stored_as and stored_as.value}, which cannot be read completely without '
                          f'TensorFlow; prepare it again with file_format={FORMAT!r}')
      name = split.partition('[')[0]
      if name not in info.splits:
        raise ConfigError(f'{folder}: no split {name!r}; it has {", ".join(info.splits) or "none"}')
      paths = [pathlib.Path(path) for path in info.splits[name].filepaths]
      stored = sum(_records(path) for path in paths)
      if stored != info.splits[name].num_examples:
        raise ConfigError(f'{folder}: the files of split {name} hold {stored} records, but '
                          f'{info.splits[name].num_examples} were written: it is damaged')
      examples = builder.as_data_source(split)
      expected = info.splits[split].num_examples
  except ConfigError:
    raise
  except Exception as error:  # whatever a damaged file makes the libraries raise
    raise ConfigError(f'{folder}: split {split!r} cannot be opened: {one_line(error)}') from error
  if len(examples) != expected:
    raise ConfigError(f'{folder}: split {split} offers {len(examples)} of {expected} examples')
  return examples, paths


def _records(path: pathlib.Path) -> int:
  if not path.is_file():
    raise ConfigError(f'{path}: missing')
  reader = array_record_module.ArrayRecordReader(str(path))
  try:
    return reader.num_records()
  finally:
    reader.close()


def _check_description(folder: pathlib.Path) -> None:
  """features.json names the classes that decode it: only TFDS' own are let in, because naming one imports its module."""
  for name in ('dataset_info.json', 'features.json'):
    path = folder / name
    try:
      if path.stat().st_size > MAX_INFO:
        raise ConfigError(f'{path}: {path.stat().st_size} bytes; no description of a data set is that long')
      described = json.loads(path.read_text('utf-8'))
    except OSError as error:
      raise file_digest.unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
      raise ConfigError(f'{path}: not JSON: {one_line(error)}') from error
    for found in _classes(described):
      if not str(found).startswith('tensorflow_datasets.'):
        raise ConfigError(f'{path}: the feature class {found!r} is not one of TFDS itself')


def _classes(value: Any) -> Iterator[Any]:
  if isinstance(value, dict):
    for key, part in value.items():
      if key in ('pythonClassName', 'python_class_name', 'type') and not isinstance(part, dict):
        yield part
      yield from _classes(part)
  elif isinstance(value, list):
    for part in value:
      yield from _classes(part)


def one_line(error: BaseException) -> str:
  """Class and message, short."""
  return ' '.join(f'{type(error).__name__}: {error}'.split())[:200]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """No progress bars, prints or log lines from TFDS inside."""
  tfds.disable_progress_bar()
  logger = logging.getLogger('absl')
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logger.setLevel(level)
