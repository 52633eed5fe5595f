"""Train a language model, plan a training run, generate with a trained model, or score it.

  python run.py                                          the quickstart, a few minutes on a laptop
  python run.py --config=configs/mamba_study.py:arch=mamba2,size=tiny --config.train.steps=100
  python run.py --config=configs/megatron_gpt.py:size=1t --job=plan --config.mesh.data=6
  python run.py --config=runs/quickstart/config.json --workdir=runs/again
  python run.py --job=generate --workdir=runs/quickstart --prompt='def '
  python run.py --job=eval --workdir=runs/quickstart --tasks=phonebook,induction --lengths=256,512

The same command with the same --workdir resumes. Several processes make one run: see docs/clusters.md. Exit codes:

  0    done
  75   run the same command again: interrupted and saved, or before the first step, or another process is gone
  3    stopped on steps that were not finite or spikes
  130  interrupted and not saved
  2    a mistake in a flag, a config or the data, one line on stderr; starting again does not help
"""

if __name__ == '__main__':  # before anything is imported that takes a while
  from lmscale.processes import interrupt

  interrupt.install()

import argparse
import difflib
import logging
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Sequence

from lmscale import jobs, processes
from lmscale.config import Config, recipes
from lmscale.errors import ConfigError
from lmscale.exit_codes import AGAIN, USER_ERROR
from lmscale.plan.advice import generation_advice, is_out_of_memory, memory_advice
from lmscale.processes.interrupt import AT_ONCE

DEFAULT_CONFIG = pathlib.Path(__file__).parent / 'configs' / 'quickstart.py'
UNPRINTABLE = r'[^\x20-\x7e\xa0-\U0010ffff]'
EXTRAS = {'lm_eval': 'eval', 'transformers': 'hf', 'torch': 'hf'}  # imported package -> the extra that brings it


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> None:
    raise ConfigError(message)


def make_parser() -> argparse.ArgumentParser:
  """The flags. Overrides of config fields are taken out before argparse sees the rest."""
  parser = _Parser(
    'run.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument(
    '--config',
    metavar='FILE[:ARG]',
    help='a recipe (.py, with its argument after a colon) or a saved config.json; default: quickstart, or with --job=generate '
    'and --job=eval the config of the run in --workdir',
  )
  parser.add_argument(
    '--config.FIELD=VALUE',
    metavar='',
    dest='unused',
    default=argparse.SUPPRESS,
    help='change one field, for example --config.optimizer.learning_rate=3e-4; may be repeated',
  )
  parser.add_argument(
    '--job',
    choices=jobs.JOBS,
    default=next(iter(jobs.JOBS)),
    help='; '.join(f'{name}: {job.help}' for name, job in jobs.JOBS.items()),
  )
  parser.add_argument(
    '--workdir', metavar='FOLDER', default='', help='where a run is kept; default: runs/<name of the config>'
  )
  parser.add_argument('--coordinator', metavar='HOST:PORT', help='several processes: where process 0 listens')
  parser.add_argument('--processes', type=int, metavar='N', help='several processes: how many')
  parser.add_argument('--process', type=int, metavar='I', help='several processes: which one this is, from 0')
  parser.add_argument(
    '--wait',
    type=float,
    default=processes.WAIT,
    metavar='SECONDS',
    help='several processes: how much later than each other they may start; default: %(default).0f',
  )
  for add in (_add_plan_flags, _add_generate_flags, _add_eval_flags):
    add(parser)
  parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
  return parser


def _add_plan_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--json', action='store_true', help='print JSON (with --job=plan)')
  parser.add_argument('--svg', metavar='FILE', help='draw the timetable of a pipeline (with --job=plan)')
  parser.add_argument(
    '--hardware',
    action='append',
    default=[],
    metavar='NAME',
    help='on what to bound the time of a step (with --job=plan): A100, H100, H200, v5p or all, the default; may be repeated',
  )
  parser.add_argument(
    '--compile',
    nargs='?',
    const='cpu',
    metavar='TARGET',
    help='compile the step ahead of time (with --job=plan): cpu, whose devices are emulated, A100, H100, H200 or v5p; default: cpu',
  )
  parser.add_argument(
    '--suggest', type=int, metavar='DEVICES', help='print the fastest meshes of so many devices that fit (with --job=plan); of --hardware, or H100'
  )


def _add_generate_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--prompt', metavar='TEXT', help='what to continue (with --job=generate)')
  parser.add_argument(
    '--prompts', metavar='FILE', help='JSON lines {"text": ...} or {"ids": [...]}, each to continue (with --job=generate)'
  )
  parser.add_argument(
    '--out', metavar='FILE', help='write JSON lines with prompt, ids, text and finish instead of printing (with --job=generate)'
  )


def _add_eval_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--tasks', metavar='NAME,NAME', help='what to score the model on (with --job=eval); default, as of the next three: eval.* of the config')
  parser.add_argument('--data', metavar='FOLDER', help='where data sets lie as JSON lines (with --job=eval)')
  parser.add_argument('--lengths', metavar='N,N', help='tokens of synthetic tasks (with --job=eval)')
  parser.add_argument('--samples', type=int, metavar='N', help='of each task at most so many, drawn; 0: all of a file, 100 of a synthetic task (with --job=eval)')
  parser.add_argument('--shots', type=int, default=0, metavar='N', help='examples to show before a standard question (with --job=eval); default: 0')
  parser.add_argument('--haystack', metavar='FILE', help="text in which needles are hidden (with --job=eval); default: Python's help topics")
  parser.add_argument(
    '--context',
    type=int,
    default=0,
    metavar='N',
    help='tokens that the model reads at most (with --job=eval); default: train.seq_len, or the longest of the lengths',
  )


def parse_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
  """Flags and overrides [(dotted field, text)]. Raises ConfigError for anything else on the command line."""
  rest, overrides, words = [], [], iter(argv)
  for word in words:
    if not word.startswith('--config.'):
      rest.append(word)
      continue
    field, equals, value = word.removeprefix('--config.').partition('=')
    if not equals and (value := next(words, None)) is None:
      raise ConfigError(f'{word}: no value; write {word}=VALUE')
    overrides.append((field, value))
  parser = make_parser()
  flags, unknown = parser.parse_known_args(rest)
  if unknown:
    raise _unknown_argument(unknown[0], parser)
  if flags.json and not jobs.JOBS[flags.job].json:
    able = ' or '.join(f'--job={name}' for name, job in jobs.JOBS.items() if job.json)
    raise ConfigError(f'--json: only with {able}')
  for job, name in ((job, name) for job, about in jobs.JOBS.items() for name in about.flags):
    if getattr(flags, name) not in (None, 0, [], '') and flags.job != job:
      raise ConfigError(f'--{name}: only with --job={job}')
  return flags, overrides


def load_config(flags: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> Config:
  """The config of a job: --config, else that of the trained model which the job uses, else the quickstart; then the overrides."""
  if flags.config is None and jobs.JOBS[flags.job].trained:
    if not flags.workdir:
      raise ConfigError(f'--workdir: give the folder of a run; --job={flags.job} uses the model in it')
    from lmscale.train.model_folder import folder_config  # slow to import

    return recipes.change(folder_config(flags.workdir), overrides)
  return recipes.load(flags.config or str(DEFAULT_CONFIG), overrides)


def _unknown_argument(word: str, parser: argparse.ArgumentParser) -> ConfigError:
  if not word.startswith('-'):
    hint = f'; write --config.{word}' if '=' in word else '; all arguments are flags, see --help'
    return ConfigError(f'unexpected argument {word!r}{hint}')
  known = [name for name in parser._option_string_actions if 'FIELD' not in name]
  near = difflib.get_close_matches(word.partition('=')[0], known, 1, 0.5)
  return ConfigError(f'unknown flag {word!r}' + (f'; did you mean {near[0]}?' if near else ', see --help'))


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one job; returns the exit code, which is that of all processes of the run."""
  argv = sys.argv[1:] if argv is None else argv
  try:
    code = _run_job(argv)
  except Exception:
    if processes.count() == 1:
      raise
    print(f'error: {processes.who()}{traceback.format_exc()}', file=sys.stderr)
    code = 1
  return processes.finish(code)


def _run_job(argv: Sequence[str]) -> int:
  config = None
  for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, 'reconfigure'):  # a path may hold characters that the terminal's encoding does not have
      stream.reconfigure(errors='backslashreplace')
  try:
    flags, overrides = parse_flags(argv)
    config = load_config(flags, overrides)
    if jobs.JOBS[flags.job].together:
      processes.start(processes.find_cluster(vars(flags), os.environ), flags.wait, tpu=not config.emulate)
    with processes.watching():
      return jobs.find(flags.job)(config, flags)
  except ConfigError as error:
    return _user_error(error, argv)
  except KeyboardInterrupt:
    print(f'SIGINT: {AT_ONCE}', file=sys.stderr)
    return AGAIN
  except (MemoryError, RuntimeError) as error:
    if config is None or not is_out_of_memory(error):
      raise
    reason = str(error).partition('\n')[0][:300] or 'the host has no memory left'
    advice = (generation_advice if jobs.JOBS[flags.job].trained else memory_advice)(config)
    return _user_error(ConfigError(f'out of memory: {advice} ({reason})'), argv)
  except OSError as error:
    if error.errno is None:
      raise
    where = f'{os.fsdecode(error.filename)}: ' if isinstance(error.filename, str | bytes) else ''
    return _user_error(ConfigError(f'{where}{error.strerror}'), argv)
  except ModuleNotFoundError as error:
    package = (error.name or '').partition('.')[0]
    if package in ('', 'lmscale'):
      raise
    extra = EXTRAS.get(package)
    install = f"pip install -e '.[{extra}]'" if extra else 'make install'
    return _user_error(ConfigError(f'the package {package} is not installed; install it with: {install}'), argv)


def _user_error(error: Exception, argv: Sequence[str]) -> int:
  if '--debug' in argv:
    traceback.print_exc()
  text = '; '.join(filter(None, map(str.strip, str(error).splitlines()))).replace(':; ', ': ')
  print(f'error: {processes.who()}' + re.sub(UNPRINTABLE, '?', text), file=sys.stderr)
  return USER_ERROR


class PlainWarnings(logging.Handler):
  """Shows warnings of our own modules as lines on standard error, without the module in capitals."""

  def emit(self, record: logging.LogRecord) -> None:
    print('warning: ' + re.sub(UNPRINTABLE, '?', record.getMessage()), file=sys.stderr)


def plain_warnings() -> None:
  """Takes our own modules' warnings away from other packages' handlers."""
  logger = logging.getLogger('lmscale')
  logger.addHandler(PlainWarnings())
  logger.propagate = False


if __name__ == '__main__':
  plain_warnings()
  if '--debug' not in sys.argv:  # what goes wrong in a save or a restore is told by us, in one line
    logging.getLogger('absl').setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None  # tracebacks of what Orbax's threads were doing when it was given up
  sys.exit(main())
