"""Fits an example into a number of tokens, by whatever tokenizer, in few tries."""

import dataclasses
from collections.abc import Callable

from lmscale.data.synthetic.example import Example
from lmscale.errors import ConfigError

TRIES = 20  # of a length, each a text that is made and tokenised
CLOSE = 0.97  # of the room: long enough


@dataclasses.dataclass(frozen=True)
class Room:
  """tokens: that prompt and answer may have together. count: the tokens of a text."""

  tokens: int
  count: Callable[[str], int]

  def fill(self, task: str, build: Callable[[int], Example], answer_tokens: int, least: int = 1, most: int = 1 << 24) -> Example:
    """build(n) with an n from `least` to `most` such that it fits, near the largest there is. Tokens grow with n, nearly in proportion.

    answer_tokens: that an answer may have; where the right one has more, it is those that are left for it.

    Raises:
      ConfigError: not even `least` fits.
    """
    best = build(least)
    used = self._used(best, answer_tokens)
    if used > self.tokens:
      raise ConfigError(f'task {task}: {self.tokens} tokens are too few: its shortest prompt and answer need {used}')
    low, low_used, high, high_used = least, used, most + 1, 0  # high does not fit; its tokens are known where high_used is not 0
    for i in range(TRIES):
      if low_used >= CLOSE * self.tokens or high - low <= 1:
        break
      if high_used and i % 3 == 2:
        n = (low + high) // 2
      elif high_used:
        n = low + int((high - low) * (self.tokens - low_used) / (high_used - low_used))
      elif low_used > used:
        n = low + int((low - least) * (self.tokens - low_used) / (low_used - used))
      else:
        n = 2 * low + 8
      n = min(max(n, low + 1), high - 1)
      made = build(n)
      found = self._used(made, answer_tokens)
      if found <= self.tokens:
        best, low, low_used = made, n, found
      else:
        high, high_used = n, found
    return best

  def _used(self, example: Example, answer_tokens: int) -> int:
    return self.count(example.prompt) + max(answer_tokens, self.count(f' {example.answer}'))
