"""Draws the losses of several runs over each other, and prints their last figures.

  python tools/compare_runs.py runs/transformer runs/mamba runs/hybrid --out=docs/loss_curves.svg

Training losses are averaged over a few steps; points are validation losses. Writes SVG or PNG, by the ending of --out.
"""

import argparse
import json
import pathlib
import sys

from lmscale.errors import ConfigError
from lmscale.train.metrics import read_metrics, smooth

COLOURS = ('#08519c', '#d94801', '#238b45', '#6a51a3', '#a50f15', '#525252')


def read_run(folder: pathlib.Path) -> dict:
  """The name, the config and the logged lines of a run's folder. Raises ConfigError where it is none."""
  try:
    config = json.loads((folder / 'config.json').read_text())
  except (OSError, ValueError) as error:
    raise ConfigError(f'{folder}: not the folder of a run, its config.json cannot be read: {error}') from error
  lines = [line for line in read_metrics(folder / 'metrics.jsonl') if line.get('loss') is not None]
  if not lines:
    raise ConfigError(f'{folder}: metrics.jsonl has no losses yet')
  return {'name': folder.name, 'config': config, 'lines': lines}


def table(runs: list[dict]) -> str:
  """One Markdown row per run: pattern, steps, tokens, final training (averaged) and validation loss, median tokens/s."""
  rows = ['| run | pattern | steps | tokens | training loss | validation loss | tokens/s |', '|---|---|---|---|---|---|---|']
  for run in runs:
    lines = run['lines']
    recent = [line['loss'] for line in lines[-max(1, len(lines) // 20) :]]
    validation = [line['val_loss'] for line in lines if line.get('val_loss') is not None]
    rates = sorted(line['tokens_per_second'] for line in lines)
    pattern = run['config']['model']['pattern'].replace('|', r'\|')
    rows.append(
      f'| {run["name"]} | `{pattern}` | {lines[-1]["step"]} | {lines[-1]["tokens"]:,} | {sum(recent) / len(recent):.3f} | '
      f'{f"{validation[-1]:.3f}" if validation else "-"} | {rates[len(rates) // 2]:,.0f} |'
    )
  return '\n'.join(rows)


def draw(runs: list[dict], path: pathlib.Path) -> None:
  """The overlaid losses against training tokens, written to `path`."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  style = {'svg.fonttype': 'none', 'font.size': 11, 'axes.spines.top': False, 'axes.spines.right': False}
  with pyplot.rc_context(style):
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout='constrained')
    for i, run in enumerate(runs):
      colour = COLOURS[i % len(COLOURS)]
      tokens = [line['tokens'] for line in run['lines']]
      axes.plot(tokens, smooth([line['loss'] for line in run['lines']]), color=colour, linewidth=1.5, label=run['name'])
      validation = [(line['tokens'], line['val_loss']) for line in run['lines'] if line.get('val_loss') is not None]
      if validation:
        axes.plot(*zip(*validation, strict=True), 'o', color=colour, markersize=4.5)
    losses = sorted(line['loss'] for run in runs for line in run['lines'])
    axes.set_ylim(losses[0] - 0.1, losses[int(0.97 * (len(losses) - 1))] + 0.1)
    axes.set(xlabel='training tokens', ylabel='loss (nats / token)', xlim=(0, None))
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=''))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, title='line: training, averaged\npoint: validation')
    figure.savefig(path, metadata={'Date': None} if path.suffix == '.svg' else None)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code: 0, or 2 for a mistake of the user's."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('runs', nargs='+', type=pathlib.Path, help='folders of runs')
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('comparison.svg'))
  flags = parser.parse_args(argv)
  try:
    if flags.out.suffix not in ('.svg', '.png'):
      raise ConfigError(f'--out: {flags.out} ends in neither .svg nor .png')
    runs = [read_run(folder) for folder in flags.runs]
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  print(table(runs))
  draw(runs, flags.out)
  print(f'\ndrawn in {flags.out}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
