"""The batch-size ramp as stretches of equal batch size: pure integer arithmetic on `TrainConfig`."""

from lmscale.config.fields import TrainConfig


def batch_segments(train: TrainConfig) -> list[tuple[int, int, int]]:
  """Stretches of equal batch size: (first step, its first sample, batch size). The last one has no end.

  The batch grows from ramp_start to batch in L = (batch - ramp_start) / ramp_increment steps spread evenly over
  ramp_tokens consumed tokens (arXiv 2201.11990): level k starts at the first step that finds k * ramp_tokens / L
  tokens consumed.
  """
  if not train.ramp_start:
    return [(0, 0, train.batch)]
  levels = (train.batch - train.ramp_start) // train.ramp_increment
  scale = train.seq_len * levels  # compare samples * seq_len with k * ramp_tokens / levels without dividing
  segments, step, sample = [], 0, 0
  for level in range(levels):
    batch = train.ramp_start + level * train.ramp_increment
    left = (level + 1) * train.ramp_tokens - sample * scale
    steps = max(0, -(-left // (batch * scale)))
    if steps:  # a level shorter than the step before it is passed over
      segments.append((step, sample, batch))
    step, sample = step + steps, sample + steps * batch
  return [*segments, (step, sample, train.batch)]


def run_tokens(train: TrainConfig) -> int:
  """Tokens that train.steps steps consume, the ramp included."""
  step, sample, batch = max(s for s in batch_segments(train) if s[0] <= train.steps)
  return (sample + (train.steps - step) * batch) * train.seq_len
