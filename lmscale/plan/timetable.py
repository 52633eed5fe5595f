"""Pictures of a pipeline's table: `timetable` in text, `draw` as an SVG file. Where there is too much the middle is left out."""

import collections
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmscale.parallel.pipeline.replay import simulate
from lmscale.parallel.pipeline.table import NOTHING, Table

WIDTH = 116  # of the text, in characters
DEVICES = 8  # shown in it
LEFT_OUT = '..'
DRAWN_TICKS, DRAWN_DEVICES = 160, 24
NAMED_TICKS = 32  # up to here each task shows its microbatch
COLOURS = {'forward': '#6baed6', 'backward': '#fd8d3c'}


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


def draw(table: Table, path: pathlib.Path) -> None:
  """Draws who works when, a backward pass taking twice as long as a forward one, each tick as long as its slowest device.

  A task shows its microbatch, where there is room, and is darker in a device's later stages.
  """
  import matplotlib  # slow to import, and seldom needed

  matplotlib.use('Agg')
  from matplotlib import pyplot

  devices, ticks = _some(table.pipe, DRAWN_DEVICES), _some(table.ticks, DRAWN_TICKS)
  starts, end = _starts(table, ticks)
  with pyplot.rc_context({'svg.fonttype': 'none', 'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False}):
    figure, axes = pyplot.subplots(figsize=(12, 1.3 + 0.28 * len(devices)), layout='constrained')
    for row, device in enumerate(devices):
      if device is not None:
        axes.barh(row, end, color='#eeeeee', height=0.86)
        _draw_device(axes, table, row, device, starts)
    if None in ticks:
      axes.axvspan(gap := starts[ticks.index(None) - 1][1], gap + 2, color='white')
      axes.text(gap + 1, len(devices) / 2, '...', ha='center')
    axes.set(xlim=(0, end), ylim=(len(devices) - 0.4, -0.6), ylabel='device', xlabel='time')
    axes.set_yticks([row for row, d in enumerate(devices) if d is not None], [str(d) for d in devices if d is not None])
    axes.set_xticks([])
    handles = [axes.barh(0, 0, color=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=handles, loc='outside upper right', ncols=2, frameon=False)
    axes.set_title(_title(table), loc='left')
    temporary = path.with_name(f'{path.name}.tmp')
    figure.savefig(temporary, format='svg', metadata={'Date': None})
    temporary.replace(path)
    pyplot.close(figure)


def _title(table: Table) -> str:
  bubble = simulate(table, [1] * table.stages, [2] * table.stages).lockstep
  stages = f'{table.pipe} devices' + (f' * {table.virtual} stages' if table.virtual > 1 else '')
  return f'{table.schedule}: {stages}, {table.microbatches} microbatches, bubble {bubble:.1%}'


def _starts(table: Table, ticks: Sequence[int | None]) -> tuple[dict[int, tuple[float, float]], float]:
  """{tick: (its start, its end)} of those that are drawn, 2 for what is left out, and the end of all."""
  virtual = table.virtual
  work = (table.column('forward_chunk') != NOTHING) + 2 * (table.column('backward_chunk') != NOTHING)
  lengths = np.max(work, axis=1) / virtual
  starts, now = {}, 0.0
  for tick in ticks:
    length = 2.0 if tick is None else float(lengths[tick])
    if tick is not None:
      starts[tick] = now, now + length
    now += length
  return starts, now


def _draw_device(axes: Any, table: Table, row: int, device: int, starts: dict[int, tuple[float, float]]) -> None:
  """The tasks of one device, in each tick the forward one first."""
  length = {'forward': 1 / table.virtual, 'backward': 2 / table.virtual}
  spans = collections.defaultdict(list)
  for tick, (now, _) in starts.items():
    for phase in ('forward', 'backward')[: 1 + table.trains]:
      chunk, j = (int(table.column(f'{phase}_{part}')[tick, device]) for part in ('chunk', 'microbatch'))
      if chunk == NOTHING:
        continue
      spans[phase, chunk].append((now, length[phase]))
      if len(starts) <= NAMED_TICKS:
        axes.text(now + length[phase] / 2, row, str(j), ha='center', va='center', fontsize=7)
      now += length[phase]
  for (phase, chunk), bars in spans.items():
    dark = 0.5 + 0.5 * (chunk + 1) / table.virtual
    axes.broken_barh(bars, (row - 0.43, 0.86), facecolor=COLOURS[phase], alpha=dark, edgecolor='white', linewidth=0.6)
