"""The job eval: scores of a trained model on tasks, kept in the folder of its run."""

import argparse
import hashlib
import json
import pathlib
import time
from typing import Any

from lmscale import config as config_lib
from lmscale.config import Config
from lmscale.errors import ConfigError
from lmscale.eval import evaluate
from lmscale.eval.plots import draw
from lmscale.eval.scorer import Scorer
from lmscale.eval.tasks import synthetic
from lmscale.exit_codes import DONE
from lmscale.generate.engine import Engine
from lmscale.generate.weights import generation_setup
from lmscale.jobs.generate import check_tokenizer, find_tokenizer, on_all_devices
from lmscale.train.console import say
from lmscale.train.model_folder import open_model
from lmscale.train.workdir import environment, write_atomic

LENGTHS = '1024'  # of synthetic tasks, where no others are asked for


def run(config: Config, flags: argparse.Namespace) -> int:
  """Scores the model in flags.workdir on flags.tasks. Each task's scores are kept as soon as they are there.

  Everything that can be wrong with the names, the files and the lengths is looked at before a task is run.
  """
  names = list(dict.fromkeys(name for name in (flags.tasks or '').split(',') if name))
  evaluate.check_tasks(names)
  options = find_options(flags, config)
  config = on_all_devices(config)
  folder = open_model(flags.workdir)
  tokenizer = find_tokenizer(config, folder)
  check_tokenizer(folder, tokenizer, config)
  context = find_context(flags, config, names, options)
  setup = generation_setup(config)
  model = Scorer(Engine(setup, folder.params(setup, setup.dtype)), tokenizer, config.generate, context)
  asked = {name: evaluate.prepare(name, model, options) for name in names}
  out = folder.path / 'eval' / str(folder.step)
  out.mkdir(parents=True, exist_ok=True)
  for name, samples in asked.items():
    began, cut = time.monotonic(), model.truncated
    scores = evaluate.run_task(name, model, samples)
    scores |= {'truncated': model.truncated - cut, 'seconds': round(time.monotonic() - began, 1)}
    keep(out / 'results.json', name, scores | {'options': describe(options, context)}, config)
    say(line(name, scores))
  draw(json.loads((out / 'results.json').read_text())['tasks'], out)
  say(f'in {out}')
  return DONE


def find_options(flags: argparse.Namespace, config: Config) -> evaluate.Options:
  """What the flags ask for. Raises ConfigError for what cannot be."""
  lengths = (flags.lengths or LENGTHS).split(',')
  if not all(length.isdecimal() and int(length) for length in lengths):
    raise ConfigError(f'--lengths: {flags.lengths!r}; give numbers of tokens, for example --lengths=1024,4096')
  for name in ('shots', 'samples', 'context'):
    if getattr(flags, name) < 0:
      raise ConfigError(f'--{name}: {getattr(flags, name)}; give 0 or more')
  data = pathlib.Path(flags.data).expanduser() if flags.data else None
  if data is not None and not data.is_dir():
    raise ConfigError(f'--data: {data} is no folder')
  haystack = read_haystack(flags.haystack) if flags.haystack else ''
  return evaluate.Options(data, flags.samples, flags.shots, tuple(map(int, lengths)), haystack, config.seed)


def find_context(flags: argparse.Namespace, config: Config, names: list[str], options: evaluate.Options) -> int:
  """Tokens that the model reads at most. Raises ConfigError where it has no positions for them."""
  lengths = options.tokens if set(names) & set(synthetic.NAMES) else ()
  context = flags.context or max(config.train.seq_len, *lengths, 0)
  if config.model.positions == 'learned' and context > config.model.max_positions:
    raise ConfigError(
      f'--context: {context} tokens exceed model.max_positions {config.model.max_positions}, which are learned; give '
      f'--context={config.model.max_positions} or shorter --lengths'
    )
  return context


def read_haystack(name: str) -> str:
  """The text of a file. Raises ConfigError for none."""
  path = pathlib.Path(name).expanduser()
  try:
    return path.read_text('utf-8')
  except UnicodeDecodeError as error:
    raise ConfigError(f'--haystack: {path} is no UTF-8 ({error.reason} at byte {error.start})') from error
  except OSError as error:
    raise ConfigError(f'--haystack: {path}: {error.strerror}') from error


def describe(options: evaluate.Options, context: int) -> dict[str, Any]:
  """What a score depends on beside the model and the data, JSON-able."""
  haystack = hashlib.sha256(options.haystack.encode()).hexdigest() if options.haystack else ''
  return {'samples': options.samples, 'shots': options.shots, 'lengths': list(options.tokens), 'haystack': haystack, 'seed': options.seed,
          'context': context}  # fmt: skip


def keep(path: pathlib.Path, name: str, scores: dict[str, Any], config: Config) -> None:
  """Adds a task's scores to the results of a step, which are whole at any time."""
  try:
    results = json.loads(path.read_text())
  except FileNotFoundError:
    results = {'tasks': {}}
  except ValueError as error:
    raise ConfigError(f'{path}: not JSON ({error}); move it away to begin again') from error
  results['tasks'][name] = scores
  results |= {'config': config_lib.to_dict(config), 'environment': environment()}
  write_atomic(path, json.dumps(results, indent=1) + '\n')


def line(name: str, scores: dict[str, Any]) -> str:
  """A task's scores for people."""
  shown = []
  for metric, value in scores.items():
    if isinstance(value, float) and not metric.endswith('_stderr') and metric != 'seconds':
      error = scores.get(f'{metric}_stderr')
      shown.append(f'{metric} {value:.4f}' + (f' ± {error:.4f}' if error is not None else ''))
  lengths = ''.join(f'\n  {length:>8} tokens   ' + line('', of).strip() for length, of in scores.get('by_length', {}).items())
  cut = f', {scores["truncated"]} cut at their beginning' if scores.get('truncated') else ''
  return f'{name:<20} {", ".join(shown)}, {scores["samples"]} samples{cut}' + (lengths if len(scores.get('by_length', {})) > 1 else '')
