"""Train a language model, or plan a training run.

  python run.py                                          the quickstart, a few minutes on a laptop
  python run.py --config=configs/mamba_study.py:arch=mamba2,size=tiny --config.train.steps=100
  python run.py --config=configs/megatron_gpt.py:size=1t --job=plan --config.mesh.data=6
  python run.py --config=runs/quickstart/config.json --workdir=runs/again

The same command with the same --workdir resumes. Several processes make one run: see docs/clusters.md. Exit codes:

  0    done
  75   run the same command again: interrupted and saved, or another process of the run is gone
  3    stopped on non-finite steps
  130  interrupted and not saved
  2    a mistake in a flag, a config or the data, one line on stderr; starting again does not help
"""

import argparse
import contextlib
import difflib
import json
import logging
import os
import pathlib
import re
import sys
import traceback
import typing
from collections.abc import Sequence

from lmscale import recipes
from lmscale.config import Config, ConfigError
from lmscale.parallel import distributed
from lmscale.parallel.cluster import find_cluster
from lmscale.plan.advice import is_out_of_memory, memory_advice
from lmscale.train.console import printable
from lmscale.validate import check_mesh, fill_data, resolve_mesh

if typing.TYPE_CHECKING:
  from lmscale.data.loader import Loader

JOBS = ('train', 'plan')
DEFAULT_CONFIG = pathlib.Path(__file__).parent / 'configs' / 'quickstart.py'
USER_ERROR = 2
UNPRINTABLE = r'[^\x20-\x7e\xa0-\U0010ffff]'
INTERRUPTED = 130
NEXT = """what to try next:
  look at the curve              {workdir}/loss.svg
  another architecture           python run.py --config=configs/mamba_study.py:arch=transformer,size=tiny
  another pattern of layers      python run.py --config.model.pattern='M-M-M*-M-' --workdir=runs/pattern
  another mesh                   python run.py --config.mesh.data=2 --config.mesh.tensor=4 --config.mesh.zero=3 --workdir=runs/mesh
  what 8B or 1T would take       python run.py --config=configs/megatron_gpt.py:size=1t --job=plan
  change a layer                 the part "Change a layer" of README.md"""
SMALL_VOCABULARY = 1024  # up to here the order-1 entropy is counted in a dense table
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
    default=str(DEFAULT_CONFIG),
    help='a recipe (.py, with its argument after a colon) or a saved config.json; default: quickstart',
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
    choices=JOBS,
    default='train',
    help='plan: print parameters, FLOPs and bytes per device and allocate nothing; '
    'mesh.data counts as 1 where the config leaves it open',
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
    default=distributed.WAIT,
    metavar='SECONDS',
    help='several processes: how much later than each other they may start; default: %(default).0f',
  )
  parser.add_argument('--json', action='store_true', help='with --job=plan: print JSON')
  parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
  return parser


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
  if flags.json and flags.job != 'plan':
    raise ConfigError('--json: only with --job=plan')
  return flags, overrides


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
    if distributed.peers() is None:
      raise
    print(f'error: {distributed.who()}{traceback.format_exc()}', file=sys.stderr)
    code = 1
  return distributed.finish(code)


def _run_job(argv: Sequence[str]) -> int:
  config = None
  for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, 'reconfigure'):  # a path may hold characters that the terminal's encoding does not have
      stream.reconfigure(errors='backslashreplace')
  try:
    flags, overrides = parse_flags(argv)
    config = recipes.load(flags.config, overrides)
    if flags.job == 'plan':
      return plan_job(config, flags.json)
    distributed.start(find_cluster(vars(flags), os.environ), flags.wait, tpu=not config.emulate)
    with distributed.watching():
      return train_job(config, flags.workdir or f'runs/{config.name}')
  except ConfigError as error:
    return _user_error(error, argv)
  except KeyboardInterrupt:
    print('interrupted before the first step', file=sys.stderr)
    return INTERRUPTED
  except (MemoryError, RuntimeError) as error:
    if config is None or not is_out_of_memory(error):
      raise
    reason = str(error).partition('\n')[0][:300] or 'the host has no memory left'
    return _user_error(ConfigError(f'out of memory: {memory_advice(config)} ({reason})'), argv)
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
  print(f'error: {distributed.who()}' + re.sub(UNPRINTABLE, '?', text), file=sys.stderr)
  return USER_ERROR


def plan_job(config: Config, as_json: bool) -> int:
  """Prints what a run needs. Devices are not touched; mesh.data = -1 counts as 1."""
  import jax

  from lmscale.plan.activations import check_kernels
  from lmscale.plan.report import format_report, make_report

  jax.config.update('jax_platforms', 'cpu')  # shapes only, but tracing them must not take hold of an accelerator
  config = fill_data(config, config.mesh.pipe * config.mesh.tensor)
  check_mesh(config)
  check_kernels(config)
  report = make_report(config)
  print(json.dumps(report, indent=2) if as_json else format_report(report))
  return 0


def train_job(config: Config, folder: str) -> int:
  """Trains to train.steps, or goes on with the run in `folder`; returns the loop's exit code.

  Everything that can be wrong is looked at before the folder is made.
  """
  check_folder(pathlib.Path(folder).expanduser())
  check_vocabulary(config)
  mesh_config = resolve_mesh(config, count_devices(config))

  import jax

  from lmscale.data.loader import Loader
  from lmscale.plan.activations import check_kernels
  from lmscale.plan.devices import describe_peak
  from lmscale.plan.report import format_report, make_report
  from lmscale.train import loop
  from lmscale.train.goodput import process_start
  from lmscale.train.program import Program
  from lmscale.train.workdir import open_workdir

  if config.train.init_from and not (pathlib.Path(folder).expanduser() / 'checkpoints').is_dir():
    loop.initial_checkpoints(config.train.init_from)
  check_kernels(mesh_config, jax.default_backend())
  report = make_report(mesh_config)
  say(format_report(report))
  say(f'peak              {describe_peak(jax.devices()[0].device_kind, config.train.compute_dtype, jax.device_count())}')
  loader = Loader(mesh_config)
  held_out = Loader(mesh_config, 'validation') if config.loop.eval_every else None
  say(format_data(loader, report['tokens'] // config.train.seq_len))
  with open_workdir(folder, config) as workdir:
    say(f'workdir           {workdir.path}')
    distributed.wait_for_all('ready')  # data may take one process much longer than another; collectives do not wait so long
    code = loop.train(
      mesh_config,
      Program(mesh_config),
      loader,
      held_out,
      workdir,
      report['flops_per_token'],
      loader.tokenizer,
      reference=loader.order1_entropy() if loader.vocab <= SMALL_VOCABULARY and distributed.is_first() else None,
      began=process_start(),
    )
  if code == loop.DONE:
    say(NEXT.format(workdir=workdir.path), file=sys.stderr)
  return code


def say(text: str, file: typing.TextIO | None = None) -> None:
  """Prints, in one of the run's processes."""
  if distributed.is_first():
    print(printable(text), file=file, flush=True)


def check_folder(folder: pathlib.Path) -> None:
  """Raises ConfigError where `folder` cannot become a workdir; creates nothing."""
  for path in (folder, *folder.absolute().parents):
    if path.exists():
      if not path.is_dir():
        raise ConfigError(f'--workdir: {path} is a file, not a folder')
      if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f'--workdir: {path} cannot be written')
      return


def check_vocabulary(config: Config) -> None:
  """Raises ConfigError where the tokenizer has ids that the embedding has no row for."""
  from lmscale.data.tokenizer import get_tokenizer

  ids = get_tokenizer(config.data.tokenizer).size
  if ids > config.model.vocab:
    raise ConfigError(
      f'model.vocab: {config.model.vocab} rows are fewer than the {ids} ids of data.tokenizer '
      f'{config.data.tokenizer}; set model.vocab={ids} or more'
    )


def format_data(loader: 'Loader', samples: int) -> str:
  """One line per source: its tokens, its share of the blend, and how often the run passes over it."""
  epochs = loader.epochs(samples)
  return '\n'.join(
    f'data {source["name"]:<12} {source["tokens"]:,} tokens in {source["documents"]:,} documents, '
    f'{source["weight"]:.0%} of the blend, {epochs[source["name"]]:.2f} epochs'
    for source in loader.summary()
  )


def count_devices(config: Config) -> int:
  """The number of devices of all processes, after JAX is set up: float64 and emulated CPU devices where the config asks
  for them, shared out among the processes."""
  import jax

  processes = distributed.count()
  if config.emulate % processes:
    raise ConfigError(f'emulate: {config.emulate} devices cannot be shared equally by {processes} processes')

  if config.train.compute_dtype == 'float64':
    jax.config.update('jax_enable_x64', True)
  if config.emulate:
    jax.config.update('jax_platforms', 'cpu')
    # A process that already runs on devices cannot change their number: the mesh check tells.
    with contextlib.suppress(RuntimeError):
      jax.config.update('jax_num_cpu_devices', config.emulate // processes)
  try:
    return jax.device_count()
  except RuntimeError as error:
    raise ConfigError(f'JAX finds no device: {error}') from error


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
