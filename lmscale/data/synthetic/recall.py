"""Token tasks of the literature on state space models: what a state of fixed size must hold.

copy: all of a string again (arXiv 2402.01032). induction: what came after a symbol when it was last there (arXiv 2212.14052).
mqar: keys with values, then several keys again, each with its value (arXiv 2312.04927). Symbols are letters, two a symbol where one is not enough.
"""

import string

from lmscale.data.synthetic.dice import Dice
from lmscale.data.synthetic.example import Example, Material
from lmscale.data.synthetic.sizing import Room

LETTERS = string.ascii_lowercase
VALUES = string.digits


def copy(task: str, dice: Dice, room: Room, material: Material) -> Example:
  """A string of random letters; half of the room is the answer's."""

  def build(n: int) -> Example:
    letters = dice.split('letters')
    text = ''.join(letters.choice(LETTERS) for _ in range(n))
    return Example(f'{text} |', (text,), facts={'symbols': n})

  return room.fill(task, build, 0)


def induction(task: str, dice: Dice, room: Room, material: Material) -> Example:
  """Random letters; one capital stands among them once, and again at the end."""

  def build(n: int) -> Example:
    letters, at = dice.split('letters'), dice.split('place').below(n)
    symbols = [letters.choice(LETTERS) for _ in range(n + 1)]
    trigger = letters.choice(LETTERS).upper()
    return Example(' '.join([*symbols[:at], trigger, *symbols[at:], trigger]), (symbols[at],), facts={'symbols': n, 'depth': at / n})

  return room.fill(task, build, 0)


def mqar(task: str, dice: Dice, room: Room, material: Material) -> Example:
  """n keys with their values, then n / 4 of them again."""

  def build(n: int) -> Example:
    keys = [_symbol(i, n) for i in dice.split('keys').distinct(n, max(26, 2 * n))]
    drawn = dice.split('values')
    values = [drawn.choice(VALUES) for _ in keys]
    *before, asked = dice.split('asked').distinct(max(1, n // 4), n)
    pairs = ' '.join(f'{key} {value}' for key, value in zip(keys, values, strict=True))
    again = ''.join(f' {keys[i]} {values[i]}' for i in before)
    return Example(f'{pairs} |{again} {keys[asked]}', (values[asked],), facts={'pairs': n, 'depth': asked / max(n - 1, 1)})

  return room.fill(task, build, 0)


def _symbol(i: int, n: int) -> str:
  """The i-th of at least 2 n names of equally many letters."""
  letters, sides = '', max(26, 2 * n)
  while sides > 0:
    letters, i, sides = LETTERS[i % 26] + letters, i // 26, (sides - 1) // 26
  return letters
