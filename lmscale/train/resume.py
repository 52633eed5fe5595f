"""Whether a run may go on, and from what: the newest checkpoint that is whole, under settings that compute the same.

A checkpoint's metadata says what it came from (`about`): the steps, samples and tokens taken, the identity of the data and
the whole config. They are compared with what would go on before the arrays are read:

* a run goes on (`check_run`) where every batch and learning rate used so far and everything else that is computed stays as it
  was. How and for how long it runs may change, and so may the names and places of its data;
* a new run starts from the parameters of another (`check_parameters`, train.init_from) where they are the same function of the
  same tokens. What may be meant, such as a longer context, is told in a line; data and optimizer are its own.
"""

import json
import logging
import pathlib
import re
from typing import Any

from lmscale import config as config_lib
from lmscale.config import Config, run_tokens
from lmscale.errors import ConfigError
from lmscale.train.changes import MAY_CHANGE, ON_PURPOSE, changed, changed_function, show
from lmscale.train.checkpoint import Checkpointer
from lmscale.train.model_folder import PARAMS_ONLY, ModelFolder, open_model, trained_with
from lmscale.train.schedule import Schedule, StepInputs, first_difference
from lmscale.train.workdir import Workdir

# What is not among `MAY_CHANGE` may not change. Nor these, unless another comparison finds what they stand for equal: the identity of the data; every step's batch and learning rate.
BY_IDENTITY = ('data.tokenizer', 'data.end_token', 'data.sources.')
BY_SCHEDULE = (
  'train.steps', 'train.batch', 'train.ramp_start', 'train.ramp_increment', 'train.ramp_tokens', 'optimizer.schedule',
  'optimizer.learning_rate', 'optimizer.min_learning_rate', 'optimizer.warmup_tokens', 'optimizer.decay_tokens',
  'optimizer.wsd_decay_tokens',
)  # fmt: skip
NAME = re.compile(r'sources\.\d+\.name$')  # in a data identity: what a source is called

log = logging.getLogger(__name__)


def about(config: Config, inputs: StepInputs, data: Any) -> dict[str, Any]:
  """What a checkpoint after the step of `inputs` came from, as JSON values. data: the loader's identity."""
  samples = inputs.first_sample + inputs.batch
  taken = {'step': inputs.step + 1, 'samples': samples, 'tokens': samples * config.train.seq_len}
  return taken | {'data': _as_json(data), 'config': config_lib.to_dict(config)}


def begin(config: Config, program: Any, data: Any, workdir: Workdir, checkpoints: Checkpointer) -> tuple[Any, int, list[str]]:
  """(state, steps taken, notes for people): of this run's newest checkpoint that is whole, else of a new run.

  A new run starts from the parameters of train.init_from where that is given (continued pre-training), else from the seed.

  Raises:
    ConfigError: the run may not go on as asked, there are only damaged checkpoints, or one is not of this model.
  """
  notes: list[str] = []

  def check(step: int, meta: dict[str, Any]) -> None:
    notes[:] = check_run(config, data, step, meta, workdir)

  if checkpoints.latest() is None:
    if not config.train.init_from:
      return program.init(), 0, notes
    state, notes = _with_parameters_of(config, program, data)
    return state, 0, notes
  tree, meta = checkpoints.restore(program.abstract_stored(), index=program.index, check=check)
  return program.from_stored(tree), meta['step'], notes


def check_run(config: Config, data: Any, step: int, meta: dict[str, Any], workdir: Workdir) -> list[str]:
  """Whether a run may go on with `config` and `data` from the checkpoint of `step` with this metadata; notes for people.

  The config is compared with the checkpoint's own, else (of an older version) with config.json.

  Raises:
    ConfigError: it would not be the same run; one line for each difference.
  """
  path = workdir.path
  if meta.get(PARAMS_ONLY):
    raise ConfigError(
      f'workdir {path} holds a model without optimizer state, no run that can go on; start a new run from it: another --workdir '
      f'with --config.train.init_from={path}'
    )
  old, notes = trained_with(meta, path, step)
  notes += check_config(old, config, step, path) if old else ['the settings could not be compared']
  check_identity(meta['data'], data, path, changed(old, config, BY_IDENTITY) if old else [])
  inputs = Schedule(config).inputs(step)
  wanted = {'samples': inputs.first_sample, 'tokens': inputs.tokens}
  if wrong := [f'  {name}: {meta[name]} -> {wanted[name]}' for name in wanted if meta[name] != wanted[name]]:
    raise ConfigError('\n'.join([f'workdir {path} holds a run that has taken {step} steps with other batches:', *wrong]))
  return notes


def check_config(old: Config, new: Config, taken: int, path: pathlib.Path) -> list[str]:
  """Refuses a config under which a resumed run would not be the run that was started; notes for people.

  The schedule of batches and learning rates may change for the steps after the `taken` ones. Names and places of data are
  `check_identity`'s.

  Raises:
    ConfigError: a heading and one line per field that changed.
  """
  lines = [f'  {line}' for line in changed(old, new, but=(*MAY_CHANGE, *BY_IDENTITY, *BY_SCHEDULE))]
  schedule = changed(old, new, BY_SCHEDULE)
  ends = [c.optimizer.decay_tokens or run_tokens(c.train) for c in (old, new)]
  if ends[0] == ends[1] or 'constant' in (old.optimizer.schedule, new.optimizer.schedule):
    schedule = [line for line in schedule if not line.startswith('train.steps')]  # it only says how long the run goes on
  elif 0 in (old.optimizer.decay_tokens, new.optimizer.decay_tokens):
    schedule = [line for line in schedule if not line.startswith('optimizer.decay_tokens')]
    schedule.append(
      f'optimizer.decay_tokens: {ends[0]} -> {ends[1]} (0 means the end of the run; keep it by optimizer.decay_tokens={ends[0]})'
    )
  if old.train.steps != new.train.steps:
    hint = f' (a recipe\'s follows the length of the run; keep it by optimizer.warmup_tokens={old.optimizer.warmup_tokens})'
    schedule = [line + hint * line.startswith('optimizer.warmup_tokens') for line in schedule]
  before, after = Schedule(old), Schedule(new)
  at = first_difference(before, after, taken)
  if at is not None:
    lines += [f'  {line}' for line in schedule]
  if at is not None and old.train.seq_len == new.train.seq_len:
    lines.append(f'  step {at + 1} of the {taken} taken: {_plan(before, at)} -> {_plan(after, at)}')
  if lines:
    heading = f'workdir {path} holds a run with other settings; restore them or give another --workdir:'
    raise ConfigError('\n'.join([heading, *lines]))
  return [f'from step {taken + 1} on: {line}' for line in schedule]


def _plan(schedule: Schedule, step: int) -> str:
  inputs = schedule.inputs(step)
  return f'samples {inputs.first_sample}..{inputs.first_sample + inputs.batch - 1}, learning rate {inputs.learning_rate!r}'


def check_identity(old: Any, new: Any, path: pathlib.Path, fields: list[str] = ()) -> None:
  """Refuses data whose identity (any JSON value) is not the one the checkpoint was trained on, but for sources' names.

  fields: lines for the fields of the config that were changed, to be told with it.

  Raises:
    ConfigError: one line per part that changed.
  """
  before, after = config_lib.flatten(old), config_lib.flatten(_as_json(new))
  lines = [f'  {n or "identity"}: {show(before, n)} -> {show(after, n)}' for n in {**before, **after}
           if before.get(n) != after.get(n) and not NAME.match(n)]  # fmt: skip
  if lines:
    heading = (
      f'workdir {path} was trained on other data than it would read now; restore it, or start a new run from its '
      f'parameters (another --workdir with --config.train.init_from={path}):'
    )
    raise ConfigError('\n'.join([heading, *lines, *(f'  {line}' for line in fields)]))


def initial_model(config: Config) -> ModelFolder:
  """The model that train.init_from names. Raises ConfigError where there is none."""
  try:
    return open_model(config.train.init_from)
  except ConfigError as error:
    raise ConfigError(f'train.init_from: {error}') from error


def check_source(config: Config, tokenizer: str) -> None:
  """Looks at the model that train.init_from names before anything is made. Call from every process.

  tokenizer: the identity of the tokenizer.

  Raises:
    ConfigError: there is none whose metadata is whole, or see `check_parameters`.
  """
  source = initial_model(config)
  check_parameters(config, tokenizer, source.step, source.meta)


def check_parameters(config: Config, tokenizer: str | None, step: int, meta: dict[str, Any]) -> list[str]:
  """Whether the parameters of train.init_from's checkpoint are those of `config`'s model; notes for people.

  Raises:
    ConfigError: they are another function, or of other tokens; one line per field.
  """
  folder = pathlib.Path(config.train.init_from).expanduser()
  old, missing = trained_with(meta, folder, step)
  if old is None:
    raise ConfigError(f'train.init_from: {"".join(missing)}; without it nobody knows what the parameters mean: put it back')
  lines = [f'  {line}' for line in changed_function(old, config)]
  before = _tokenizer(meta['data'])
  if before is None and meta.get(PARAMS_ONLY):
    missing = [*missing, 'with which tokenizer they were trained is not known']
  elif before != tokenizer:
    lines.append(f'  data.tokenizer: {json.dumps(before)} -> {json.dumps(tokenizer)}')
  if lines:
    heading = f'train.init_from: the parameters in {folder} (step {step}) are of another model; set as there what it computes:'
    raise ConfigError('\n'.join([heading, *lines]))
  notes = [f'starting from the parameters of {folder} at step {step}', *missing]
  return notes + [f'other than there: {line}' for line in changed(old, config, ON_PURPOSE)]


def _with_parameters_of(config: Config, program: Any, data: Any) -> tuple[Any, list[str]]:
  """A fresh state with the parameters of the model that train.init_from names, and notes for people."""
  notes: list[str] = []

  def check(step: int, meta: dict[str, Any]) -> None:
    notes[:] = check_parameters(config, _tokenizer(data), step, meta)

  source = initial_model(config)
  fresh = program.init().replace(params=None)  # let go, so that there are never two copies of the parameters
  tree = source.restore({'params': program.abstract_stored()['params']}, program.index, check)
  return fresh.replace(params=program.params_from_stored(tree['params'])), notes


def _tokenizer(data: Any) -> str | None:
  return data.get('tokenizer') if isinstance(data, dict) else None


def _as_json(value: Any) -> Any:
  """A value as JSON gives it back (tuples become lists)."""
  return json.loads(json.dumps(value))


