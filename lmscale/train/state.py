"""What a step reads and writes."""

from typing import Any

from flax import struct

BOOKKEEPING = ('step', 'skipped', 'spikes', 'norms')  # the fields that are neither parameters nor the optimizer's


@struct.dataclass
class TrainState:
  """The whole training state, a pytree.

  params: master parameters (float32, or float64 in a float64 run). opt_state: the optimizer's, same shapes.
  step: int32 scalar, steps taken. skipped: int32 scalar, steps skipped because loss or gradient was not finite.
  spikes: int32 scalar, steps skipped because the gradient's norm was a spike. norms: those of the last steps, see `train.spikes`.
  """

  params: Any
  opt_state: Any
  step: Any
  skipped: Any
  spikes: Any
  norms: Any
