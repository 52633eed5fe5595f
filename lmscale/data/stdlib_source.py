"""One stream of the standard library as a source of the blend."""

import pathlib
import sysconfig
from collections.abc import Iterator, Sequence

from lmscale.data import document, stdlib
from lmscale.data.reading_notes import Notes
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
    """The stream's documents in order of path, read from the prepared data set."""
    from lmscale.data import stdlib_dataset  # imported where used: TFDS is not needed once the tokens are cached
    for example in stdlib_dataset.prepare(self.cache, self.root, self.files)[self.stream]:
      yield document.Document(example['text'], int(example['split_key']))
