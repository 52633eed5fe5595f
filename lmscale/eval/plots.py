"""Pictures of scores: accuracy against the length of the text, where in it a needle is found, and the loss against what was read before."""

import math
import pathlib
from typing import Any

COLOURS = ('#0072b2', '#d55e00', '#009e73', '#aa3377', '#a6761d', '#333333', '#56b4e9', '#e6ab02')
STYLE = {'svg.fonttype': 'none', 'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False}


def draw(tasks: dict[str, dict[str, Any]], folder: pathlib.Path, trained: int) -> list[pathlib.Path]:
  """length.svg, depth.svg and position.svg, of those of the scored tasks that have several lengths, depths or places; the files that were
  written. trained: tokens of the context in training."""
  by_length = {name: scores['by_length'] for name, scores in tasks.items() if len(scores.get('by_length', {})) > 1}
  by_depth = {name: scores['by_length'] for name, scores in tasks.items() if has_depths(scores)}
  by_position = {name: scores['by_position'] for name, scores in tasks.items() if len(scores.get('by_position', {})) > 1}
  written = []
  for parts, what, name in (
    (by_length, _lengths, 'length.svg'), (by_depth, _depths, 'depth.svg'),
    (by_position, lambda pyplot, of: _positions(pyplot, of, trained), 'position.svg'),
  ):  # fmt: skip
    if parts:
      written.append(folder / name)
      save(lambda pyplot, what=what, parts=parts: what(pyplot, parts), written[-1])
  return written


def has_depths(scores: dict[str, Any]) -> bool:
  """Whether a task says where in its texts the answers were."""
  return any('acc_by_depth' in of for of in scores.get('by_length', {}).values())


def save(figure_of: Any, path: pathlib.Path) -> None:
  """Writes the figure that figure_of(pyplot) makes, as an SVG that is whole or as it was."""
  import matplotlib  # slow to import

  matplotlib.use('Agg')
  from matplotlib import pyplot

  with pyplot.rc_context(STYLE):
    figure = figure_of(pyplot)
    temporary = path.with_name(f'.{path.name}')
    figure.savefig(temporary, format='svg', metadata={'Date': None}, bbox_inches='tight')
    pyplot.close(figure)
    temporary.replace(path)


def _lengths(pyplot: Any, tasks: dict[str, dict[str, Any]]) -> Any:
  figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
  draw_lengths(axes, tasks)
  axes.legend(frameon=False, loc='center left', bbox_to_anchor=(1, 0.5))
  return figure


def draw_lengths(axes: Any, series: dict[str, dict[str, Any]], title: str = '') -> None:
  """The accuracy at each length, of several tasks or models, {name: by_length}."""
  for i, (name, of) in enumerate(series.items()):
    lengths = sorted(of, key=int)
    values, errors = ([of[n][key] or 0.0 for n in lengths] for key in ('acc', 'acc_stderr'))
    axes.errorbar([int(n) for n in lengths], values, errors, label=name, color=COLOURS[i % len(COLOURS)], marker='.', capsize=2)
  ticks = sorted({int(n) for of in series.values() for n in of})
  axes.set_xscale('log', base=2)
  axes.set_xticks(ticks, [f'{n:,}' for n in ticks])
  axes.minorticks_off()
  axes.set(xlabel='tokens', ylabel='accuracy', ylim=(-0.03, 1.03), title=title)


def _depths(pyplot: Any, tasks: dict[str, dict[str, Any]]) -> Any:
  columns = min(3, len(tasks))
  rows = -(-len(tasks) // columns)
  figure, grid = pyplot.subplots(rows, columns, figsize=(0.6 + 2.6 * columns, 0.4 + 2.2 * rows), squeeze=False, layout='constrained')
  for axes in grid.flat[len(tasks) :]:
    axes.set_visible(False)
  for axes, (name, of) in zip(grid.flat, tasks.items(), strict=False):
    lengths = sorted(of, key=int)
    values = [[math.nan if v is None else v for v in of[n].get('acc_by_depth', [])] for n in lengths]
    image = axes.imshow(list(zip(*values, strict=True)), vmin=0, vmax=1, cmap='viridis', aspect='auto')
    axes.set_title(name, fontsize=9)
    axes.set_xticks(range(len(lengths)), [f'{int(n):,}' for n in lengths])
    parts = len(values[0])
    axes.set_yticks([-0.5, parts - 0.5], ['begin', 'end'])
    axes.set_xlabel('tokens')
  figure.colorbar(image, ax=grid, label='accuracy', shrink=0.8)
  return figure


def _positions(pyplot: Any, tasks: dict[str, dict[str, Any]], trained: int) -> Any:
  figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
  draw_positions(axes, tasks, trained)
  return figure


def draw_positions(axes: Any, series: dict[str, dict[str, Any]], trained: int) -> None:
  """The loss of each bin of positions, of several models or texts, {name: by_position}, and where the context of training ends."""
  last = 1
  for i, (name, of) in enumerate(series.items()):
    ends = [tuple(map(int, places.split('-'))) for places in of]
    middles = [math.sqrt(a * b) for a, b in ends]
    last = max(last, *(b for _, b in ends))
    errors = [bin['loss_stderr'] or 0.0 for bin in of.values()]
    axes.errorbar(middles, [bin['loss'] for bin in of.values()], errors, label=name, color=COLOURS[i % len(COLOURS)], marker='.', capsize=2)
  axes.set_xscale('log', base=2)
  ticks = [4**k for k in range(12) if 4**k <= last]
  axes.set_xticks(ticks, [f'{n:,}' for n in ticks])
  axes.minorticks_off()
  if trained < last:
    axes.axvline(trained, color='#888888', linestyle=':', linewidth=1)
    axes.annotate(f'trained: {trained:,}', (trained, 1), xycoords=('data', 'axes fraction'), xytext=(4, -2), textcoords='offset points',
                  va='top', color='#888888')  # fmt: skip
  axes.set(xlabel='position in the context (tokens read before)', ylabel='loss (nats / token)')
  if len(series) > 1:
    axes.legend(frameon=False)
