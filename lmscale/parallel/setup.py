"""What is decided about a run's programs before any is traced."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from lmscale.config import Config
from lmscale.models.stacking import Stacking, make_stacking
from lmscale.parallel.layout import make_layout
from lmscale.parallel.rules import make_rules


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
  """A resolved config on its mesh: how its layers are stacked, and the tree of LeafLayout that places each parameter."""

  config: Config
  mesh: Mesh
  stacking: Stacking
  layout: Any

  @property
  def dtype(self) -> Any:
    """In which the model computes."""
    return jnp.dtype(self.config.train.compute_dtype)

  @property
  def master_dtype(self) -> Any:
    """Of the parameters that are kept: float32, or float64 in a float64 run."""
    return jnp.promote_types(jnp.float32, self.dtype)

  @property
  def grad_dtype(self) -> Any:
    """Of accumulation and reduction: train.grad_dtype, or float64 in a float64 run."""
    return self.dtype if self.dtype == jnp.float64 else jnp.dtype(self.config.train.grad_dtype)


def make_setup(config: Config, mesh: Mesh) -> Setup:
  """The setup of a resolved config (`mesh.data` known) on its mesh."""
  stacking = make_stacking(config.model.layers, config.train.stack)
  return Setup(config, mesh, stacking, make_layout(config, stacking, make_rules(config)))
