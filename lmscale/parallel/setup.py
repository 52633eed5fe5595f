"""What is decided about a run's programs before any is traced."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lmscale.config import Config
from lmscale.models.context import Context
from lmscale.models.stacking import Stacking, make_stacking
from lmscale.parallel.layout import make_layout
from lmscale.parallel.pipeline.layout import stage_stacking
from lmscale.parallel.rules import make_constrain, make_local, make_rules


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
  pipe = config.mesh.pipe > 1
  stacking = stage_stacking(config) if pipe else make_stacking(config.model.layers, config.train.stack)
  return Setup(config, mesh, stacking, make_layout(config, stacking, make_rules(config)))


def make_context(setup: Setup) -> Callable[[dict[str, jax.Array]], Context]:
  """What every layer is told of a microbatch inside the step's shard_map."""
  config = setup.config
  rules = make_rules(config)
  constrain, local = make_constrain(config, rules), make_local(config, rules)

  def context(microbatch: dict[str, jax.Array]) -> Context:
    return Context(
      positions=microbatch['positions'],
      segment_ids=microbatch['segment_ids'],
      constrain=constrain,
      local=local,
      tensor=config.mesh.tensor,
      deterministic=config.train.deterministic,
      vocab_axis='pipe' if config.mesh.vocab_on_pipe else None,
    )

  return context
