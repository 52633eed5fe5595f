"""The layers of a model as the stacks of pipeline stages, and the tables by which a stage finds its layers in them.

Each kind of layer has one stack, cut over `pipe`: a device's rows are its layers of that kind, first those of its first
stage. Stages need not be alike: a device with fewer layers of a kind than another has rows of zeros instead.
"""

from typing import NamedTuple

import numpy as np

from lmscale.config import Config
from lmscale.models.flops import head_flops, layer_flops
from lmscale.models.stacking import FILLER, Stack, Stacking
from lmscale.parallel.pipeline.schedule import make_table
from lmscale.parallel.pipeline.stages import cut_layers, device_layers
from lmscale.parallel.pipeline.table import NOTHING, Table


def stage_layers(config: Config) -> list[range]:
  """Canonical layer indices of each of the pipe * virtual stages: see `cut_layers`, with the FLOPs of a step as costs."""
  mesh = config.mesh
  layers, head = step_flops(config)
  last = 0 if mesh.vocab_on_pipe else sum(head)
  return cut_layers(config.model.pattern, mesh.pipe * mesh.virtual, [sum(both) for both in layers], last)


def step_flops(config: Config) -> tuple[list[tuple[int, int]], tuple[int, int]]:
  """(forward, backward) FLOPs per token of each layer and of the head, as they are executed.

  train.remat=full does a layer's forward pass again in the backward one; what `selective` does again is left out.
  """
  back = 3 if config.train.remat == 'full' else 2
  head = head_flops(config.model)
  return [(f, back * f) for f in layer_flops(config.model, config.train.seq_len)], (head, 2 * head)


def microbatches(config: Config) -> int:
  """Of each data rank in one step of the full batch."""
  return -(-config.train.batch // (config.train.microbatch * config.mesh.data))


def step_table(config: Config, count: int | None = None) -> Table:
  """The timetable of one step of `count` microbatches, by default those of the full batch."""
  mesh = config.mesh
  return make_table(mesh.schedule, mesh.pipe, microbatches(config) if count is None else count, mesh.virtual)


def forward_table(config: Config, count: int | None = None) -> Table:
  """The timetable of an evaluation of `count` microbatches, by default (and at most) mesh.pipe."""
  return make_table('forward', config.mesh.pipe, count or config.mesh.pipe, config.mesh.virtual)


def stage_stacking(config: Config) -> Stacking:
  """One run of one stack for each kind of layer."""
  kinds, devices = _kinds_and_devices(config)
  rows = {kind: [[i for i in layers if config.model.layers[i] == kind] for layers in devices] for kind in kinds}

  def stack(kind: str) -> Stack:
    most = max(map(len, rows[kind]))
    return Stack(kind, tuple(i for mine in rows[kind] for i in [*mine, *[FILLER] * (most - len(mine))]))

  return tuple((stack(kind),) for kind in kinds)


def kept_slots(config: Config, table: Table) -> tuple[int, int]:
  """(of the microbatches in flight on a device, how many have what their layers save stored; 1 where others are done again)."""
  wanted, most = config.train.stored_microbatches, table.slots['residual']
  stored = min(wanted, most) if config.train.remat == 'full' else most
  return stored, int(stored < most)


def done_again(config: Config) -> float:
  """The share of the forward tasks in a step that train.remat=full does again: of those whose microbatch is not stored."""
  if config.train.remat != 'full':
    return 0.0
  if config.mesh.pipe == 1:
    return 1.0
  table = step_table(config)
  slots = table.column('backward_residual')
  return float(np.mean(slots[slots != NOTHING] >= kept_slots(config, table)[0]))


class Places(NamedTuple):
  """Where the layers of each device's stages are, in the order in which they are executed; NOTHING behind a short stage's last.

  int32 [pipe, virtual + 1, layers], the last stage empty: index NOTHING. kind: the index of the stack. row: in the device's
  part of it. rank: among the stage's layers of that kind. kinds: of the stacks. most: of each, how many the fullest stage has.
  """

  kind: np.ndarray
  row: np.ndarray
  rank: np.ndarray
  kinds: tuple[str, ...]
  most: tuple[int, ...]


def stage_places(config: Config) -> Places:
  """The tables of `Places` for the stacks of `stage_stacking`."""
  kinds, devices = _kinds_and_devices(config)
  stages, mesh, layers = stage_layers(config), config.mesh, config.model.layers
  tables = np.full((3, mesh.pipe, mesh.virtual + 1, max(map(len, stages))), NOTHING, np.int32)
  for u, stage in enumerate(stages):
    chunk, device = divmod(u, mesh.pipe)
    for position, layer in enumerate(stage):
      before = [i for i in devices[device][: devices[device].index(layer)] if layers[i] == layers[layer]]
      rank = sum(i in stage for i in before)
      tables[:, device, chunk, position] = kinds.index(layers[layer]), len(before), rank
  parts = [layers[stage.start : stage.stop] for stage in stages]
  return Places(*tables, tuple(kinds), tuple(max(part.count(kind) for part in parts) for kind in kinds))


def _kinds_and_devices(config: Config) -> tuple[list[str], list[list[int]]]:
  """The kinds in the order in which they first occur, and the canonical layers of each device."""
  return list(dict.fromkeys(config.model.layers)), device_layers(stage_layers(config), config.mesh.pipe)
