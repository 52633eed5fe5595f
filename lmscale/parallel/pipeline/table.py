"""The table that a pipeline runs: what each device does in each tick, and in which slots things wait meanwhile."""

from typing import NamedTuple

import numpy as np

COLUMNS = (
  'forward_chunk', 'forward_microbatch', 'forward_activation', 'forward_residual',
  'backward_chunk', 'backward_microbatch', 'backward_activation', 'backward_cotangent', 'backward_residual',
  'receive_activation', 'receive_cotangent',
)  # fmt: skip
BUFFERS = ('activation', 'cotangent', 'residual')
NOTHING = -1  # in a cell; as the index of a buffer with one row more than slots it is that row, where rubbish may go


class Table(NamedTuple):
  """What each device does in each tick.

  cells: int32 [ticks, pipe, COLUMNS]. Chunk and microbatch of the task; the slots of its input (`activation`; stage 0 reads
  tokens and has none), of the gradient of its output (`cotangent`; the last stage's comes from the loss) and of what the
  forward pass keeps for the backward one (`residual`); the slots that take what arrives at the end of the tick.
  slots: rows of each of `BUFFERS` that the fullest device needs.
  """

  schedule: str
  pipe: int
  microbatches: int
  virtual: int
  cells: np.ndarray
  slots: dict[str, int]

  @property
  def ticks(self) -> int:
    return len(self.cells)

  @property
  def stages(self) -> int:
    return self.pipe * self.virtual

  @property
  def trains(self) -> bool:
    return self.schedule != 'forward'

  def column(self, name: str) -> np.ndarray:
    """int32 [ticks, pipe]"""
    return self.cells[:, :, COLUMNS.index(name)]

  def stage(self, phase: str) -> np.ndarray:
    """The stage whose `forward` or `backward` task runs, NOTHING where none does. int [ticks, pipe]"""
    chunk = self.column(f'{phase}_chunk')
    return np.where(chunk == NOTHING, NOTHING, chunk * self.pipe + np.arange(self.pipe))
