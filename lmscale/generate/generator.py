"""Prompts in, tokens out: what a training run's samples, the job `generate`, evaluation and the tools share."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lmscale.config import ConfigError, GenerateConfig, ModelConfig
from lmscale.generate.choose import Sampling
from lmscale.generate.engine import IDLE, STATE, Engine
from lmscale.generate.ragged import chunks

AHEAD = 4  # steps that are dispatched and not read: those that a batch runs too many when its rows stop
ROOM = 256  # tokens by which a cache grows at least, so that programs are used again

Watch = Callable[[int, int], bool]  # (index of the prompt, token) -> whether to stop there


class Drawn(NamedTuple):
  """A token of prompt number `prompt`. finish: of its last one, 'length' or 'stop', else ''."""

  prompt: int
  token: int
  finish: str


@dataclasses.dataclass
class Continuation:
  """What follows a prompt: tokens, the last one included that made it stop, and why it ended ('length' or 'stop')."""

  ids: list[int] = dataclasses.field(default_factory=list)
  finish: str = ''


class Generator:
  """Generates with one engine. ids: the tokenizer's size, where the vocabulary has more rows; others are never drawn."""

  def __init__(self, engine: Engine, ids: int | None = None):
    self.engine = engine
    self.ids = ids or engine.setup.config.model.vocab

  def generate(
    self, prompts: Sequence[Sequence[int]], options: GenerateConfig, seed: int, end: int | None = None,
    watch: Watch = lambda prompt, token: False,
  ) -> Iterator[Drawn]:  # fmt: skip
    """The tokens after each prompt, as they are made: options.batch prompts at a time, in order, a token of each in turn.

    A prompt ends after options.tokens, at the token `end`, or where `watch` says so. (options.stop is the matter of `text`.)
    What follows a prompt depends on the prompt, its index, the seed and the options, not on the prompts beside it, but for the
    rounding of matrix products of another batch size.

    Raises:
      ConfigError: an empty prompt, ids that the model has not, or more tokens than it has positions.
    """
    prompts = [np.asarray(prompt, np.int64) for prompt in prompts]
    check_prompts(self.engine.setup.config.model, prompts, options)
    rows = round_up(min(options.batch, max(len(prompts), 1)), self.engine.ranks)
    for first in range(0, len(prompts), rows):
      yield from _Batch(self, prompts[first : first + rows], first, rows, options, seed, end, watch).run()


class _Batch:
  """Some prompts in the rows of one cache, from the first token to the last."""

  def __init__(self, generator: Generator, prompts: list[np.ndarray], first: int, rows: int, options: GenerateConfig,
               seed: int, end: int | None, watch: Watch):  # fmt: skip
    self._engine, self._ids, self._options = generator.engine, generator.ids, options
    self._prompts, self._first, self._rows = prompts, first, rows
    self._seed, self._end, self._watch = seed, end, watch
    self._live = np.arange(rows) < len(prompts)

  def run(self) -> Iterator[Drawn]:
    """Steps are read some steps after they were dispatched, so that the devices do not wait for the host."""
    caches, state = self.prefill()
    options, engine = self._options, self._engine
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    seed, live = engine.put(np.uint32(self._seed % 2**32), whole=True), engine.put(self._live)
    unread: collections.deque = collections.deque()
    for number in range(options.tokens):
      chosen, state, caches = engine.step(caches, state, live, seed, sampling, self._ids)
      unread.append((chosen, number))
      if len(unread) > AHEAD:
        before = self._live.copy()
        yield from self.read(*unread.popleft())
        if not self._live.any():
          return
        if (before != self._live).any():
          live = engine.put(self._live)
    for chosen, number in unread:
      yield from self.read(chosen, number)

  def prefill(self) -> tuple:
    """Reads all but each prompt's last token, which the first step reads."""
    counts = np.zeros(self._rows, np.int32)
    counts[: len(self._prompts)] = [len(prompt) - 1 for prompt in self._prompts]
    length = cache_length(int(counts.max()) + 1 + self._options.tokens)
    caches, width = self._engine.empty(self._rows, length), min(self._options.prefill_chunk, length)
    for chunk in chunks([prompt[:-1] for prompt in self._prompts], np.zeros_like(counts), width):
      _, caches = self._engine.prefill(caches, *chunk[1:])
    return caches, {name: self._engine.put(values) for name, values in self._begin(counts).items()}

  def _begin(self, counts: np.ndarray) -> dict[str, np.ndarray]:
    last = np.zeros(self._rows, np.int32)
    last[: len(self._prompts)] = [prompt[-1] for prompt in self._prompts]
    prompts = (self._first + np.arange(self._rows)).astype(np.int32)
    slots = np.where(self._live, counts, IDLE).astype(np.int32)
    return dict(zip(STATE, (last, counts, slots, prompts, np.zeros(self._rows, np.int32)), strict=True))

  def read(self, chosen: object, number: int) -> Iterator[Drawn]:
    """The tokens of step `number` of the rows that go on; those that end there are no longer live."""
    tokens = np.asarray(chosen)
    for row in np.flatnonzero(self._live):
      token, prompt = int(tokens[row]), self._first + int(row)
      stopped = token == self._end or self._watch(prompt, token)
      finish = 'stop' if stopped else 'length' if number == self._options.tokens - 1 else ''
      self._live[row] = not finish
      yield Drawn(prompt, token, finish)


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], options: GenerateConfig) -> None:
  """Raises ConfigError where a model cannot continue one of the prompts."""
  for number, prompt in enumerate(prompts, 1):
    if not len(prompt):
      raise ConfigError(f'prompt {number}: no tokens; begin with the token that ends a document')
    if min(prompt) < 0 or max(prompt) >= config.vocab:
      raise ConfigError(f'prompt {number}: ids from {min(prompt)} to {max(prompt)}, the model has 0 to {config.vocab - 1}')
    total = len(prompt) + options.tokens
    if config.positions == 'learned' and total > config.max_positions:
      raise ConfigError(
        f'prompt {number}: {len(prompt)} tokens + generate.tokens {options.tokens} = {total} exceed model.max_positions '
        f'{config.max_positions}; generate fewer or shorten the prompt'
      )


def collect(drawn: Iterable[Drawn], prompts: int) -> list[Continuation]:
  """All that follows each of `prompts` prompts."""
  found = [Continuation() for _ in range(prompts)]
  for one in drawn:
    found[one.prompt].ids.append(one.token)
    found[one.prompt].finish = one.finish
  return found


def cache_length(tokens: int) -> int:
  """Room for at least so many tokens: a multiple of a quarter of the power of two below, so that few lengths are compiled."""
  return round_up(tokens, max(ROOM, 1 << max(tokens.bit_length() - 3, 0)))


def round_up(number: int, unit: int) -> int:
  """The least multiple of `unit` that is not below `number`."""
  return -(-number // unit) * unit
