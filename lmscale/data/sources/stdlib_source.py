"""One stream of the standard library as a source of the blend."""

import pathlib
import sysconfig
from collections.abc import Iterator, Sequence

from lmscale.data import document
from lmscale.data.reading_notes import Notes
from lmscale.data.sources import stdlib
from lmscale.errors import ConfigError


class StdlibSource:
  """One stream of the standard library. `files` (default: all) lets tests take a few."""

  def __init__(self, stream: str, cache: pathlib.Path, files: Sequence[pathlib.Path] | None = None):
    if stream not in stdlib.STREAMS:
      raise ConfigError(f'data source path {stream!r}: a stdlib source is one of {", ".join(stdlib.STREAMS)}')
    self.stream, self.cache = stream, cache
    self.root = pathlib.Path(sysconfig.get_path('stdlib'))
    self.files = list(stdlib.stdlib_files(self.root) if files is None else files)

  def digest(self) -> str:
    """Names the Python version, the sources' content and the stream."""
    return f'{stdlib.version(self.root, self.files)}-{self.stream}'

  def documents(self, notes: Notes) -> Iterator[document.Document]:
    """The stream's documents in order of path, read from the prepared data set. ConfigError if that is damaged."""
    from lmscale.data.sources import (  # imported where used: not needed once the tokens are cached
      stdlib_dataset,
      tfds_source,
    )
    examples = stdlib_dataset.prepare(self.cache, self.root, self.files)[self.stream]
    for number in range(len(examples)):
      try:
        example = examples[number]
      except Exception as error:  # whatever a damaged file makes the libraries raise
        raise ConfigError(f'{self.cache / "stdlib"}: example {number} of {self.stream} cannot be read: '
                          f'{tfds_source.one_line(error)}; delete the folder and start again') from error
      yield document.Document(example['text'], int(example['split_key']))
