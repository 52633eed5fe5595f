"""The phone book of arXiv 2406.07887 (section 4.3): whose number is it, with two look-ups shown; reversed, the name is told before the book.

`phonebook_all` looks up every name, in another order: to train on, as most of the tokens that can be known are look-ups'.
"""

from lmscale.data.synthetic import words
from lmscale.data.synthetic.dice import Dice
from lmscale.data.synthetic.example import Example, Material
from lmscale.data.synthetic.sizing import Room

DIGITS = 7
SHOWN = 2
ANSWER_TOKENS = 12


def make(task: str, dice: Dice, room: Room, material: Material) -> Example:
  """A book with as many entries as there is room for."""

  def build(n: int) -> Example:
    return book(dice, n, task == 'phonebook_reversed', n - 1 if task == 'phonebook_all' else SHOWN)

  return room.fill(task, build, ANSWER_TOKENS, SHOWN + 1)


def book(dice: Dice, entries: int, reverse: bool = False, looked_up: int = SHOWN) -> Example:
  """A book of more entries than are looked up before the one that is asked for."""
  names = words.names(dice.split('names'), entries)
  digits = dice.split('numbers')
  numbers = [digits.number(DIGITS) for _ in names]
  *shown, asked = dice.split('asked').distinct(looked_up + 1, entries)
  listed = '\n'.join(f'{name}: {number}' for name, number in zip(names, numbers, strict=True))
  if reverse:
    who = ', '.join(names[i] for i in shown)
    head = f'Find in this phone book the numbers of {who} and {names[asked]}.\n\n'
  else:
    head = 'A phone book:\n\n'
  before = ''.join(f'The number of {names[i]} is {numbers[i]}\n' for i in shown)
  prompt = f'{head}{listed}\n\n{before}The number of {names[asked]} is'
  return Example(prompt, (numbers[asked],), facts={'entries': entries, 'depth': asked / (entries - 1)})
