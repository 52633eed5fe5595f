"""What the small study consists of, and what its folders say of it. Starts no runs (`study.py`) and draws nothing (`study_page.py`)."""

import dataclasses
import functools
import math
import pathlib
import runpy
from collections.abc import Sequence
from typing import Any

from lmscale.config import Config, EvalConfig, recipes
from lmscale.errors import ConfigError
from lmscale.eval.metrics import mean, standard_error
from lmscale.models.flops import flops_per_token
from lmscale.plan.parameters import parameter_count
from lmscale.train.changes import MAY_CHANGE, changed
from lmscale.train.metrics import read_metrics
from lmscale.train.scores import read_tasks
from lmscale.train.workdir import read_config

RECIPE = pathlib.Path(__file__).resolve().parents[1] / 'configs' / 'small_study.py'


class StudyError(Exception):
  """Why the study cannot go on, in one line."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is trained. rates: how many of the recipe's. folder: of the runs."""

  size: str
  seeds: int
  architectures: tuple[str, ...] = ('transformer', 'mamba', 'mamba2', 'hybrid')
  variants: tuple[str, ...] = ('attention0', 'attention50', 'mlp0', 'rope')
  rates: int = 2
  folder: pathlib.Path = pathlib.Path()
  recipe: pathlib.Path = RECIPE

  @property
  def asked(self) -> EvalConfig:
    """On what every chosen run is scored, as the recipe has it."""
    return self.grid()[0].config(self).eval

  def grid(self) -> list['Arm']:
    """Each architecture at each learning rate, with the first seed."""
    rates = runpy.run_path(str(self.recipe))['RATES'][: self.rates]
    return [Arm(name, rate, 0) for name in self.architectures for rate in rates]

  def best(self, name: str) -> 'Arm':
    """An architecture at the rate with the least validation loss; a variant at the hybrid's. Raises StudyError: not all are trained."""
    arms = [arm for arm in self.grid() if arm.architecture == (name if name in self.architectures else 'hybrid')]
    if missing := [arm.name for arm in arms if not (is_trained(self, arm) or diverged(self, arm))]:
      raise StudyError(f'{missing[0]} is not trained; run the study without --draw')
    return dataclasses.replace(min(arms, key=lambda arm: validation_loss(self, arm)), architecture=name)

  def chosen(self) -> list['Arm']:
    """Every architecture and variant at its rate, with every seed."""
    best = [self.best(name) for name in (*self.architectures, *self.variants)]
    return [dataclasses.replace(arm, seed=seed) for arm in best for seed in range(self.seeds)]


@dataclasses.dataclass(frozen=True)
class Arm:
  """One run of the study."""

  architecture: str
  rate: str
  seed: int

  @property
  def name(self) -> str:
    return f'{self.architecture}-{self.rate}-seed{self.seed}'

  def folder(self, plan: Plan) -> pathlib.Path:
    return plan.folder / self.name

  def spec(self, plan: Plan) -> str:
    return f'{plan.recipe}:arch={self.architecture},rate={self.rate},size={plan.size}'

  def config(self, plan: Plan) -> Config:
    return _config(self.spec(plan), self.seed)


@functools.cache
def _config(spec: str, seed: int) -> Config:
  return recipes.load(spec, [('seed', str(seed))])


def check_recipe(plan: Plan, arm: Arm) -> None:
  """Raises StudyError where the arm's folder was made with other settings than the recipe has now."""
  folder = arm.folder(plan)
  try:
    found = read_config(folder)
  except ConfigError as error:
    raise StudyError(str(error)) from error
  if found and (lines := changed(found, arm.config(plan), but=tuple(name for name in MAY_CHANGE if name != 'loop.'))):
    raise StudyError(f'{folder} was made with another recipe ({"; ".join(lines[:4])}): move it away, or give another --runs')


def is_trained(plan: Plan, arm: Arm) -> bool:
  """Whether the run came to its end. Its curve is drawn when its last checkpoint is whole."""
  lines = _metrics(arm.folder(plan))
  return bool(lines) and lines[-1]['step'] == arm.config(plan).train.steps and (arm.folder(plan) / 'loss.svg').exists()


def diverged(plan: Plan, arm: Arm) -> bool:
  """Whether it was stopped for steps that were not finite."""
  lines, train = _metrics(arm.folder(plan)), arm.config(plan).train
  return bool(lines) and lines[-1].get('skipped', 0) >= max(1, train.nonfinite_budget)


def is_scored(plan: Plan, arm: Arm) -> bool:
  """Whether all that is asked has its scores."""
  tasks, asked = scores(plan, arm), plan.asked
  wanted = {'lengths': list(asked.lengths), 'samples': asked.samples}
  return all(wanted.items() <= tasks.get(task, {}).get('options', {}).items() for task in asked.tasks)


def scores(plan: Plan, arm: Arm) -> dict[str, Any]:
  """The scored tasks of an arm's last step, by name."""
  return read_tasks(arm.folder(plan) / 'eval' / str(arm.config(plan).train.steps) / 'results.json')


def _metrics(folder: pathlib.Path) -> list[dict[str, Any]]:
  return read_metrics(folder / 'metrics.jsonl') if (folder / 'metrics.jsonl').exists() else []


def validation_loss(plan: Plan, arm: Arm) -> float:
  """The last, in nats per token; infinite for a run that did not come to its end."""
  lines = _metrics(arm.folder(plan))
  return lines[-1].get('val_loss', math.inf) if lines and is_trained(plan, arm) else math.inf


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean over seeds with its standard error; nan of one seed."""

  value: float
  error: float

  def __str__(self) -> str:
    return f'{self.value:.3f}' + ('' if math.isnan(self.error) else f' ± {self.error:.3f}')


def estimate(values: Sequence[float]) -> Estimate:
  return Estimate(mean(values), standard_error(values))


@dataclasses.dataclass(frozen=True)
class Results:
  """An architecture over its seeds. losses: {tokens: validation loss}; accuracy: {task: {length in tokens: exact matches}}."""

  name: str
  rate: str
  config: Config
  losses: dict[int, Estimate]
  tokens_per_second: Estimate
  accuracy: dict[str, dict[int, Estimate]]
  digits: dict[str, dict[int, Estimate]]

  @property
  def parameters(self) -> int:
    return parameter_count(self.config.model)

  @property
  def flops(self) -> int:
    """Per token, forward and backward."""
    return flops_per_token(self.config.model, self.config.train.seq_len)

  @property
  def loss(self) -> Estimate:
    return self.losses[max(self.losses)]


def read_results(plan: Plan, name: str) -> Results:
  """Of an architecture or a variant. Raises StudyError where an arm of it is not trained or not scored."""
  arms = [arm for arm in plan.chosen() if arm.architecture == name]
  for arm in arms:
    check_recipe(plan, arm)
    if not is_trained(plan, arm) or not is_scored(plan, arm):
      raise StudyError(f'{arm.name} is not {"scored" if is_trained(plan, arm) else "trained"}; run the study without --draw')
  runs, scored = [_metrics(arm.folder(plan)) for arm in arms], [scores(plan, arm) for arm in arms]
  steps = [line['step'] for line in runs[0] if line.get('val_loss') is not None]
  at = [{line['step']: line for line in lines} for lines in runs]

  def over_seeds(metric: str) -> dict[str, dict[int, Estimate]]:
    return {task: {n: estimate([tasks[task]['by_length'][str(n)][metric] for tasks in scored]) for n in plan.asked.lengths} for task in plan.asked.tasks}

  return Results(
    name, arms[0].rate, arms[0].config(plan),
    {at[0][step]['tokens']: estimate([lines[step]['val_loss'] for lines in at]) for step in steps},
    estimate([lines[-1]['tokens'] / lines[-1]['seconds']['steps'] for lines in runs]), over_seeds('acc'), over_seeds('digits'),
  )  # fmt: skip
