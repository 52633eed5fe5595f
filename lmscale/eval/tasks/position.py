"""The loss of a text's tokens against how many tokens the model has read before them: what a longer context is worth to it."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmscale.data.synthetic.dice import Dice
from lmscale.data.tokenizer import Tokenizer
from lmscale.errors import ConfigError
from lmscale.eval.requests import Window
from lmscale.eval.tasks.sample import Sample

NAME = 'loss_by_position'
SHORTEST = 1.3  # of the last bin: its last position over its first


def bins(tokens: int) -> list[tuple[int, int]]:
  """(first, last) position of each of the bins into which positions 1 .. tokens are cut, two for every doubling."""
  edges = sorted({round(2 ** (k / 2)) for k in range(2 * tokens.bit_length())})
  firsts = [edge for edge in edges if edge == 1 or SHORTEST * edge <= tokens]
  return list(zip(firsts, [*(first - 1 for first in firsts[1:]), tokens], strict=True))


def samples(texts: Sequence[str], tokenizer: Tokenizer, tokens: int, number: int, seed: int) -> list[Sample]:
  """Windows of `tokens` tokens, one behind the other from each text's beginning on; `number` of them, drawn, or (0) all.

  All windows have every position, so no position is of other texts than the rest; what is left at the end of a text is not asked.

  Raises:
    ConfigError: no text is so long.
  """
  windows, longest = [], 0
  for text in texts:
    ids = tokenizer.encode(text)
    longest = max(longest, len(ids))
    windows += [ids[start : start + tokens] for start in range(0, len(ids) - tokens + 1, tokens)]
  if not windows:
    raise ConfigError(f'task {NAME}: no text has {tokens} tokens, the longest has {longest}; give shorter lengths, or longer texts')
  if 0 < number < len(windows):
    windows = [windows[i] for i in sorted(Dice('windows', seed).distinct(number, len(windows)))]
  return [Sample((Window(tuple(map(int, ids))),), _score) for ids in windows]


def _score(answers: Sequence[np.ndarray]) -> dict[str, float]:
  """The mean loss of the window, and of each bin of it."""
  nats = -answers[0]
  return {'loss': math.fsum(nats) / len(nats)} | {f'{a}-{b}': float(nats[a - 1 : b].mean()) for a, b in bins(len(nats))}


def by_position(scores: dict[str, Any]) -> dict[str, Any]:
  """Scores of a task whose metrics are those of `_score`, with the bins apart: loss, loss_stderr, samples, by_position."""
  found = {key: value for key, value in scores.items() if not key[0].isdigit()}
  names = [key for key in scores if key[0].isdigit() and not key.endswith('_stderr')]
  return found | {'by_position': {name: {'loss': scores[name], 'loss_stderr': scores[f'{name}_stderr']} for name in names}}
