"""The standard-library corpus as a TFDS data set in array_record files, written and read without TensorFlow.

The data set lives in a folder named after the Python version and the sources' content. Its records are counted whenever
it is opened (`tfds_source.py`).
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from lmscale.data import atomic_folder
from lmscale.data.sources import stdlib, tfds_source
from lmscale.errors import ConfigError


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
  """The streams of `files` as random-access sources of {'text', 'name', 'split_key'}; built below `cache` once.

  Raises:
    ConfigError: the files changed meanwhile.
  """
  name = stdlib.version(root, files)

  def build(folder: pathlib.Path) -> None:
    with tfds_source.quiet():
      config = StdlibConfig(name=name, root=root, files=files)
      PythonStdlib(data_dir=folder, config=config, file_format='array_record').download_and_prepare()
      shutil.rmtree(folder / 'downloads', ignore_errors=True)  # made empty by TFDS
    if stdlib.version(root, files) != name:
      raise ConfigError(f'{root} changed while it was read, so nothing of it was kept; start again')

  return atomic_folder.ensure(cache / 'stdlib' / name, build, open_streams)


def open_streams(folder: pathlib.Path) -> dict[str, Sequence[dict]]:
  """The prepared streams in `folder`. Raises ConfigError unless all records that were written are there."""
  found = tfds_source.find_folder(str(folder))
  return {stream: tfds_source.open_split(found, stream)[0] for stream in stdlib.STREAMS}
