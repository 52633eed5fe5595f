"""The pipeline of a config: which layers are in which stage, its timetable, and how much of the time devices wait."""

from collections.abc import Sequence
from typing import Any

from lmscale.config import Config
from lmscale.parallel.pipeline.replay import in_flight, simulate
from lmscale.parallel.pipeline.schedule import make_table
from lmscale.parallel.pipeline.stages import cut_layers, cut_text
from lmscale.parallel.pipeline.table import NOTHING, Table
from lmscale.plan.flops import head_flops, layer_flops

WIDTH = 116  # of the picture, in characters
DEVICES = 8  # shown in it
LEFT_OUT = '..'


def stage_layers(config: Config) -> list[range]:
  """Canonical layer indices of each of the pipe * virtual stages: see `cut_layers`, with the FLOPs of a step as costs."""
  model, mesh = config.model, config.mesh
  layers, head = _step_flops(config)
  return cut_layers(model.pattern, mesh.pipe * mesh.virtual, [sum(both) for both in layers], sum(head))


def _step_flops(config: Config) -> tuple[list[tuple[int, int]], tuple[int, int]]:
  """(forward, backward) FLOPs per token of each layer and of the head, as they are executed.

  train.remat=full does a layer's forward pass again in the backward one; what `selective` does again is left out.
  """
  back = 3 if config.train.remat == 'full' else 2
  head = head_flops(config.model)
  return [(f, back * f) for f in layer_flops(config.model, config.train.seq_len)], (head, 2 * head)


def microbatches(config: Config) -> int:
  """Of each data rank in one step of the full batch."""
  return -(-config.train.batch // (config.train.microbatch * config.mesh.data))


def step_table(config: Config) -> Table:
  """The timetable of one step of the full batch."""
  mesh = config.mesh
  return make_table(mesh.schedule, mesh.pipe, microbatches(config), mesh.virtual)


def pipeline_report(config: Config) -> dict[str, Any]:
  """What the plan says of a pipeline (mesh.pipe > 1), JSON-able. Bubbles are overhead over the ideal time.

  bubble: with a forward pass of 1 and a backward one of 2 for every stage, each tick waiting for the slowest device;
  bubble_async: the bound when no tick is waited for. bubble_flops: like `bubble`, with the FLOPs that each stage executes,
  the head in the last. in_flight: the most (microbatch, stage)s between forward and backward pass, by device. layers: of
  each stage.
  """
  table, stages = step_table(config), stage_layers(config)
  even = simulate(table, [1] * table.stages, [2] * table.stages)
  forward, backward = _stage_flops(config, stages)
  return {
    'schedule': table.schedule,
    'stages': table.pipe,
    'virtual_stages': table.virtual,
    'microbatches': table.microbatches,
    'ticks': table.ticks,
    'bubble': even.lockstep,
    'bubble_async': even.asynchronous,
    'bubble_flops': simulate(table, forward, backward).lockstep,
    'in_flight': in_flight(table).tolist(),
    'cut': cut_text(config.model.pattern, table.stages),
    'layers': [config.model.layers[part.start : part.stop] for part in stages],
    'picture': timetable(table),
  }


def _stage_flops(config: Config, stages: list[range]) -> tuple[list[int], list[int]]:
  """Of the forward and of the backward pass of each stage, per token."""
  layers, head = _step_flops(config)
  forward, backward = ([sum(layers[i][phase] for i in part) for part in stages] for phase in (0, 1))
  forward[-1], backward[-1] = forward[-1] + head[0], backward[-1] + head[1]
  return forward, backward


def timetable(table: Table, width: int = WIDTH) -> list[str]:
  """A picture in text: a column for each tick with the microbatch that each device takes forward (F) and backward (B).

  With virtual stages a letter says which of its own the device runs. Ticks and devices in the middle are left out where
  there are too many.
  """
  names = {phase: _names(table, phase) for phase in ('forward', 'backward')[: 1 + table.trains]}
  cell = 1 + max(len(name) for rows in names.values() for row in rows for name in row)
  head = len(f'device {table.pipe - 1}')
  ticks = _some(table.ticks, (width - head - 3) // cell)
  lines = [f'{"tick":<{head}}   ' + _line(range(table.ticks), ticks, cell)]
  for device in _some(table.pipe, DEVICES):
    if device is None:
      lines.append(LEFT_OUT)
      continue
    for phase, rows in names.items():
      left = f'device {device}' if phase == 'forward' else ''
      lines.append(f'{left:<{head}}  {phase[0].upper()}' + _line([row[device] for row in rows], ticks, cell))
  return lines


def _line(words: Sequence[Any], ticks: list[int | None], width: int) -> str:
  return ''.join(f'{LEFT_OUT if tick is None else words[tick]:>{width}}' for tick in ticks)


def _names(table: Table, phase: str) -> list[list[str]]:
  """[tick][device]: what the picture shows of a task."""
  chunks, columns = table.column(f'{phase}_chunk').tolist(), table.column(f'{phase}_microbatch').tolist()

  def name(chunk: int, microbatch: int) -> str:
    if chunk == NOTHING:
      return '.'
    return f'{_letter(chunk) if table.virtual > 1 else ""}{microbatch}'

  return [[name(*task) for task in zip(*tick, strict=True)] for tick in zip(chunks, columns, strict=True)]


def _letter(chunk: int) -> str:
  return 'abcdefghijklmnopqrstuvwxyz'[chunk % 26] * (1 + chunk // 26)


def _some(count: int, room: int) -> list[int | None]:
  """0 to count - 1; where they do not fit, the first and the last ones, and None between."""
  if count <= room:
    return list(range(count))
  front = room // 2
  return [*range(front), None, *range(count - (room - 1 - front), count)]
