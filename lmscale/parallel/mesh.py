"""The named mesh. Adding an axis touches this file and `rules.py` only."""

import jax
from jax.sharding import AxisType, Mesh

from lmscale.config import MeshConfig

AXES = ('pipe', 'data', 'tensor')  # outermost first: tensor, which talks most, on neighbouring devices
MANUAL = ('pipe', 'data')  # axes the step handles itself; tensor is left to the compiler


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
  """A mesh of shape (pipe, data, tensor) over `devices` (default: all). The config must be resolved (data > 0)."""
  shape = (config.pipe, config.data, config.tensor)
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
