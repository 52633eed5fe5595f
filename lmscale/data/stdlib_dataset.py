"""The standard-library corpus as a TFDS data set in array_record files, written and read without TensorFlow.

The data set lives in a folder named after the Python version and the sources' content. TFDS can drop examples without
an error in some file formats, so the records of each split are counted whenever it is opened.
"""

import contextlib
import dataclasses
import io
import logging
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from lmscale.data import stdlib, storage


@dataclasses.dataclass(kw_only=True)
class StdlibConfig(tfds.core.BuilderConfig):
  """Which library: `root` is its folder, `files` are its sources to read."""

  root: pathlib.Path
  files: Sequence[pathlib.Path]


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
  """Sources and documentation of the running Python's standard library: splits `code` and `prose`."""

  VERSION = tfds.core.Version('1.0.0')
  url_infos: ClassVar[dict] = {}  # nothing is downloaded; looking for checksums needs a package that TFDS does not declare

  def _info(self) -> tfds.core.DatasetInfo:
    features = {
      'text': tfds.features.Text(),
      'name': tfds.features.Text(),
      'split_key': tfds.features.Scalar(dtype=np.uint64),
    }
    features = tfds.features.FeaturesDict(features)
    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
    root, files = self.builder_config.root, self.builder_config.files
    return {
      'code': self._generate_examples(stdlib.code(root, files)),
      'prose': self._generate_examples(stdlib.prose(root, files)),
    }

  def _generate_examples(self, documents: Iterable[tuple[str, bytes, int]]) -> Iterator[tuple[int, dict]]:
    for i, (name, text, split_key) in enumerate(documents):
      yield i, {'text': text, 'name': name, 'split_key': np.uint64(split_key)}


def prepare(cache: pathlib.Path, root: pathlib.Path, files: Sequence[pathlib.Path]) -> dict[str, Sequence[dict]]:
  """The streams of `files` as random-access sources of {'text', 'name', 'split_key'}; built below `cache` once."""
  name = stdlib.version(root, files)

  def build(folder: pathlib.Path) -> None:
    with _quiet():
      config = StdlibConfig(name=name, root=root, files=files)
      PythonStdlib(data_dir=folder, config=config, file_format='array_record').download_and_prepare()
      shutil.rmtree(folder / 'downloads', ignore_errors=True)  # made empty by TFDS

  return storage.ensure(cache / 'stdlib' / name, build, open_streams)


def open_streams(folder: pathlib.Path) -> dict[str, Sequence[dict]]:
  """The prepared streams in `folder`.

  Raises RuntimeError unless TFDS' record of the split, the source's length and the records in the files are the same
  number (for array_record the first two come from one place, so they alone would prove nothing).
  """
  found = sorted(folder.rglob('dataset_info.json'))
  if len(found) != 1:
    raise RuntimeError(f'{folder} holds no prepared data set')
  with _quiet():
    builder = tfds.builder_from_directory(found[0].parent)
    sources = {stream: builder.as_data_source(stream) for stream in stdlib.STREAMS}
  for stream, source in sources.items():
    written = builder.info.splits[stream].num_examples
    files = found[0].parent.glob(f'*-{stream}.array_record-*')
    stored = sum(array_record_module.ArrayRecordReader(str(path)).num_records() for path in files)
    if not len(source) == stored == written:
      raise RuntimeError(f'{folder}: {stream} has {len(source)} examples in {stored} records, {written} were written')
  return sources


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
