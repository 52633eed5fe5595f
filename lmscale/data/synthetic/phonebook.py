"""The phone book of arXiv 2406.07887 (section 4.3): whose number is it, with two look-ups shown; reversed, the name is told before the book."""

from lmscale.data.synthetic import words
from lmscale.data.synthetic.dice import Dice
from lmscale.data.synthetic.example import Example, Material
from lmscale.data.synthetic.sizing import Room

DIGITS = 7
SHOWN = 2
ANSWER_TOKENS = 12


def make(task: str, dice: Dice, room: Room, material: Material) -> Example:
  """A book with as many entries as there is room for."""
  fewest = SHOWN + 1
  return room.fill(task, lambda n: book(dice, n, task == 'phonebook_reversed'), ANSWER_TOKENS, fewest)


def book(dice: Dice, entries: int, reverse: bool = False) -> Example:
  """A book of so many entries, at least three."""
  names = words.names(dice.split('names'), entries)
  digits = dice.split('numbers')
  numbers = [digits.number(DIGITS) for _ in names]
  *shown, asked = dice.split('asked').distinct(SHOWN + 1, entries)
  listed = '\n'.join(f'{name}: {number}' for name, number in zip(names, numbers, strict=True))
  if reverse:
    who = ', '.join(names[i] for i in shown)
    head = f'Find in this phone book the numbers of {who} and {names[asked]}.\n\n'
  else:
    head = 'A phone book:\n\n'
  looked_up = ''.join(f'The number of {names[i]} is {numbers[i]}\n' for i in shown)
  prompt = f'{head}{listed}\n\n{looked_up}The number of {names[asked]} is'
  return Example(prompt, (numbers[asked],), facts={'entries': entries, 'depth': asked / (entries - 1)})
