"""Puts several runs side by side: a table, where their configs differ, their losses over each other, and their scores on tasks.

  python tools/compare_runs.py runs/transformer runs/mamba runs/hybrid --out=comparison

Prints Markdown and draws the losses against training tokens, training FLOPs and training time, as comparison.svg and
comparison.png (with an ending, --out=docs/loss_curves.svg, only that one). Lines are training losses averaged over a few
steps, points are validation losses. Runs that were scored on tasks have their scores side by side, too, and drawn in
comparison_scores.svg and .png. What it all means: docs/comparing.md.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import statistics
import sys
import typing
from collections.abc import Callable
from typing import Any

import compare_scores
from compare_pictures import outputs, save

from lmscale import config as config_lib
from lmscale.config import USES
from lmscale.errors import ConfigError
from lmscale.models.flops import flops_per_token
from lmscale.train.console import duration, printable
from lmscale.train.metrics import read_metrics, smooth

# Dark enough on white, apart from each other also for the colour-blind; with the dashes 8 * 3 runs look different.
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#aa3377', '#a6761d', '#333333', '#56b4e9', '#e6ab02')
DASHES = ('-', (0, (5, 2)), (0, (1, 1.5)))
ROUND_TIMES = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 43200)  # seconds from mark to mark
NATS, BITS = 'nats / token', 'bits / byte'


@dataclasses.dataclass(frozen=True)
class Run:
  """One run's folder. All lists have an entry per logged step whose loss was finite."""

  name: str
  folder: pathlib.Path
  config: config_lib.Config
  steps: list[int]
  tokens: list[int]
  loss: list[float]
  seconds: list[float] | None  # of training up to each step; None where it was not logged
  wall: float | None  # seconds of the whole run, over all its starts
  rate: float | None  # median tokens per second
  validation: list[tuple[int, float]]  # (index in the lists above, nats per token)
  bits_per_byte: list[float] | None  # of the validation losses

  @property
  def flops(self) -> list[float]:
    """Forward and backward FLOPs up to each step, causal attention at half the square."""
    return [n * flops_per_token(self.config.model, self.config.train.seq_len) for n in self.tokens]

  @property
  def bits_per_nat(self) -> float | None:
    """What turns a loss in nats per token into bits per byte of text: it depends on the tokenizer."""
    return self.bits_per_byte[-1] / self.validation[-1][1] if self.bits_per_byte and self.validation[-1][1] else None


def read_runs(folders: list[pathlib.Path]) -> list[Run]:
  """The runs in `folders`, each under a name of its own. Raises ConfigError for what is not the folder of a run."""
  found = [folder.expanduser().absolute() for folder in folders]
  if twice := [str(folder) for i, folder in enumerate(found) if folder in found[:i]]:
    raise ConfigError(f'{twice[0]}: given twice')
  return [read_run(folder, name) for folder, name in zip(found, _names(found), strict=True)]


def read_run(folder: pathlib.Path, name: str) -> Run:
  """The run in `folder`. Raises ConfigError where it is none, is another version's, or has not logged a loss yet."""
  if not folder.is_dir():
    raise ConfigError(f'{folder}: {"a file, not the folder of a run" if folder.exists() else "no such folder"}')
  try:
    config = config_lib.from_dict(json.loads((folder / 'config.json').read_text(encoding='utf-8')))
    lines = read_metrics(folder / 'metrics.jsonl')
  except OSError as error:
    raise ConfigError(f'{folder}: not the folder of a run: {error.strerror}: {error.filename}') from error
  except ConfigError as error:
    raise ConfigError(f'{folder / "config.json"}: not a config of this version: {error}') from error
  except (ValueError, RecursionError) as error:
    raise ConfigError(f'{folder / "config.json"}: not JSON: {error}') from error
  lines = [line for line in lines if _is_number(line.get('loss')) and _is_number(line.get('tokens'))]
  if not lines:
    raise ConfigError(f'{folder}: metrics.jsonl has no losses yet; let the run take a step')
  validation = [(i, line['val_loss']) for i, line in enumerate(lines) if _is_number(line.get('val_loss'))]
  bits = [lines[i].get('val_bits_per_byte') for i, _ in validation]
  rates = [line.get('tokens_per_second') for line in lines]
  return Run(
    name=printable(name),
    folder=folder,
    config=config,
    steps=[line['step'] for line in lines],
    tokens=[line['tokens'] for line in lines],
    loss=[line['loss'] for line in lines],
    seconds=_seconds(lines),
    wall=_total(lines[-1].get('seconds')),
    rate=statistics.median(rates) if all(map(_is_number, rates)) else None,
    validation=validation,
    bits_per_byte=bits if bits and all(map(_is_number, bits)) else None,
  )


def _seconds(lines: list[dict[str, Any]]) -> list[float] | None:
  """Seconds in steps, and waiting for their data, up to each line.

  A line without them (of an older run) has a rate, over the tokens since the line before, compilation included.
  """
  parts = [[_total(line.get('seconds'), (kind,)) for kind in ('steps', 'data_wait')] for line in lines]
  if not any(part is None for pair in parts for part in pair):
    return [sum(pair) for pair in parts]
  total, before, out = 0.0, 0, []
  for line in lines:
    rate = line.get('tokens_per_second')
    if not _is_number(rate) or rate <= 0:
      return None
    total += (line['tokens'] - before) / rate
    before = line['tokens']
    out.append(total)
  return out


def _total(seconds: Any, kinds: tuple[str, ...] | None = None) -> float | None:
  """The sum of some (or all) entries of a line's `seconds`; None where they are not there."""
  values = [seconds.get(kind) for kind in kinds or seconds] if isinstance(seconds, dict) else [None]
  return sum(values) if all(map(_is_number, values)) else None


def _is_number(value: Any) -> typing.TypeGuard[float]:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _names(folders: list[pathlib.Path]) -> list[str]:
  """The last part of each path, or as many parts as tell them apart."""
  depth = 1
  while len({folder.parts[-depth:] for folder in folders}) < len(folders):
    depth += 1
  return ['/'.join(folder.parts[-depth:]).removeprefix('//') for folder in folders]


def table(runs: list[Run]) -> str:
  """One Markdown row per run. The training loss is the mean of the last twentieth of the logged steps."""
  from lmscale.plan.parameters import parameter_count

  def row(run: Run) -> list[str]:
    recent = run.loss[-max(1, len(run.loss) // 20) :]
    best = min(run.validation, key=lambda entry: entry[1], default=None)
    return [
      run.name, '`' + run.config.model.pattern + '`', _count(parameter_count(run.config.model)), f'{run.steps[-1]:,}',
      f'{run.tokens[-1]:,}', f'{run.flops[-1]:.3g}', duration(run.seconds[-1]) if run.seconds else '-',
      duration(run.wall) if run.wall is not None else '-', f'{statistics.mean(recent):.3f}', f'{run.validation[-1][1]:.3f}' if best else '-',
      f'{best[1]:.3f} at {run.steps[best[0]]:,}' if best else '-',
      f'{run.bits_per_byte[-1]:.3f}' if run.bits_per_byte else '-', f'{run.rate:,.0f}' if run.rate else '-',
    ]  # fmt: skip

  head = ['run', 'pattern', 'parameters', 'steps', 'tokens', 'FLOPs', 'time in steps', 'wall time', 'training loss',
          'validation loss', 'best', 'bits per byte', 'tokens/s']  # fmt: skip
  return _markdown(head, [row(run) for run in runs])


def difference(runs: list[Run]) -> str:
  """The config fields that are not the same in all runs, as Markdown; fields that no run's pattern uses are left out."""
  values = [config_lib.flatten(config_lib.to_dict(run.config)) for run in runs]
  kinds = {symbol for run in runs for symbol in run.config.model.layers}
  names = [name for name in dict.fromkeys(name for one in values for name in one)
           if USES.get(name.rpartition('.')[0], '*') in kinds | {'*'}]  # fmt: skip
  rows = [[name, *(json.dumps(one[name], ensure_ascii=False) if name in one else '-' for one in values)] for name in names]
  rows = [row for row in rows if len(set(row[1:])) > 1]
  return _markdown(['field', *(run.name for run in runs)], rows) if rows else 'The configs are the same.'


def cautions(runs: list[Run]) -> list[str]:
  """Why the losses cannot simply be compared, if so."""
  found = []
  if len({run.config.data.tokenizer for run in runs}) > 1:
    advice = 'the picture is in bits per byte' if unit(runs) == BITS else 'not every run has logged bits per byte'
    found.append(f'the runs have different tokenizers: their losses per token are not comparable; {advice}')
  texts = {json.dumps(config_lib.to_dict(run.config.data.sources), sort_keys=True) for run in runs}
  if len(texts) > 1 or len({run.config.data.validation for run in runs}) > 1:
    found.append('the runs read different data (data.sources, data.validation): so do their validation losses')
  return found


def unit(runs: list[Run]) -> str:
  """NATS, or BITS where the runs' tokens are not the same and every run knows its bits per byte."""
  other = len({run.config.data.tokenizer for run in runs}) > 1
  return BITS if other and all(run.bits_per_nat for run in runs) else NATS


def draw(runs: list[Run], paths: list[pathlib.Path]) -> None:
  """The overlaid losses against tokens, FLOPs and time, written to each of `paths`."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  scale = [run.bits_per_nat if unit(runs) == BITS else 1.0 for run in runs]
  losses = [[value * by for value in run.loss] for run, by in zip(runs, scale, strict=True)]
  panels: list[tuple[str, Callable[[Run], list[float] | None]]] = [
    ('training tokens', lambda run: run.tokens), ('training FLOPs', lambda run: run.flops),
    ('time in steps', lambda run: run.seconds),
  ]  # fmt: skip
  style = {'svg.fonttype': 'none', 'font.size': 11, 'axes.spines.top': False, 'axes.spines.right': False}
  with pyplot.rc_context(style):
    rows = -(-len(runs) // 4)
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.6 + 0.25 * rows), sharey=True, layout='constrained')
    for panel, (label, along) in zip(axes, panels, strict=True):
      for i, run in enumerate(runs):
        x, look = along(run), {'color': COLOURS[i % len(COLOURS)], 'label': run.name.replace('$', r'\$')}
        if x is None:
          continue
        alone = '.' if len(x) == 1 else ''
        panel.plot(x, smooth(losses[i]), linewidth=1.6, marker=alone, linestyle=DASHES[i // len(COLOURS) % 3], **look)
        if run.validation:
          points = [(x[at], value * scale[i]) for at, value in run.validation]
          panel.plot(*zip(*points, strict=True), 'o', color=look['color'], markersize=6, markeredgecolor='white')
      panel.set(xlabel=label, xlim=(0, None))
      panel.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6))
      panel.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=''))
      panel.grid(alpha=0.25)
    longest = max((run.seconds[-1] for run in runs if run.seconds), default=0)
    every = next((step for step in ROUND_TIMES if longest <= 6 * step), 86400 * math.ceil(longest / (6 * 86400)))
    axes[2].xaxis.set_major_locator(matplotlib.ticker.MultipleLocator(every))
    axes[2].xaxis.set_major_formatter(lambda seconds, _: duration(seconds))
    points = [value * by for run, by in zip(runs, scale, strict=True) for _, value in run.validation]
    axes[0].set(ylabel=f'loss ({unit(runs)})', ylim=_limits(losses, points))
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=min(4, len(runs)),
                  frameon=False, title='line: training loss, averaged;  point: validation loss')  # fmt: skip
    save(figure, paths)
    pyplot.close(figure)


def _limits(losses: list[list[float]], points: list[float]) -> tuple[float, float]:
  """A y range without the steep first steps and rare spikes."""
  values = sorted(value for one in losses for value in one)
  low, high = min(values[0], *points, values[0]), values[int(0.93 * (len(values) - 1))]
  margin = 0.06 * (high - low) or 0.1
  return low - margin, high + margin


def score_tables(scores: list[compare_scores.Scored]) -> str:
  """The scores on tasks and their differences, as Markdown; empty where no run has any."""
  if not any(run.tasks for run in scores):
    return ''
  parts = [_markdown(rows[0], rows[1:]) for rows in compare_scores.tables(scores)]
  return ''.join(f'\n{part}\n' for part in parts) + (f'\n{compare_scores.HOW}\n' if len(parts) > 1 else '')


def _markdown(head: list[str], rows: list[list[str]]) -> str:
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join('| ' + ' | '.join(cell.replace('|', r'\|') for cell in line) + ' |' for line in lines)


def _count(n: float) -> str:
  from lmscale.plan.report import short

  return short(n)


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code: 0, or 2 for a mistake of the user's."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('runs', nargs='+', type=pathlib.Path, help='folders of runs')
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('comparison'))
  flags = parser.parse_args(argv)
  try:
    paths = outputs(flags.out.expanduser())
    runs = read_runs(flags.runs)
    scores = [compare_scores.read_scores(run.folder, run.name) for run in runs]
    text = f'{table(runs)}\n' + (f'\n{difference(runs)}\n' if len(runs) > 1 else '') + score_tables(scores)
    draw(runs, paths)
    if any(run.tasks for run in scores):
      paths += compare_scores.draw(scores, outputs(flags.out.expanduser(), '_scores'))
  except (ConfigError, OSError) as error:
    print(f'error: {printable(" ".join(str(error).split()))}', file=sys.stderr)
    return 2
  for warning in cautions(runs) + compare_scores.cautions(scores):
    print(f'warning: {warning}', file=sys.stderr)
  print(f'{text}\ndrawn in {", ".join(map(str, paths[:-1]))}{" and " * (len(paths) > 1)}{paths[-1]}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
