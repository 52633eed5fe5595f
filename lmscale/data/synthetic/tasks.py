"""Every task by name."""

from collections.abc import Callable

from lmscale.data.synthetic import chains, counting, needles, phonebook, questions, recall
from lmscale.data.synthetic.dice import Dice
from lmscale.data.synthetic.example import Example, Material
from lmscale.data.synthetic.sizing import Room
from lmscale.errors import ConfigError

VERSION = 1  # raise when the same seed would give other examples
RULER = {
  **dict.fromkeys(needles.TASKS, needles.make), 'vt': chains.make, 'cwe': counting.common_words, 'fwe': counting.frequent_words,
  'qa_1': questions.make, 'qa_2': questions.make,
}  # fmt: skip
PHONEBOOK = dict.fromkeys(('phonebook', 'phonebook_reversed', 'phonebook_all'), phonebook.make)
RECALL = {'copy': recall.copy, 'induction': recall.induction, 'mqar': recall.mqar}
TASKS: dict[str, Callable[[str, Dice, Room, Material], Example]] = {**RULER, **PHONEBOOK, **RECALL}


def make_example(task: str, seed: int, index: int, tokens: int, count: Callable[[str], int], material: Material) -> Example:
  """Example `index` of a task: prompt and answer have about `tokens` tokens and no more.

  count: the tokens of a text. The same arguments give the same example on every machine.

  Raises:
    ConfigError: an unknown task, too few tokens for it, or material that it needs and that is not there.
  """
  if task not in TASKS:
    raise ConfigError(f'task {task!r}: unknown; known: {", ".join(TASKS)}')
  return TASKS[task](task, Dice(VERSION, task, seed, index), Room(tokens, count), material)
