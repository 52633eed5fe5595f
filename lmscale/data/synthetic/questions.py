"""A question on a passage among other passages: RULER's `qa_1` and `qa_2`, of SQuAD and HotpotQA, which the user has."""

from lmscale.data.synthetic.dice import Dice
from lmscale.data.synthetic.example import Example, Material
from lmscale.data.synthetic.sizing import Room
from lmscale.errors import ConfigError

ANSWER_TOKENS = 32


def make(task: str, dice: Dice, room: Room, material: Material) -> Example:
  """Any of the accepted answers will do. Raises ConfigError: no questions for the task, or too little room."""
  known = material.questions.get(task, [])
  if not known:
    raise ConfigError(f'task {task}: it needs questions with passages, and there are none; give the data set that it is made of')
  passages, question, answers = known[dice.below(len(known))]
  others = list(dict.fromkeys(passage for own, _, _ in known for passage in own if passage not in passages))
  others = dice.split('others').shuffled(others)

  def build(n: int) -> Example:
    placed = dice.split('order', n).shuffled([*passages, *others[: n - len(passages)]])
    listed = '\n\n'.join(f'Passage {i}: {passage.strip()}' for i, passage in enumerate(placed, 1))
    depth = placed.index(passages[0]) / max(len(placed) - 1, 1)
    prompt = f'{listed}\n\nAnswer from the passages above, in a few words.\nQuestion: {question.strip()}\nAnswer:'
    return Example(prompt, answers, every=False, facts={'depth': depth, 'passages': len(placed)})

  least, most = len(passages), len(passages) + len(others)
  example = room.fill(task, build, ANSWER_TOKENS, least, most)
  if example.facts['passages'] == most and (found := room.count(example.prompt)) < room.tokens / 2:
    raise ConfigError(f'task {task}: {room.tokens} tokens are asked for and all {most} passages have {found}; give more of the data set')
  return example
