"""What a run leaves to read: metrics.jsonl, TensorBoard events, samples.txt, loss.svg.

A line of metrics.jsonl is one step: `step` (steps taken, from 1), `tokens` (consumed so far), `loss` (mean nats per
counted token), `grad_norm` (before clipping), `learning_rate`, `tokens_per_second` since the line before (compilation
included), `data_wait` (seconds since the line before in which the loop waited for a batch), `seconds` (of the whole run by kind,
see `train.goodput`); where there was an evaluation also `val_loss` and `val_bits_per_byte`; for a step that was skipped `skipped` (how many
were not finite so far, with null for the numbers that are not) or `spikes` (how many had a gradient norm above train.spike_skip so
far), and `first_sample` and `batch`. A step in which no label counts has them too, and null for `loss` and `grad_norm`.

samples.txt is for people: after a line `=== step 100 ===` the text that the model wrote then, and an empty line. A line of the
text that looks like such a heading has a backslash before it (and one that already looks so, one more).
"""

import itertools
import json
import math
import os
import pathlib
import re
import warnings
from typing import Any, Self

import tensorboardX

from lmscale.train.console import printable
from lmscale.train.workdir import write_atomic

HEADING = '=== step {} ==='
SAMPLE_HEADING = re.compile(r'^=== step ([0-9]{1,18}) ===$', re.MULTILINE)
LIKE_HEADING = re.compile(r'^(?=\\*=== step [0-9]{1,18} ===$)', re.MULTILINE)


class MetricsWriter:
  """Appends to the files of a run folder, after cutting off what is newer than `resume_step`.

  resume_step: steps that the state to continue from has taken; 0 for a new run. A context manager.
  """

  def __init__(self, workdir: pathlib.Path, resume_step: int):
    self._path = workdir / 'metrics.jsonl'
    self._samples = workdir / 'samples.txt'
    cut_metrics(self._path, resume_step)
    cut_samples(self._samples, resume_step)
    self._file = self._path.open('a', buffering=1, encoding='utf-8')
    self._events = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'), purge_step=resume_step + 1)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  def write(self, line: dict[str, Any]) -> None:
    """Adds one line: it outlives this process at once, and the machine after `flush`. Numbers that are not finite become null."""
    line = {key: value if _writable(value) else None for key, value in line.items()}
    self._file.write(json.dumps(line) + '\n')
    for key, value in line.items():
      if key not in ('step', 'first_sample', 'seconds') and value is not None:
        self._events.add_scalar(key, value, line['step'])

  def sample(self, step: int, text: str) -> None:
    """Adds a sampled text to samples.txt."""
    with self._samples.open('a', encoding='utf-8', errors='backslashreplace', newline='') as file:
      file.write(f'{HEADING.format(step)}\n{quoted(text)}\n\n')
      _sync(file)
    self._events.add_text('sample', text, step)

  def flush(self) -> None:
    """Every line so far is on disk when this returns. Raises OSError, with the file's name, where there is no room."""
    try:
      _sync(self._file)
    except OSError as error:
      raise OSError(error.errno, error.strerror, str(self._path)) from error
    self._events.flush()

  def close(self) -> None:
    self.flush()
    self._file.close()
    self._events.close()


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of a metrics.jsonl, up to the first that is not whole (a process may have been killed in it)."""
  lines = []
  for text in path.read_text(encoding='utf-8', errors='replace').splitlines() if path.exists() else ():
    try:
      line = json.loads(text)
      if not isinstance(line['step'], int):
        break
      lines.append(line)
    except (ValueError, KeyError, TypeError, RecursionError):
      break
  return lines


def cut_metrics(path: pathlib.Path, last_step: int) -> None:
  """Removes the lines after step `last_step` and any torn one; the lines that stay keep every byte."""
  if not path.exists():
    return
  kept = sum(line['step'] <= last_step for line in read_metrics(path))
  with path.open(encoding='utf-8', errors='replace') as file:
    write_atomic(path, ''.join(line for _, line in zip(range(kept), file, strict=False)))


def quoted(text: str) -> str:
  """A text in which no line is a heading of samples.txt: see above."""
  return LIKE_HEADING.sub(r'\\', text)


def cut_samples(path: pathlib.Path, last_step: int) -> None:
  """Removes the samples after step `last_step`: what follows the last heading of a step up to it, from the next heading on."""
  if not path.exists():
    return
  with path.open(encoding='utf-8', errors='replace', newline='') as file:
    text = file.read()
  late = None
  for match in SAMPLE_HEADING.finditer(text):
    if int(match[1]) <= last_step:
      late = None  # steps ascend: a later one before this was text of a sample, in a file of an older version
    elif late is None:
      late = match.start()
  torn = text.rpartition('\n')[2]
  if late is None and torn and HEADING[:9].startswith(torn[:9]):  # a process may have been killed in a heading
    late = len(text) - len(torn)
  if late is not None:
    write_atomic(path, text[:late])


def plot_loss(workdir: pathlib.Path, reference: float | None = None, unit: str = 'token') -> pathlib.Path:
  """Draws metrics.jsonl as loss.svg: each step thin, a moving average thick, validation as points.

  reference: a loss in the same unit to draw as a dashed line (for text, its order-1 entropy). Returns the file's path.
  """
  import matplotlib  # slow to import, and needed once per run

  matplotlib.use('Agg')
  from matplotlib import pyplot

  lines = read_metrics(workdir / 'metrics.jsonl')
  tokens, loss = ([line[name] for line in lines if line.get('loss') is not None] for name in ('tokens', 'loss'))
  validation = [(line['tokens'], line['val_loss']) for line in lines if line.get('val_loss') is not None]
  style = {'svg.fonttype': 'none', 'font.size': 11, 'axes.spines.top': False, 'axes.spines.right': False}
  with pyplot.rc_context(style):
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout='constrained')
    axes.plot(tokens, loss, color='#9ecae1', linewidth=0.8, label='training')
    axes.plot(tokens, smooth(loss), color='#08519c', linewidth=1.8, label='training, averaged')
    if validation:
      axes.plot(*zip(*validation, strict=True), 'o-', color='#d94801', markersize=4.5, linewidth=1, label='validation')
    if reference is not None:
      axes.axhline(reference, color='#555555', linestyle='--', linewidth=1.2, label=f'order-1 entropy {reference:.3f}')
    axes.set(xlabel='training tokens', ylabel=f'loss (nats / {unit})', xlim=(0, None))
    axes.set_title(printable(workdir.name), parse_math=False)
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=''))
    axes.set_ylim(*_limits(loss, validation, reference))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    path = workdir / 'loss.svg'
    temporary = path.with_name('loss.tmp.svg')
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # a name may have characters that the font has not
      figure.savefig(temporary, metadata={'Date': None})
    temporary.replace(path)
    pyplot.close(figure)
  return path


def smooth(values: list[float], share: float = 0.03) -> list[float]:
  """Means over a window of about `share` of the values, centred so that a falling curve is not drawn late."""
  sums = list(itertools.accumulate(values, initial=0.0))
  radius, last = int(share * len(values) / 2) + 1, len(values) - 1
  reach = [min(radius, i, last - i) for i in range(len(values))]
  return [(sums[i + k + 1] - sums[i - k]) / (2 * k + 1) for i, k in enumerate(reach)]


def _limits(loss: list[float], validation: list[tuple[float, float]], reference: float | None) -> tuple[float, float]:
  """A y range that shows all but the first steps' and rare spikes' losses."""
  shown = sorted(loss) or [0.0, 1.0]
  low = min([shown[0], *(v for _, v in validation), *([] if reference is None else [reference])])
  high = max([shown[int(0.99 * (len(shown) - 1))], *(v for _, v in validation), reference or low])
  margin = 0.06 * (high - low) or 0.5
  return low - margin, high + margin


def _writable(value: Any) -> bool:
  return not isinstance(value, float) or math.isfinite(value)


def _sync(file: Any) -> None:
  file.flush()
  os.fsync(file.fileno())
