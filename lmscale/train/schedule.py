"""Which samples and which learning rate a step has: a pure function of the config and the step number.

Nothing is accumulated from step to step, so a resumed run, a reordered loop and what is computed for step 10^6 all agree. Sizes
are integers throughout; only the learning rate is a float.
"""

import bisect
import dataclasses
import math

from lmscale.config import Config, OptimizerConfig, batch_segments


@dataclasses.dataclass(frozen=True)
class StepInputs:
  """One optimizer step: it reads samples first_sample .. first_sample + batch - 1."""

  step: int  # steps taken before this one
  first_sample: int
  batch: int  # sequences
  tokens: int  # tokens consumed before this step, first_sample * seq_len
  learning_rate: float


class Schedule:
  """The batch sizes and learning rates of a whole run.

  The batch grows in equal steps spread evenly over train.ramp_tokens consumed tokens, see `ramp.batch_segments`.
  """

  def __init__(self, config: Config):
    self._config = config
    self._seq_len = config.train.seq_len
    self._segments = batch_segments(config.train)
    self._starts = [start for start, _, _ in self._segments]
    self.steps = config.train.steps
    self.total_samples = self._position(self.steps)[0]
    self.total_tokens = self.total_samples * self._seq_len

  def inputs(self, step: int) -> StepInputs:
    """Of step `step` (from 0), in any order and also beyond the run's last step."""
    first_sample, batch = self._position(step)
    after = (first_sample + batch) * self._seq_len
    rate = learning_rate(self._config.optimizer, after, self.total_tokens)
    return StepInputs(step, first_sample, batch, first_sample * self._seq_len, rate)

  def _position(self, step: int) -> tuple[int, int]:
    start, first_sample, batch = self._segments[bisect.bisect_right(self._starts, step) - 1]
    return first_sample + (step - start) * batch, batch

  def piece_starts(self, steps: int) -> set[int]:
    """Those of the steps 0 .. steps - 1 from which on another batch size or another formula of the learning rate holds."""

    def after(step: int) -> int:
      return sum(self._position(step)) * self._seq_len

    ends = [tokens for tokens, _ in _pieces(self._config.optimizer, self.total_tokens)]
    starts = [0, *self._starts, *(bisect.bisect_left(range(steps), tokens, key=after) for tokens in ends if tokens < math.inf)]
    return {step for step in starts if step < steps}

  def rate_formula(self, step: int) -> tuple:
    """What the learning rate of a step is computed by: equal ones give equal rates at equal tokens."""
    return _piece(self._config.optimizer, sum(self._position(step)) * self._seq_len, self.total_tokens)


def first_difference(a: Schedule, b: Schedule, steps: int) -> int | None:
  """The first of the steps 0 .. steps - 1 whose samples or learning rate are not exactly the same in both; None if all are.

  Stretches in which both follow one formula are compared as such, so that a run of many steps takes no time.
  """
  starts = sorted(a.piece_starts(steps) | b.piece_starts(steps))
  for start, stop in zip(starts, [*starts[1:], steps], strict=True):
    if a.inputs(start) == b.inputs(start) and a.rate_formula(start) == b.rate_formula(start):
      continue
    for step in range(start, stop):
      if a.inputs(step) != b.inputs(step):
        return step
  return None


def learning_rate(optimizer: OptimizerConfig, tokens: int, total_tokens: int) -> float:
  """The learning rate of the step that ends with `tokens` consumed (so the first step's is not 0).

  Linear warm-up over warmup_tokens, then by optimizer.schedule: `cosine` to min_learning_rate at decay_tokens; `wsd`
  stays, then falls linearly over the last wsd_decay_tokens before decay_tokens; `constant`. decay_tokens = 0 means
  total_tokens. After decay_tokens the rate is min_learning_rate.
  """
  match _piece(optimizer, tokens, total_tokens):
    case 'warmup', peak, end:
      return peak * tokens / end
    case 'constant', rate:
      return rate
    case shape, peak, low, begin, end:
      share = (tokens - begin) / (end - begin)
      if shape == 'cosine':
        share = (1 - math.cos(math.pi * share)) / 2
      return peak - (peak - low) * share


def _piece(optimizer: OptimizerConfig, tokens: int, total_tokens: int) -> tuple:
  """The formula that holds for the step that ends with `tokens` consumed."""
  return next(formula for end, formula in _pieces(optimizer, total_tokens) if tokens < end)


def _pieces(optimizer: OptimizerConfig, total_tokens: int) -> list[tuple[float, tuple]]:
  """The formulas of the learning rate in order, with the tokens that each holds below."""
  peak, low = optimizer.learning_rate, optimizer.min_learning_rate
  pieces = [(optimizer.warmup_tokens, ('warmup', peak, optimizer.warmup_tokens))]
  if optimizer.schedule == 'constant':
    return [*pieces, (math.inf, ('constant', peak))]
  end = optimizer.decay_tokens or total_tokens
  begin = optimizer.warmup_tokens if optimizer.schedule == 'cosine' else end - optimizer.wsd_decay_tokens
  decay = (optimizer.schedule, peak, low, begin, end) if low < peak else ('constant', peak)
  return [*pieces, (min(begin + 1, end), ('constant', peak)), (end, decay), (math.inf, ('constant', low))]
