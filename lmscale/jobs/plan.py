"""The job plan: what a run needs, counted without touching a device."""

import argparse
import json
import pathlib

import jax

from lmscale.config import Config, ConfigError, check_mesh, fill_data
from lmscale.exit_codes import DONE
from lmscale.jobs import ahead
from lmscale.kernels.choice import Choice, tracing_for
from lmscale.parallel.pipeline.layout import step_table
from lmscale.plan.activations import check_kernels
from lmscale.plan.hardware import HARDWARE, Hardware, find_hardware
from lmscale.plan.report import format_report, make_report
from lmscale.plan.suggest import format_suggestions, suggest
from lmscale.plan.timetable import draw


def run(config: Config, flags: argparse.Namespace) -> int:
  """Prints what a run needs. Devices are not touched; mesh.data = -1 counts as 1."""
  hardware = find_hardware(flags.hardware)
  jax.config.update('jax_platforms', 'cpu')  # shapes only, but tracing them must not take hold of an accelerator
  if flags.suggest is not None:
    return _suggest(config, hardware, flags)
  config = fill_data(config, config.mesh.pipe * config.mesh.tensor)
  check_mesh(config)
  if flags.compile:
    ahead.prepare(config, flags.compile)
  kernels = _kernels(config, flags.compile)
  if flags.svg:
    _draw(config, pathlib.Path(flags.svg))
  report = make_report(config, hardware, kernels)
  if flags.compile:
    report['compiled'] = ahead.compile_step(config, flags.compile)
  if not all(bound['fits'] for bound in report['bounds']) and len(hardware) == 1:
    report['advice'] = _advice(config, hardware[0])
  print(json.dumps(report, indent=2) if flags.json else format_report(report))
  return DONE


def _kernels(config: Config, target: str | None) -> list[Choice]:
  """What is chosen here, or on the devices that the step is compiled for."""
  if not target:
    return check_kernels(config)
  with tracing_for(ahead.devices(target, config.mesh.size)[0]):
    return check_kernels(config)


def _advice(config: Config, hardware: Hardware) -> str:
  """Another layout on as many devices, for one that does not fit in the memory of the only hardware that was asked for."""
  try:
    best = suggest(config, hardware, config.mesh.size)[0]
  except ConfigError as error:
    return str(error)
  return f'{best["bytes"] / 1e9:.1f} GB a device with {" ".join(best["flags"])}'


def _suggest(config: Config, hardware: list[Hardware], flags: argparse.Namespace) -> int:
  if len(hardware) > 1 and flags.hardware:
    raise ConfigError('--suggest: name one --hardware')
  chosen = hardware[0] if flags.hardware else HARDWARE['H100']
  found = suggest(config, chosen, flags.suggest)
  print(json.dumps({'hardware': chosen.name, 'suggestions': found}, indent=2) if flags.json else format_suggestions(config, chosen, flags.suggest, found))
  return DONE


def _draw(config: Config, path: pathlib.Path) -> None:
  if config.mesh.pipe == 1:
    raise ConfigError('--svg: mesh.pipe is 1, so there is no timetable to draw; set mesh.pipe above 1 or leave --svg out')
  try:
    draw(step_table(config), path)
  except OSError as error:
    raise ConfigError(f'--svg: {path} cannot be written: {error.strerror}') from error
