"""A model's scores on tasks, in the folder of its run, RUN/eval/<step>:

  results.json           {tasks: {name: {metric, metric_stderr, samples, ...}}, config, environment}
  samples/<name>.json    the scores of each sample, in the order in which they were asked
  *.svg                  pictures, see `eval.plots`

The job eval takes them of a finished model, the training loop on a schedule. A task's entry in results.json is written when all else
of the task is on disk, so it is there or not; it says what it depends on: data, questions, options and the fingerprint of the
parameters. By that a run that was killed knows what it has still to do.
"""

import json
import logging
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from lmscale import config as config_lib
from lmscale import processes
from lmscale.cache_root import cache_root
from lmscale.config import Config
from lmscale.data.tokenizer import Tokenizer
from lmscale.errors import ConfigError
from lmscale.eval import evaluate
from lmscale.eval.evaluate import Asked, Options
from lmscale.eval.plots import draw
from lmscale.eval.scorer import Scorer
from lmscale.train.workdir import environment, write_atomic

Say = Callable[[str], None]

log = logging.getLogger(__name__)


class Scores:
  """The scores of one model. path: RUN/eval/<step>. parameters: their fingerprint. Of several processes the first writes."""

  def __init__(self, path: pathlib.Path, parameters: str, config: Config, options: Options):
    self.path, self._parameters, self._config, self._options = path, parameters, config, options

  def missing(self, name: str, asked: Asked) -> bool:
    """Whether a task is not scored yet: these questions, of this model."""
    entry = self._read().get(name, {})
    return any(entry.get(key) != value for key, value in self._about(asked).items())

  def take(self, name: str, model: Scorer, asked: Asked, say: Say) -> None:
    """Scores the model on a task, keeps the scores and says them."""
    began, cut = time.monotonic(), model.truncated
    scored = evaluate.score_samples(model, asked)
    found = evaluate.summarise(name, asked, scored) | {'truncated': model.truncated - cut, 'seconds': round(time.monotonic() - began, 1)}
    if processes.is_first():
      self._keep(name, found | self._about(asked), scored)
    say(line(name, found))

  def draw(self) -> None:
    """The pictures of all tasks that are scored."""
    if processes.is_first():
      draw(self._read(), self.path, self._config.train.seq_len)

  def _about(self, asked: Asked) -> dict[str, Any]:
    return {'digest': asked.digest, 'questions': asked.questions, 'parameters': self._parameters, 'options': self._options.describe()}

  def _keep(self, name: str, entry: dict[str, Any], scored: list[dict[str, float]]) -> None:
    """The task's own file first. Entries of other parameters, from before a run was trained again, go."""
    (self.path / 'samples').mkdir(parents=True, exist_ok=True)
    columns = {metric: [score[metric] for score in scored] for metric in scored[0]}
    about = {key: entry[key] for key in ('questions', 'parameters')}
    write_atomic(self.path / 'samples' / f'{name}.json', json.dumps(about | {'scores': columns}) + '\n')
    tasks = {other: of for other, of in self._read().items() if of.get('parameters') == self._parameters} | {name: entry}
    results = {'tasks': tasks, 'config': config_lib.to_dict(self._config), 'environment': environment()}
    write_atomic(self.path / 'results.json', json.dumps(results, indent=1) + '\n')

  def _read(self) -> dict[str, Any]:
    """The entries so far; a damaged file is set aside."""
    path = self.path / 'results.json'
    try:
      return read_tasks(path)
    except ConfigError as error:
      path.replace(path.with_name('results.json.damaged'))
      log.warning('%s; renamed to results.json.damaged, its tasks are scored again', error)
      return {}


def read_tasks(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  """The tasks of a results.json; empty where there is none. Raises ConfigError where it is damaged."""
  try:
    tasks = json.loads(path.read_text(encoding='utf-8'))['tasks']
    if not isinstance(tasks, dict) or not all(isinstance(entry, dict) for entry in tasks.values()):
      raise ValueError('its tasks are no objects')
    return tasks
  except FileNotFoundError:
    return {}
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise ConfigError(f'{path} is damaged ({type(error).__name__}: {error})') from error


class Schedule:
  """The evaluations of a run while it trains: config.eval. Everything that can be wrong with them is found here, before a step is taken."""

  def __init__(self, config: Config, tokenizer: Tokenizer):
    self._config, self._tokenizer = config, tokenizer
    self._names = list(dict.fromkeys(config.eval.tasks))
    evaluate.check_tasks(self._names, 'eval.tasks')
    self._options = find_options(config, self._names)
    for name in self._names:
      evaluate.prepare(name, tokenizer, self._options)

  def score(self, program: Any, state: Any, path: pathlib.Path, between: Callable[[], None], say: Say) -> None:
    """Scores a state on the tasks on which it is not scored yet. between: see `Scorer`; what it raises ends this.

    path: RUN/eval/<step>. One task's questions are in memory at a time.
    """
    scores = Scores(path, program.fingerprint(state), self._config, self._options)
    missing = [name for name in self._names if processes.is_first() and scores.missing(name, self._ask(name))]
    missing = processes.share(f'tasks of {path.name}', missing)
    if not missing:
      return
    between()
    say(f'step {path.name}: scoring {", ".join(missing)}')
    with program.scorer(state, self._tokenizer, self._options.context, between) as model:
      for name in missing:
        scores.take(name, model, self._ask(name), say)
    scores.draw()

  def _ask(self, name: str) -> Asked:
    return evaluate.prepare(name, self._tokenizer, self._options)


def find_options(config: Config, names: Sequence[str], shots: int = 0, haystack: str = '', context: int = 0) -> Options:
  """What config.eval asks for, and what it has no fields for. context: 0 for what the tasks need. Raises ConfigError for what cannot be."""
  wanted = config.eval
  data = pathlib.Path(wanted.data).expanduser() if wanted.data else None
  if data is not None and not data.is_dir():
    raise ConfigError(f'eval.data: {data} is no folder')
  context = context or max(config.train.seq_len, *(wanted.lengths if evaluate.has_lengths(names) else ()), 0)
  model = config.model
  if model.positions == 'learned' and context > model.max_positions:
    raise ConfigError(
      f'eval.lengths: a context of {context} tokens exceeds model.max_positions {model.max_positions}, which are learned; give shorter '
      f'lengths, or (with --job=eval) --context={model.max_positions}'
    )
  return Options(data, cache_root(config.data.cache), wanted.samples, shots, wanted.lengths, haystack, config.seed, context)


def line(name: str, scores: dict[str, Any]) -> str:
  """A task's scores for people."""
  shown = []
  for metric, value in scores.items():
    if isinstance(value, float) and not metric.endswith('_stderr') and metric != 'seconds':
      error = scores.get(f'{metric}_stderr')
      shown.append(f'{metric} {value:.4f}' + (f' ± {error:.4f}' if error is not None else ''))
  cut = f', {scores["truncated"]} cut at their beginning' if scores.get('truncated') else ''
  counted = f', {scores["samples"]} samples' if 'samples' in scores else ''
  return f'{name:<20} {", ".join(shown)}{counted}{cut}' + ''.join(_parts(scores))


def _parts(scores: dict[str, Any]) -> list[str]:
  """A line for each length, or place in the context, where there are several."""
  for key, unit in (('by_length', 'tokens'), ('by_position', 'tokens read')):
    if len(parts := scores.get(key, {})) > 1:
      return [f'\n  {part:>11} {unit}   {line("", of).strip()}' for part, of in parts.items()]
  return []
