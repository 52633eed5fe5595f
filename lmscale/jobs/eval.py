"""The job eval: scores of a trained model on tasks, kept in the folder of its run."""

import argparse
import dataclasses
import pathlib
from collections.abc import Callable

from lmscale.config import Config, validate
from lmscale.data.tokenizer import Tokenizer
from lmscale.errors import ConfigError
from lmscale.eval import evaluate
from lmscale.eval.scorer import Scorer
from lmscale.exit_codes import DONE
from lmscale.generate.engine import Engine
from lmscale.generate.weights import generation_setup
from lmscale.jobs.generate import check_tokenizer, find_tokenizer, on_all_devices
from lmscale.train.console import say
from lmscale.train.model_folder import ModelFolder, open_model
from lmscale.train.scores import Scores, find_options


def run(config: Config, flags: argparse.Namespace) -> int:
  """Scores the model in flags.workdir on tasks, those of config.eval unless flags name others. Each task's scores are kept as soon as they are
  there.

  Everything that can be wrong with the names, the files and the lengths is looked at before a task is run.
  """
  config = with_flags(config, flags)
  names = list(dict.fromkeys(config.eval.tasks))
  evaluate.check_tasks(names, '--tasks')
  options = find_options(config, names, flags.shots, read_haystack(flags.haystack) if flags.haystack else '', flags.context)
  asked: dict[str, evaluate.Asked] = {}

  def prepare(tokenizer: Tokenizer) -> None:
    asked.update((name, evaluate.prepare(name, tokenizer, options)) for name in names)

  model, folder = open_scorer(config, flags.workdir, options.context, prepare)
  scores = Scores(folder.path / 'eval' / str(folder.step), folder.fingerprint(), config, options)
  for name in names:
    scores.take(name, model, asked[name], say)
  scores.draw()
  say(f'in {scores.path}')
  return DONE


def open_scorer(
  config: Config, workdir: str | pathlib.Path, context: int, prepare: Callable[[Tokenizer], None] = lambda tokenizer: None
) -> tuple[Scorer, ModelFolder]:
  """The model in a folder, on all devices, ready to be asked; `context` tokens are read at most.

  prepare(tokenizer): is called before arrays are read, and may refuse by a ConfigError.

  Raises:
    ConfigError: no model, a damaged one, or one of another tokenizer.
  """
  config = on_all_devices(config)
  folder = open_model(workdir)
  tokenizer = find_tokenizer(config, folder)
  check_tokenizer(folder, tokenizer, config)
  prepare(tokenizer)
  setup = generation_setup(config)
  return Scorer(Engine(setup, folder.params(setup, setup.dtype)), tokenizer, config.generate, context), folder


def with_flags(config: Config, flags: argparse.Namespace) -> Config:
  """The config with what the flags say in `eval`. Raises ConfigError for what cannot be."""
  for name in ('samples', 'shots', 'context'):
    if (getattr(flags, name) or 0) < 0:
      raise ConfigError(f'--{name}: {getattr(flags, name)}; give 0 or more')
  given = {} if flags.samples is None else {'samples': flags.samples}
  if flags.tasks is not None:
    given['tasks'] = tuple(name for name in flags.tasks.split(',') if name)
  if flags.lengths is not None:
    lengths = flags.lengths.split(',')
    if not all(length.isdecimal() and int(length) for length in lengths):
      raise ConfigError(f'--lengths: {flags.lengths!r}; give numbers of tokens, for example --lengths=1024,4096')
    given['lengths'] = tuple(map(int, lengths))
  if flags.data is not None:
    if not pathlib.Path(flags.data).expanduser().is_dir():
      raise ConfigError(f'--data: {flags.data} is no folder')
    given['data'] = flags.data
  config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, **given))
  validate(config)
  return config


def read_haystack(name: str) -> str:
  """The text of a file. Raises ConfigError for none."""
  path = pathlib.Path(name).expanduser()
  try:
    return path.read_text('utf-8')
  except UnicodeDecodeError as error:
    raise ConfigError(f'--haystack: {path} is no UTF-8 ({error.reason} at byte {error.start})') from error
  except OSError as error:
    raise ConfigError(f'--haystack: {path}: {error.strerror}') from error
