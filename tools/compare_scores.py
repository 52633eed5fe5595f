"""The scores of several runs on tasks, side by side: what `compare_runs.py` shows of their RUN/eval/<step>/results.json."""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from compare_pictures import save

from lmscale.errors import ConfigError
from lmscale.eval.evaluate import TEXT, metric_of
from lmscale.eval.metrics import mean, standard_error
from lmscale.eval.plots import COLOURS, STYLE, draw_lengths, draw_positions
from lmscale.train.scores import read_tasks

MULTIPLE = 2  # standard errors of a difference above which it is marked
HOW = (f'± is one standard error. A difference is marked * where it is larger than {MULTIPLE} standard errors of it: of the differences sample by '
       'sample (paired), else the root of the sum of both squares. Of twenty differences that are none, about one is marked.')  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scored:
  """The newest scores of a run. folder: RUN/eval/<step>; None where there are none, and then step is None, too."""

  name: str
  folder: pathlib.Path | None
  tasks: dict[str, dict[str, Any]]

  @property
  def step(self) -> int | None:
    return int(self.folder.name) if self.folder else None

  def samples(self, task: str) -> dict[str, list[float]] | None:
    """{metric: of each sample}; None where it is not there, or of other questions than the scores."""
    try:
      kept = json.loads((self.folder / 'samples' / f'{task}.json').read_text(encoding='utf-8'))
      return kept['scores'] if all(kept[key] == self.tasks[task][key] for key in ('questions', 'parameters')) else None
    except (OSError, ValueError, KeyError, TypeError):
      return None


@dataclasses.dataclass(frozen=True)
class Difference:
  """Between two scores. error: its standard error, nan where it is not known. why: it cannot be had, else empty."""

  value: float = math.nan
  error: float = math.nan
  paired: bool = False
  why: str = ''

  @property
  def large(self) -> bool:
    return abs(self.value) > MULTIPLE * self.error

  def __str__(self) -> str:
    if self.why:
      return self.why
    if math.isnan(self.error):
      return f'{self.value:+.4f}'
    how = ([f'{abs(self.value) / self.error:.1f} errors'] if self.error else []) + ['paired'] * self.paired
    return f'{self.value:+.4f} ± {self.error:.4f}' + f' ({", ".join(how)})' * bool(how) + ' *' * self.large


def read_scores(folder: pathlib.Path, name: str) -> Scored:
  """Those of the run in `folder`. Raises ConfigError for damaged ones."""
  steps = [path.parent for path in folder.glob('eval/*/results.json') if path.parent.name.isdecimal()]
  newest = max(steps, key=lambda path: int(path.name), default=None)
  tasks = read_tasks(newest / 'results.json') if newest else {}
  for task, entry in tasks.items():
    if not isinstance(entry.get(metric_of(task)), int | float):
      raise ConfigError(f'{newest / "results.json"}: task {task} has no {metric_of(task)}; score it again')
  return Scored(name, newest, tasks)


def task_names(runs: Sequence[Scored]) -> list[str]:
  """Of all tasks on which a run has scores."""
  return list(dict.fromkeys(task for run in runs for task in run.tasks))


def differ(task: str, run: Scored, other: Scored) -> Difference:
  """`run` less `other` on a task."""
  if task not in run.tasks or task not in other.tasks:
    return Difference(why='-')
  a, b = run.tasks[task], other.tasks[task]
  if why := unlike(a, b):
    return Difference(why=f'not comparable: other {why}')
  metric = metric_of(task)
  both = [one.samples(task) for one in (run, other)] if a.get('questions') == b.get('questions') else [None]
  if all(both):
    return _paired(task, metric, *both)
  errors = [one.get(f'{metric}_stderr') for one in (a, b)]
  error = math.nan if None in errors else math.hypot(*errors)
  return Difference(a[metric] - b[metric], error)


def unlike(a: dict[str, Any], b: dict[str, Any]) -> str:
  """In what two entries of a task were asked something else: data, options, or (empty) nothing. Synthetic texts differ with the tokenizer,
  the task does not."""
  if a.get('digest') != b.get('digest'):
    return 'data'
  whole = not a.get('truncated') and not b.get('truncated')  # then it does not matter how much could have been read
  same = a.get('options') == b.get('options') or whole and a.get('questions') == b.get('questions')
  return '' if same else 'options'


def _paired(task: str, metric: str, a: dict[str, list[float]], b: dict[str, list[float]]) -> Difference:
  if task != TEXT:
    each = [x - y for x, y in zip(a[metric], b[metric], strict=True)]
    return Difference(mean(each), standard_error(each), True)
  sizes, bits = a['bytes'], [(x - y) / math.log(2) for x, y in zip(a['nats'], b['nats'], strict=True)]  # a ratio, as in eval.evaluate
  value = math.fsum(bits) / math.fsum(sizes)
  residuals = [d - value * size for d, size in zip(bits, sizes, strict=True)]
  return Difference(value, standard_error(residuals) * len(bits) / math.fsum(sizes), True)


def tables(runs: Sequence[Scored]) -> list[list[list[str]]]:
  """Rows of two tables, the head first: the scores, and how those of the other runs differ from the first's that has any."""
  names = task_names(runs)
  scores = [['task', 'metric', 'samples', *(f'{run.name} (step {run.step})' if run.folder else run.name for run in runs)]]
  for task in names:
    counts = sorted({run.tasks[task]['samples'] for run in runs if task in run.tasks})
    scores.append([task, metric_of(task), ', '.join(map(str, counts)), *(_cell(run.tasks.get(task), metric_of(task)) for run in runs)])
  first, *others = [run for run in runs if run.tasks]
  if not others:
    return [scores]
  head = [f'task, less {first.name}', *(run.name for run in others)]
  return [scores, [head, *([task, *(str(differ(task, run, first)) for run in others)] for task in names)]]


def _cell(entry: dict[str, Any] | None, metric: str) -> str:
  if entry is None:
    return '-'
  error = entry.get(f'{metric}_stderr')
  return f'{entry[metric]:.4f}' + (f' ± {error:.4f}' if error is not None else '')


def cautions(runs: Sequence[Scored]) -> list[str]:
  """Which scores are not of the same questions, if any."""
  found = []
  for task in task_names(runs):
    first, *others = [run for run in runs if task in run.tasks]
    apart = [(run.name, why) for run in others if (why := unlike(run.tasks[task], first.tasks[task]))]
    found += [f'task {task}: {name} was scored on other {why} than {first.name}; the two are not compared' for name, why in apart]
  return found


def draw(runs: Sequence[Scored], paths: list[pathlib.Path]) -> list[pathlib.Path]:
  """Scores between 0 and 1 with their errors, accuracy against length, loss by position: what of it there is, written to each of `paths`.

  Returns the files that were written.
  """
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  runs = [run for run in runs if run.tasks]
  names = task_names(runs)
  shares = [task for task in names if metric_of(task) not in ('loss', 'bits_per_byte')]
  panels = [lambda axes: _shares(axes, runs, shares)] if shares else []
  for task in names:
    for key, panel in (('by_length', _lengths), ('by_position', _positions)):
      series = {run.name.replace('$', r'\$'): run.tasks.get(task, {}).get(key, {}) for run in runs}  # empty ones, too: each run keeps its colour
      if any(len(of) > 1 for of in series.values()):
        panels.append(functools.partial(panel, runs=runs, series=series, task=task))
  if not panels:
    return []
  columns = min(3, len(panels))
  with pyplot.rc_context(STYLE):
    size = (4.8 * columns, max(3.4, 0.3 * len(shares) + 1) * -(-len(panels) // columns))
    figure, grid = pyplot.subplots(-(-len(panels) // columns), columns, figsize=size, squeeze=False, layout='constrained')
    for axes in grid.flat[len(panels) :]:
      axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
      panel(axes)
      if legend := axes.get_legend():
        legend.remove()
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc='outside lower center', ncols=min(4, len(runs)), frameon=False)
    save(figure, paths)
    pyplot.close(figure)
  return paths


def _lengths(axes: Any, runs: Sequence[Scored], series: dict[str, dict[str, Any]], task: str) -> None:
  draw_lengths(axes, series, task)


def _positions(axes: Any, runs: Sequence[Scored], series: dict[str, dict[str, Any]], task: str) -> None:
  """trained: the longest context that one of the runs was trained on."""
  draw_positions(axes, series, max(json.loads((run.folder / 'results.json').read_text())['config']['train']['seq_len'] for run in runs))


def _shares(axes: Any, runs: Sequence[Scored], tasks: Sequence[str]) -> None:
  """A line for each task, on it a point with its standard error for each run."""
  for i, run in enumerate(runs):
    having = [k for k, task in enumerate(tasks) if task in run.tasks]
    entries = [run.tasks[tasks[k]] for k in having]
    metrics = [metric_of(tasks[k]) for k in having]
    values = [entry[metric] for entry, metric in zip(entries, metrics, strict=True)]
    errors = [entry.get(f'{metric}_stderr') or 0.0 for entry, metric in zip(entries, metrics, strict=True)]
    apart = 0.5 * (i - (len(runs) - 1) / 2) / len(runs)
    axes.errorbar(values, [k + apart for k in having], xerr=errors, label=run.name.replace('$', r'\$'), color=COLOURS[i % len(COLOURS)],
                  linestyle='', marker='.', capsize=2)  # fmt: skip
  axes.set_yticks(range(len(tasks)), [f'{task} ({metric_of(task)})' for task in tasks])
  axes.set(xlabel='score, with one standard error', ylim=(len(tasks) - 0.4, -0.6), xlim=(-0.03, 1.03))
  axes.grid(alpha=0.25)
