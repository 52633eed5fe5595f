"""The examples of a synthetic task as documents to train on, each with its answer."""

from collections.abc import Iterator

from lmscale.data import document
from lmscale.data.reading_notes import Notes
from lmscale.data.synthetic.dice import Dice
from lmscale.data.synthetic.example import Material
from lmscale.data.synthetic.haystack import topics
from lmscale.data.synthetic.tasks import TASKS, VERSION, make_example
from lmscale.errors import ConfigError

FORM = 'TASK:BYTES:DOCUMENTS, for example phonebook:256-1024:20000'
SEED = 1 << 32  # evaluations have seeds below: nothing that is trained on is asked for there


class SyntheticSource:
  """path: TASK:BYTES:DOCUMENTS. Document i has at most BYTES bytes; of FROM-TO, a number between them that i draws."""

  def __init__(self, path: str):
    task, _, rest = path.partition(':')
    size, _, documents = rest.partition(':')
    low, _, high = size.partition('-')
    if not (low.isdecimal() and (high or low).isdecimal() and documents.isdecimal() and 0 < int(low) <= int(high or low) and int(documents)):
      raise ConfigError(f'data source path {path!r}: a synthetic source is {FORM}')
    if task not in TASKS or task.startswith('qa_'):
      known = ', '.join(name for name in TASKS if not name.startswith('qa_'))
      raise ConfigError(f'data source path {path!r}: no task {task!r} to train on; known: {known}')
    self.task, self.low, self.high, self.count = task, int(low), int(high or low), int(documents)
    self.material = Material(topics())
    self._make(0, self.low)  # raises where that is too short

  def digest(self) -> str:
    """Names what is drawn."""
    return f'{VERSION}-{self.task}-{self.low}-{self.high}-{self.count}-{document.split_key(self.material.text.encode()):016x}'

  def documents(self, notes: Notes) -> Iterator[document.Document]:
    """All of them, in the order in which they are drawn."""
    sizes = Dice('sizes', self.task)
    for i in range(self.count):
      text = self._make(i, self.low + sizes.below(self.high - self.low + 1))
      yield document.Document(text, document.split_key(text))

  def _make(self, i: int, size: int) -> bytes:
    return make_example(self.task, SEED, i, size, lambda text: len(text.encode()), self.material).text.encode()
