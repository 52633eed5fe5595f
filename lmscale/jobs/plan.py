"""The job plan: what a run needs, counted without touching a device."""

import argparse
import json
import pathlib

import jax

from lmscale.config import Config, ConfigError, check_mesh, fill_data
from lmscale.exit_codes import DONE
from lmscale.jobs import ahead
from lmscale.plan.activations import check_kernels
from lmscale.plan.hardware import find_hardware
from lmscale.plan.pipeline import step_table
from lmscale.plan.report import format_report, make_report
from lmscale.plan.timetable import draw


def run(config: Config, flags: argparse.Namespace) -> int:
  """Prints what a run needs. Devices are not touched; mesh.data = -1 counts as 1."""
  hardware = find_hardware(flags.hardware)
  jax.config.update('jax_platforms', 'cpu')  # shapes only, but tracing them must not take hold of an accelerator
  config = fill_data(config, config.mesh.pipe * config.mesh.tensor)
  check_mesh(config)
  if flags.compile:
    ahead.prepare(config, flags.compile)
  check_kernels(config)
  if flags.svg:
    _draw(config, pathlib.Path(flags.svg))
  report = make_report(config, hardware)
  if flags.compile:
    report['compiled'] = ahead.compile_step(config, flags.compile)
  print(json.dumps(report, indent=2) if flags.json else format_report(report))
  return DONE


def _draw(config: Config, path: pathlib.Path) -> None:
  if config.mesh.pipe == 1:
    raise ConfigError('--svg: mesh.pipe is 1, so there is no timetable to draw; set mesh.pipe above 1 or leave --svg out')
  try:
    draw(step_table(config), path)
  except OSError as error:
    raise ConfigError(f'--svg: {path} cannot be written: {error.strerror}') from error
