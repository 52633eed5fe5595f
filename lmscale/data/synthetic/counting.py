"""Words that occur more often than others: RULER's `cwe` and `fwe` (arXiv 2404.06654, section 3)."""

import itertools

from lmscale.data.synthetic import words
from lmscale.data.synthetic.dice import Dice
from lmscale.data.synthetic.example import Example, Material
from lmscale.data.synthetic.sizing import Room

COMMON = 10  # words that are asked for
OFTEN, SELDOM = (30, 3), (6, 1)  # how often common and other words occur; the second in less than SHORT tokens
SHORT = 4096
SHOWN = (3, 1), 10  # in the worked example: how often, and how many other words
FREQUENT, EXPONENT, NOISE = 3, 2.0, '...'
ANSWER_TOKENS = {'cwe': 120, 'fwe': 50}


def common_words(task: str, dice: Dice, room: Room, material: Material) -> Example:
  """A numbered list in which ten words occur more often than the others, after a worked example."""
  shown, answers = _numbered(dice.split('shown'), *SHOWN)
  first = f'{shown} {", ".join(answers)}\n\n'
  times = OFTEN if room.tokens >= SHORT else SELDOM

  def build(n: int) -> Example:
    prompt, answers = _numbered(dice.split('asked'), times, n)
    return Example(first + prompt, tuple(answers), facts={'words': COMMON * times[0] + n * times[1]})

  return room.fill(task, build, ANSWER_TOKENS[task])


def _numbered(dice: Dice, times: tuple[int, int], n: int) -> tuple[str, list[str]]:
  drawn = words.pairs(dice, COMMON + n)
  common, others = drawn[:COMMON], drawn[COMMON:]
  every = dice.shuffled(common * times[0] + others * times[1])
  listed = ' '.join(f'{i}. {word}' for i, word in enumerate(every, 1))
  return f'Some words of this list occur more often than the others.\n\n{listed}\n\nWhich {COMMON} words occur most often? Answer:', common


def frequent_words(task: str, dice: Dice, room: Room, material: Material) -> Example:
  """Words of a made-up language, the k-th occurring in proportion to k^-2; the first is noise, the next three are asked for."""

  def build(n: int) -> Example:
    counts = [count for k in itertools.takewhile(lambda k: _count(n, k) >= 1, itertools.count(1)) if (count := int(_count(n, k)))]
    coded = _coded(dice.split('words'), len(counts) - 1)
    every = [word for word, count in zip([NOISE, *coded], counts, strict=True) for _ in range(count)]
    text = ' '.join(dice.split('order').shuffled(every))
    prompt = (
      f'In this coded text find the {FREQUENT} words that occur most often; the dots are no word.\n\n{text}\n\n'
      f'Which {FREQUENT} words occur most often? Answer:'
    )
    return Example(prompt, tuple(coded[:FREQUENT]), facts={'words': len(every)})

  # From here on each of the words that are asked for occurs more often than the next.
  return room.fill(task, build, ANSWER_TOKENS[task], least=80)


def _count(n: int, k: int) -> float:
  return n * k**-EXPONENT / 1.6449340668482264  # zeta(2)


def _coded(dice: Dice, n: int) -> list[str]:
  letters = 'abcdefghijklmnopqrstuvwxyz'
  found: dict[str, None] = {}
  while len(found) < n:  # of 26^6
    found[''.join(dice.choice(letters) for _ in range(6))] = None
  return list(found)
