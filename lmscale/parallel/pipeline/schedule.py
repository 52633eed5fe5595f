"""Pipeline schedules: orders of tasks -> ticks -> a table with a slot for everything that waits. NumPy only.

A stage is a stretch of layers. With `virtual` > 1 each device has several: stage u lies on device u % pipe, as its chunk
u // pipe (arXiv 2104.04473, section 2.2). A task is one stage's forward (F) or backward (B) pass over one microbatch.
All devices walk the table in lock step. A tick is a forward, then a backward task, either may be missing, then a message to
each neighbour in the ring: the output to the next device, the gradient of the input to the one before.

  gpipe        all forwards, then all backwards: every microbatch is in flight at once (arXiv 1811.06965)
  1f1b         a forward and a backward in each tick; 2 (pipe - 1 - device) + 1 microbatches in flight
  1f1b_strict  one task in each tick; pipe - device in flight, as in the papers, but a tick waits for the slowest task
  interleaved  1f1b over several stages a device, the microbatches in groups of `pipe`
  forward      evaluation

With F and B in one tick a tick costs F + B everywhere, so that lock step costs nothing beside the papers' bubble; with one
task a tick it would cost max(F, B), as neighbours do F and B in turns.
Room for more: a weight-gradient task of its own is a third kind, a phase, and a rule of what it waits for in `pack`; a cut
sequence is one more number of a task.
"""

import functools
import itertools

import numpy as np

from lmscale.parallel.pipeline.replay import validate
from lmscale.parallel.pipeline.table import BUFFERS, COLUMNS, NOTHING, Table

SCHEDULES = ('gpipe', '1f1b', '1f1b_strict', 'interleaved', 'forward')
F, B = 0, 1
PHASES = ('forward', 'backward', 'receive')  # of a tick, in this order
NEVER = np.iinfo(np.int32).max


@functools.lru_cache(maxsize=4)
def make_table(schedule: str, pipe: int, microbatches: int, virtual: int = 1) -> Table:
  """The validated table of one of `SCHEDULES`; its cells may not be written.

  Raises:
    ValueError: `interleaved` and microbatches that are no multiple of pipe, or no such schedule.
  """
  order = np.array([_order(schedule, device, pipe, microbatches, virtual) for device in range(pipe)])
  when = pack(order, ((F, B),) if schedule == '1f1b_strict' else ((F,), (B,)))
  table = allocate(schedule, pipe, when)
  validate(table)
  table.cells.flags.writeable = False
  return table


def _order(schedule: str, device: int, pipe: int, microbatches: int, virtual: int) -> np.ndarray:
  """The tasks of a device: `ahead` forwards, one backward and one forward in turns, the backwards that are left.

  int [tasks, (kind, stage, microbatch)]
  """
  if schedule not in SCHEDULES:
    raise ValueError(f'{schedule!r} is not one of {", ".join(SCHEDULES)}')
  if schedule == 'interleaved' and microbatches % pipe:
    raise ValueError(f'interleaved: {microbatches} microbatches are not a multiple of {pipe} devices')
  stages = range(device, pipe * virtual, pipe)
  groups = [range(i, min(i + pipe, microbatches)) for i in range(0, microbatches, pipe)]
  forward = [(F, u, j) for group in groups for u in stages for j in group]
  backward = [(B, u, j) for group in groups for u in reversed(stages) for j in group]
  if schedule == 'forward':
    return np.array(forward)
  further = pipe - 1 - device  # devices behind this one
  ahead = {'gpipe': len(forward), '1f1b_strict': further}.get(schedule, 2 * further + (virtual - 1) * pipe)
  turns = [task for pair in zip(forward[ahead:], backward, strict=False) for task in pair]
  return np.array(forward[:ahead] + turns + backward[len(turns) // 2 :])


def pack(order: np.ndarray, phases: tuple[tuple[int, ...], ...] = ((F,), (B,))) -> np.ndarray:
  """Puts each task into the first tick that its device's order and its inputs allow.

  order: int [pipe, tasks, (kind, stage, microbatch)]. phases: of a tick; in each a device does one task of these kinds.
  Returns the tick of each task, int [kind, stage, microbatch], NEVER for one that is in no order.

  Raises:
    ValueError: the orders wait for each other.
  """
  pipe, tasks = order.shape[:2]
  stages, microbatches = order[..., 1].max() + 1, order[..., 2].max() + 1
  when = np.full((2, stages + 1, microbatches), NEVER).tolist()  # lists: they are read one by one
  for kind in (F, B):
    when[kind][stages] = [-1] * microbatches  # the sender of the first stage's input and of the last one's gradient
  orders, place, now = order.tolist(), [0] * pipe, 0
  while min(place) < tasks:
    begun = sum(place)
    for device, kinds in itertools.product(range(pipe), phases):
      if place[device] == tasks:
        continue
      kind, u, j = orders[device][place[device]]
      sent = when[kind][u - 1 if kind == F else u + 1][j] < now
      if kind in kinds and sent and (kind == F or when[F][u][j] <= now):
        when[kind][u][j] = now
        place[device] += 1
    if sum(place) == begun:
      raise ValueError(f'the orders deadlock in tick {now}: every device waits for another')
    now += 1
  return np.array(when)[:, :stages]


def allocate(schedule: str, pipe: int, when: np.ndarray) -> Table:
  """Writes packed tasks as a table, with as few slots as possible. when: see `pack`."""
  _, stages, microbatches = when.shape
  trains = schedule != 'forward'
  cells = np.full((when[when < NEVER].max() + 1, pipe, len(COLUMNS)), NOTHING, np.int32)
  u, j = np.indices(when.shape[1:])
  for kind, phase in ((F, 'forward'), (B, 'backward'))[: 1 + trains]:
    cells[when[kind], u % pipe, COLUMNS.index(f'{phase}_chunk')] = u // pipe
    cells[when[kind], u % pipe, COLUMNS.index(f'{phase}_microbatch')] = j
  read = [('forward', when[F]), ('backward', when[B])][: 1 + trains]
  uses = {  # of each thing that waits: its slot is written in the first, read in the others
    'activation': [('receive', when[F, :-1]), *((phase, ticks[1:]) for phase, ticks in read)],
    'cotangent': [('receive', when[B, 1:]), ('backward', when[B, :-1])],
    'residual': read,
  }
  slots = dict.fromkeys(BUFFERS, 0)
  for buffer in BUFFERS if trains else ('activation',):
    # Of all stages but one, which gets nothing by message, or of all.
    stage = {'activation': u[1:], 'cotangent': u[:-1]}.get(buffer, u)
    for device in range(pipe):
      mine = [(phase, ticks[stage % pipe == device]) for phase, ticks in uses[buffer]]
      first, last = (3 * ticks + PHASES.index(phase) for phase, ticks in (mine[0], mine[-1]))
      slot = colour(first, last)
      slots[buffer] = max(slots[buffer], slot.max(initial=-1) + 1)
      for phase, ticks in mine:
        cells[ticks, device, COLUMNS.index(f'{phase}_{buffer}')] = slot
  return Table(schedule, pipe, microbatches, stages // pipe, cells, {buffer: int(n) for buffer, n in slots.items()})


def colour(first: np.ndarray, last: np.ndarray) -> np.ndarray:
  """A slot for each interval [first, last], none for two that touch, as few as possible. int [intervals]

  With n at most at a time, at the k-th beginning more than k - n have ended: it takes the slot of the (k - n)-th that ended.
  """
  begun, ended = np.argsort(first, kind='stable'), np.argsort(last, kind='stable')
  gone = np.searchsorted(last[ended], first[begun])  # ended before each beginning
  n = int((np.arange(len(first)) + 1 - gone).max(initial=0))
  slot = [0] * len(first)
  for k, (i, freed) in enumerate(zip(begun.tolist(), [-1] * n + ended.tolist(), strict=False)):
    slot[i] = k if k < n else slot[freed]
  return np.array(slot, np.int32)
