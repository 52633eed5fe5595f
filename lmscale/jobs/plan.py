"""The job plan: what a run needs, counted without touching a device."""

import argparse
import json

import jax

from lmscale.config import Config, check_mesh, fill_data
from lmscale.exit_codes import DONE
from lmscale.plan.activations import check_kernels
from lmscale.plan.report import format_report, make_report


def run(config: Config, flags: argparse.Namespace) -> int:
  """Prints what a run needs. Devices are not touched; mesh.data = -1 counts as 1."""
  jax.config.update('jax_platforms', 'cpu')  # shapes only, but tracing them must not take hold of an accelerator
  config = fill_data(config, config.mesh.pipe * config.mesh.tensor)
  check_mesh(config)
  check_kernels(config)
  report = make_report(config)
  print(json.dumps(report, indent=2) if flags.json else format_report(report))
  return DONE
