"""Which samples and which learning rate a step has: a pure function of the config and the step number.

Nothing is accumulated from step to step, so a resumed run, a reordered loop and a plan for step 10^6 all agree. Sizes
are integers throughout; only the learning rate is a float.
"""

import bisect
import dataclasses
import math

from lmscale.config import Config, OptimizerConfig, batch_segments


@dataclasses.dataclass(frozen=True)
class StepPlan:
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

  def plan(self, step: int) -> StepPlan:
    """The plan of step `step` (from 0), in any order and also beyond the run's last step."""
    first_sample, batch = self._position(step)
    after = (first_sample + batch) * self._seq_len
    rate = learning_rate(self._config.optimizer, after, self.total_tokens)
    return StepPlan(step, first_sample, batch, first_sample * self._seq_len, rate)

  def _position(self, step: int) -> tuple[int, int]:
    start, first_sample, batch = self._segments[bisect.bisect_right(self._starts, step) - 1]
    return first_sample + (step - start) * batch, batch


def learning_rate(optimizer: OptimizerConfig, tokens: int, total_tokens: int) -> float:
  """The learning rate of the step that ends with `tokens` consumed (so the first step's is not 0).

  Linear warm-up over warmup_tokens, then by optimizer.schedule: `cosine` to min_learning_rate at decay_tokens; `wsd`
  stays, then falls linearly over the last wsd_decay_tokens before decay_tokens; `constant`. decay_tokens = 0 means
  total_tokens. After decay_tokens the rate is min_learning_rate.
  """
  peak, low = optimizer.learning_rate, optimizer.min_learning_rate
  if tokens < optimizer.warmup_tokens:
    return peak * tokens / optimizer.warmup_tokens
  if optimizer.schedule == 'constant':
    return peak
  end = optimizer.decay_tokens or total_tokens
  begin = optimizer.warmup_tokens if optimizer.schedule == 'cosine' else end - optimizer.wsd_decay_tokens
  if tokens >= end:
    return low
  if tokens <= begin:
    return peak
  share = (tokens - begin) / (end - begin)
  if optimizer.schedule == 'cosine':
    share = (1 - math.cos(math.pi * share)) / 2
  return peak - (peak - low) * share
