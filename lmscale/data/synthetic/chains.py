"""Variable tracing: which names stand for a value, handed on from name to name? RULER's `vt` (arXiv 2404.06654, section 3)."""

import itertools

from lmscale.data.synthetic import words
from lmscale.data.synthetic.dice import Dice
from lmscale.data.synthetic.example import Example, Material
from lmscale.data.synthetic.sizing import Room

HOPS = 4
ANSWER_TOKENS = 30
SHOWN = 1  # units of noise in the worked example


def make(task: str, dice: Dice, room: Room, material: Material) -> Example:
  """One chain of a value and HOPS + 1 names in noise, after a worked example. Raises ConfigError: too little room."""
  shown, names = _chain(dice.split('shown'), SHOWN)
  first = f'{shown} {", ".join(names)}\n\n'

  def build(n: int) -> Example:
    prompt, answers = _chain(dice.split('asked'), n)
    return Example(first + prompt, tuple(answers), facts={'hops': HOPS})

  return room.fill(task, build, ANSWER_TOKENS)


def _chain(dice: Dice, n: int) -> tuple[str, list[str]]:
  """(prompt, names) with n units of noise."""
  value, letters = dice.number(5), [chr(65 + i) for i in range(26)]
  names = [''.join(dice.choice(letters) for _ in range(5)) for _ in range(HOPS + 1)]
  names = [name[:-1] + letters[i] for i, name in enumerate(names)]  # all different
  steps = [f'Let {names[0]} be {value}. '] + [f'Let {b} be what {a} is. ' for a, b in itertools.pairwise(names)]
  places = sorted(dice.below(n + 1) for _ in steps)
  units = [words.NOISE] * n
  for place, step in zip(reversed(places), reversed(steps), strict=True):
    units.insert(place, step)
  text = ''.join(units).rstrip()
  return f'Follow the names that are given a value in this text.\n\n{text}\n\nWhich names are {value}? Answer: There are {HOPS + 1} of them:', names
