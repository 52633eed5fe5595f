"""The parameters as generation uses them: in the compute dtype, cut over `tensor` only, layers unrolled."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lmscale.config import Config
from lmscale.models.stacking import from_layers, make_stacking, to_layers
from lmscale.parallel import zero
from lmscale.parallel.layout import map_layout
from lmscale.parallel.mesh import MANUAL, make_mesh
from lmscale.parallel.setup import Setup, make_setup


def generation_setup(config: Config, devices: list[jax.Device] | None = None) -> Setup:
  """The setup on which a model is restored only to generate: what was `pipe` in the (resolved) config is `data`.

  Parameters are whole but for `tensor`: each device holds its share of the model and no more. devices: default all.
  """
  mesh = config.mesh
  mesh = dataclasses.replace(mesh, pipe=1, data=mesh.pipe * mesh.data, zero=0, sequence_parallel=False, virtual=1,
                             schedule='1f1b', vocab_on_pipe=False)  # fmt: skip
  config = dataclasses.replace(config, mesh=mesh, train=dataclasses.replace(config.train, stack='unrolled'))
  return make_setup(config, make_mesh(mesh, devices))


def make_compute_copy(setup: Setup) -> Callable[[Any], Any]:
  """(the parameters of a training run) -> those that generation uses, cast before they are gathered over `data`.

  Layers are unrolled: without a gradient there is nothing to gain from stacking them. Those of all stages of a pipeline are
  brought together, so each device holds the whole model (its `tensor` share of it).
  """
  unrolled = make_stacking(setup.config.model.layers, 'unrolled')

  def copy(params: Any) -> Any:
    used = zero.gather_stages(setup.layout, zero.gather_once(setup.layout, params, setup.dtype))
    return {**used, 'layers': from_layers(to_layers(used['layers'], setup.stacking), unrolled)}

  specs = map_layout(lambda leaf: leaf.manual, setup.layout)
  return jax.shard_map(
    copy, mesh=setup.mesh, in_specs=(specs,), out_specs=PartitionSpec(), axis_names=set(MANUAL), check_vma=False
  )
