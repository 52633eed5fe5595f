"""The job train: from a config to a trained model in a folder; the same again goes on."""

import argparse
import os
import pathlib
import sys

import jax

from lmscale import processes
from lmscale.config import Config, resolve_mesh
from lmscale.data.loader import Loader
from lmscale.data.tokenizer import fitting_tokenizer
from lmscale.errors import ConfigError
from lmscale.exit_codes import DONE
from lmscale.jobs.devices import count_devices
from lmscale.jobs.kernels import settle_kernels
from lmscale.plan.devices import describe_peak
from lmscale.plan.report import format_report, make_report
from lmscale.train import loop, program, scores
from lmscale.train.console import say
from lmscale.train.goodput import process_start
from lmscale.train.resume import check_source
from lmscale.train.workdir import open_workdir

NEXT = """what to try next:
  look at the curve              {workdir}/loss.svg
  text from it                   python run.py --job=generate --workdir={workdir} --prompt='def '
  its scores                     python run.py --job=eval --workdir={workdir} --tasks=phonebook,induction --lengths=256,512
  another architecture           python run.py --config=configs/mamba_study.py:arch=transformer,size=tiny
  another pattern of layers      python run.py --config.model.pattern='M-M-M*-M-' --workdir=runs/pattern
  another mesh                   python run.py --config.mesh.data=2 --config.mesh.tensor=4 --config.mesh.zero=3 --workdir=runs/mesh
  what 8B or 1T would take       python run.py --config=configs/megatron_gpt.py:size=1t --job=plan
  change a layer                 the part "Change a layer" of README.md"""
SMALL_VOCABULARY = 1024  # up to here the order-1 entropy is counted in a dense table


def run(config: Config, flags: argparse.Namespace) -> int:
  """Trains to train.steps, or goes on with the run in flags.workdir; returns the loop's exit code.

  Everything that can be wrong is looked at before the folder is made.
  """
  folder = pathlib.Path(flags.workdir or f'runs/{config.name}').expanduser()
  check_folder(folder)
  tokenizer = fitting_tokenizer(config)
  mesh_config = resolve_mesh(config, count_devices(config))
  if config.train.init_from and not (folder / 'checkpoints').is_dir():
    check_source(config, tokenizer.identity)
  report = make_report(mesh_config, kernels=settle_kernels(mesh_config))
  say(format_report(report))
  say(f'peak              {describe_peak(jax.devices()[0].device_kind, config.train.compute_dtype, jax.device_count())}')
  loader = Loader(mesh_config, tell=processes.is_first())
  held_out = Loader(mesh_config, 'validation', tell=False) if config.loop.eval_every else None
  say(format_data(loader, report['tokens'] // config.train.seq_len))
  evaluations = scores.Schedule(mesh_config, loader.tokenizer) if config.eval.every else None
  with open_workdir(folder, config) as workdir:
    say(f'workdir           {workdir.path}')
    processes.wait_for_all('ready')  # data may take one process much longer than another; collectives do not wait so long
    code = loop.train(
      mesh_config,
      program.Program(mesh_config),
      loader,
      held_out,
      workdir,
      report['flops_per_token'],
      loader.tokenizer,
      reference=loader.order1_entropy() if loader.vocab <= SMALL_VOCABULARY and processes.is_first() else None,
      began=process_start(),
      evaluations=evaluations,
    )
  if code == DONE:
    say(NEXT.format(workdir=workdir.path), file=sys.stderr)
  return code


def check_folder(folder: pathlib.Path) -> None:
  """Raises ConfigError where `folder` cannot become a workdir; creates nothing."""
  for path in (folder, *folder.absolute().parents):
    if path.exists():
      if not path.is_dir():
        raise ConfigError(f'--workdir: {path} is a file, not a folder')
      if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f'--workdir: {path} cannot be written')
      return


def format_data(loader: Loader, samples: int) -> str:
  """One line per source: its tokens, its share of the blend, how often the run passes over it, what was read and what is
  held out."""
  epochs = loader.epochs(samples)
  lines = []
  for source in loader.summary():
    read = f'{source["files"]:,} file{_s(source["files"])} of {source["bytes"]:,} bytes' + f' ({source["path"]})' * bool(source['path'])
    lines.append(
      f'data {source["name"]:<12} {source["tokens"]:,} tokens in {source["documents"]:,} document{_s(source["documents"])}, '
      f'{source["weight"]:.0%} of the blend, {epochs[source["name"]]:.2f} epochs, {read}, {source["other_split"]:.1%} held out'
      + ' at the ends of documents' * source['ends']
    )
  return '\n'.join(lines)


def _s(count: int) -> str:
  return 's' * (count != 1)
