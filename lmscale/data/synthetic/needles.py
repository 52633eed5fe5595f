"""Needles in a haystack: sentences that give a key a value, hidden in other text, and a question for some of them.

Eight of RULER's tasks (arXiv 2404.06654, table 1): which text, what keys and values are made of, and how many there are.
"""

import dataclasses

from lmscale.data.synthetic import words
from lmscale.data.synthetic.dice import Dice
from lmscale.data.synthetic.example import Example, Material
from lmscale.data.synthetic.sizing import Room
from lmscale.errors import ConfigError

DEPTHS = 40  # places at equal distances where a needle may be in a text
ANSWER_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class Needles:
  """haystack: noise (one sentence over and over), text, or lines (needles that nobody asks for). key, value: word, number or uuid.

  keys: needles with different keys; asked: how many of them are asked for; values: of each key.
  """

  haystack: str
  key: str = 'word'
  value: str = 'number'
  keys: int = 1
  asked: int = 1
  values: int = 1


TASKS = {
  'niah_single_1': Needles('noise'),
  'niah_single_2': Needles('text'),
  'niah_single_3': Needles('text', value='uuid'),
  'niah_multikey_1': Needles('text', keys=4),
  'niah_multikey_2': Needles('lines'),
  'niah_multikey_3': Needles('lines', key='uuid', value='uuid'),
  'niah_multivalue': Needles('text', values=4),
  'niah_multiquery': Needles('text', keys=4, asked=4),
}


def make(task: str, dice: Dice, room: Room, material: Material) -> Example:
  """An example of a task of TASKS. Raises ConfigError: too little room, or no text for the haystack."""
  kind = TASKS[task]
  if kind.haystack == 'text' and not material.sentences:
    raise ConfigError(f'task {task}: it hides sentences in a text and there is none; name one')
  return room.fill(task, lambda n: _build(kind, dice, material, n), ANSWER_TOKENS)


def _build(kind: Needles, dice: Dice, material: Material, n: int) -> Example:
  """With n units of haystack."""
  drawn = dice.split('needles')
  keys = _drawn(kind.key, drawn, kind.keys)
  values = [_drawn(kind.value, drawn, kind.values) for _ in keys]
  needles = [_needle(kind, key, value) for key, of_key in zip(keys, values, strict=True) for value in of_key]
  units = _haystack(kind, dice.split('haystack'), material, n, keys)
  where = dice.split('places')
  places = sorted(_place(kind, where, n) for _ in needles)
  order = where.shuffled(range(len(needles)))  # which needle is at which place
  parts, before = [], 0
  for place, i in zip(places, order, strict=True):
    parts += [*units[before:place], needles[i]]
    before = place
  text = ''.join([*parts, *units[before:]]).rstrip()
  asked = keys[: kind.asked]
  first = min(place for place, i in zip(places, order, strict=True) if i < kind.asked * kind.values)
  answers = tuple(value for of_key in values[: kind.asked] for value in of_key)
  return Example(_prompt(kind, text, asked), answers, facts={'depth': first / max(n, 1)})


def _drawn(what: str, dice: Dice, n: int) -> list[str]:
  if what == 'word':
    return words.pairs(dice, n)
  return [dice.uuid() if what == 'uuid' else dice.number(7) for _ in range(n)]


def _needle(kind: Needles, key: str, value: str) -> str:
  return f'The secret {_noun(kind)} of {key} is {value}.' + ('\n' if kind.haystack == 'lines' else ' ')


def _noun(kind: Needles) -> str:
  return 'code' if kind.value == 'uuid' else 'number'


def _haystack(kind: Needles, dice: Dice, material: Material, n: int, asked: list[str]) -> list[str]:
  """n units; lines are about other keys than those `asked` for."""
  if kind.haystack == 'noise':
    return [words.NOISE] * n
  if kind.haystack == 'text':
    sentences = material.sentences
    start = dice.below(len(sentences))
    return [sentences[(start + i) % len(sentences)] for i in range(n)]
  keys = [key for key in _drawn(kind.key, dice.split('keys'), n + len(asked)) if key not in asked][:n]
  return [_needle(kind, key, value) for key, value in zip(keys, _drawn(kind.value, dice.split('values'), n), strict=True)]


def _place(kind: Needles, dice: Dice, n: int) -> int:
  if kind.haystack == 'lines':
    return dice.below(n + 1)
  return round(dice.below(DEPTHS) / (DEPTHS - 1) * n)


def _prompt(kind: Needles, text: str, asked: list[str]) -> str:
  noun, several = _noun(kind), len(asked) * kind.values > 1
  names = asked[0] if len(asked) == 1 else f'{", ".join(asked[:-1])} and {asked[-1]}'
  what = f'all secret {noun}s' if several else f'the secret {noun}'
  verb = 'are' if several else 'is'
  return (
    f'Secret {noun}s are hidden in the text that follows. Remember them: you will be asked.\n\n{text}\n\n'
    f'Which {"are" if several else "is"} {what} of {names} in this text?\nAnswer: {what[0].upper()}{what[1:]} of {names} {verb}'
  )
