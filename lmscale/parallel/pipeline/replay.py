"""A table walked through as the devices would: `validate` finds what would go wrong, `simulate` how long it takes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lmscale.parallel.pipeline.table import BUFFERS, COLUMNS, NOTHING, Table


def validate(table: Table) -> None:
  """Walks through the table with the names of stage and microbatch for arrays.

  Raises:
    ValueError: a task that runs twice, never, or without its inputs; a slot overwritten while in use or read when it holds
      something else; a message that nobody receives, or none where one is expected; a cell that means nothing.
  """
  walk = _Walk(table)
  for t, row in enumerate(table.cells.tolist()):
    cells = [dict(zip(COLUMNS, cell, strict=True)) for cell in row]
    outputs, gradients = [], []
    for device, cell in enumerate(cells):
      walk.tick, walk.device = t, device
      outputs.append(walk.forward(cell))
      gradients.append(walk.backward(cell))
    for device, cell in enumerate(cells):
      walk.tick, walk.device = t, device
      walk.receive('activation', cell['receive_activation'], outputs[device - 1])
      walk.receive('cotangent', cell['receive_cotangent'], gradients[(device + 1) % table.pipe])
  missing = table.stages * table.microbatches * (2 if table.trains else 1) - len(walk.done)
  if missing:
    raise ValueError(f'{missing} tasks never run')


class _Walk:
  """What every device holds between two tasks: (stage, microbatch) in each slot in use."""

  def __init__(self, table: Table):
    self.table = table
    self.held = [{buffer: {} for buffer in BUFFERS} for _ in range(table.pipe)]
    self.done: set[tuple[str, int, int]] = set()
    self.tick = self.device = 0

  def forward(self, cell: dict[str, int]) -> tuple[int, int] | None:
    """Runs the forward task of a cell; what it sends to the next device."""
    if (task := self._task('forward', cell)) is None:
      return None
    u, j = task
    self._read('activation', cell['forward_activation'], task if u else None, last=not self.table.trains)
    if self.table.trains:
      self._write('residual', cell['forward_residual'], task)
    elif cell['forward_residual'] != NOTHING:
      self._fail('a residual is kept though nothing goes backward')
    return (u + 1, j) if u + 1 < self.table.stages else None

  def backward(self, cell: dict[str, int]) -> tuple[int, int] | None:
    """Runs the backward task of a cell; what it sends to the device before."""
    if (task := self._task('backward', cell)) is None:
      return None
    if not self.table.trains:
      self._fail('a backward task in a forward table')
    u, j = task
    self._read('activation', cell['backward_activation'], task if u else None, last=True)
    self._read('cotangent', cell['backward_cotangent'], task if u + 1 < self.table.stages else None, last=True)
    self._read('residual', cell['backward_residual'], task, last=True)
    return (u - 1, j) if u else None

  def receive(self, buffer: str, slot: int, message: tuple[int, int] | None) -> None:
    if message is None and slot != NOTHING:
      self._fail(f'slot {slot} waits for a {buffer} that nobody sends')
    if message is not None:
      if slot == NOTHING:
        self._fail(f'nobody receives the {buffer} of stage {message[0]}, microbatch {message[1]}')
      self._write(buffer, slot, message)

  def _task(self, phase: str, cell: dict[str, int]) -> tuple[int, int] | None:
    chunk, j = cell[f'{phase}_chunk'], cell[f'{phase}_microbatch']
    if chunk == NOTHING:
      if any(value != NOTHING for name, value in cell.items() if name.startswith(phase)):
        self._fail(f'no {phase} task, but a part of one')
      return None
    if not (0 <= chunk < self.table.virtual and 0 <= j < self.table.microbatches):
      self._fail(f'{phase} of chunk {chunk}, microbatch {j}: there is no such task')
    task = (chunk * self.table.pipe + self.device, j)
    if (phase, *task) in self.done:
      self._fail(f'{phase} of stage {task[0]}, microbatch {j} runs twice')
    self.done.add((phase, *task))
    return task

  def _read(self, buffer: str, slot: int, expected: tuple[int, int] | None, last: bool) -> None:
    held = self.held[self.device][buffer]
    found = None if slot == NOTHING else held.get(slot, 'nothing')
    if found != expected:
      self._fail(f'{buffer} slot {slot} holds {found}, expected is (stage, microbatch) {expected}')
    if last:
      held.pop(slot, None)

  def _write(self, buffer: str, slot: int, value: tuple[int, int]) -> None:
    held = self.held[self.device][buffer]
    if not 0 <= slot < self.table.slots[buffer]:
      self._fail(f'{buffer} slot {slot} of {self.table.slots[buffer]}')
    if slot in held:
      self._fail(f'{buffer} slot {slot} is overwritten while it holds {held[slot]}')
    held[slot] = value

  def _fail(self, what: str) -> None:
    raise ValueError(f'tick {self.tick}, device {self.device}: {what}')


class Timing(NamedTuple):
  """Bubbles: overhead over the ideal time, in which every device works all the time. Messages cost nothing.

  lockstep: as the table is run, each tick waits for the slowest device. asynchronous: a bound for the same orders, each
  task waits for the device and for its inputs only.
  """

  lockstep: float
  asynchronous: float


def simulate(table: Table, forward: Sequence[float], backward: Sequence[float]) -> Timing:
  """How long a table takes. forward, backward: cost of each stage's task, in any one unit."""
  costs = sum(_per_tick(table, phase, cost) for phase, cost in _phases(table, forward, backward))
  ideal = costs.sum() / table.pipe
  ends = costs.max(axis=1).sum(), _asynchronous(table, forward, backward)
  return Timing(*(float(end / ideal) - 1 for end in ends))


def in_flight(table: Table, weights: Sequence[float] | None = None) -> np.ndarray:
  """The most (stage, microbatch)s of which a device has done the forward, not yet the whole backward pass: [pipe].

  weights: what each stage's counts, for example bytes; default 1. Zeros in a forward table: it keeps nothing.
  """
  if not table.trains:
    return np.zeros(table.pipe, np.int64)
  weights = np.ones(table.stages, np.int64) if weights is None else weights
  begun, ended = (np.cumsum(_per_tick(table, phase, weights), axis=0) for phase in ('forward', 'backward'))
  return np.max(begun - np.concatenate([np.zeros_like(ended[:1]), ended[:-1]]), axis=0)


def _phases(table: Table, forward: Sequence[float], backward: Sequence[float]) -> list[tuple[str, Sequence[float]]]:
  return [('forward', forward), ('backward', backward)][: 2 if table.trains else 1]


def _per_tick(table: Table, phase: str, values: Sequence[float]) -> np.ndarray:
  """values[stage] of the task that runs, 0 where none does: [ticks, pipe]."""
  stage = table.stage(phase)
  return np.where(stage == NOTHING, 0, np.asarray(values)[stage])


def _asynchronous(table: Table, forward: Sequence[float], backward: Sequence[float]) -> float:
  """The end of the last task when nobody waits for a tick."""
  ends = {phase: np.zeros((table.stages + 1, table.microbatches)).tolist() for phase in ('forward', 'backward')}
  free = [0.0] * table.pipe
  phases = [
    (ends[phase], cost, step, table.stage(phase).tolist(), table.column(f'{phase}_microbatch').tolist())
    for (phase, cost), step in zip(_phases(table, forward, backward), (-1, 1), strict=False)
  ]
  for t in range(table.ticks):
    for end, cost, step, stages, microbatches in phases:
      for device, (u, j) in enumerate(zip(stages[t], microbatches[t], strict=True)):
        if u != NOTHING:
          end[u][j] = free[device] = max(free[device], end[u + step][j]) + cost[u]  # row -1 is for no sender
  return max(free)
