"""The named mesh. Adding an axis touches this file and `rules.py` only."""

import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from lmscale.config import MeshConfig

AXES = ('pipe', 'data', 'tensor')  # outermost first: tensor, which talks most, on neighbouring devices
MANUAL = ('pipe', 'data')  # axes the step handles itself; tensor is left to the compiler


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
  """A mesh of shape (pipe, data, tensor) over the first of `devices` (default: all). The config must be resolved (data > 0)."""
  shape = (config.pipe, config.data, config.tensor)
  devices = (jax.devices() if devices is None else devices)[: math.prod(shape)]
  # An axis may have a part of a dim of a TPU's torus, for example tensor 8 in a slice of 16 * 16 * 16.
  placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))
