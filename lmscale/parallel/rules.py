"""The one table that says where each logical axis lives on the mesh."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lmscale.config import Config
from lmscale.models.context import Axes
from lmscale.parallel.mesh import MANUAL

Rules = dict[str, str | None]


def make_rules(config: Config) -> Rules:
  """Logical axis -> mesh axis (or None: whole on every device).

  Groups and KV heads that `tensor` does not divide stay whole on every device (see `models.layers.cut_groups`).
  """
  tensor = config.mesh.tensor
  divides = {
    'kv_heads': config.model.attention.kv_heads % tensor == 0,
    'groups': config.model.mamba2.groups % tensor == 0,
  }
  return {
    'batch': 'data',
    'seq': 'tensor' if config.mesh.sequence_parallel else None,
    'length': None,
    'embed': None,
    'heads': 'tensor',
    'kv_heads': 'tensor' if divides['kv_heads'] else None,
    'groups': 'tensor' if divides['groups'] else None,
    'ff': 'tensor',
    'vocab': 'tensor',
    'tokens': None,
  }


def partition(axes: Axes, rules: Rules, drop: tuple[str, ...] = ()) -> PartitionSpec:
  """The PartitionSpec of an array with these logical axes; mesh axes in `drop` are left out.

  Raises ValueError where an axis has no rule or two dims would use one mesh axis.
  """
  unknown = [name for name in axes if name is not None and name not in rules]
  if unknown:
    raise ValueError(f'no sharding rule for logical axis {unknown[0]!r}; known: {", ".join(rules)}')
  mesh_axes = [None if name is None else rules[name] for name in axes]
  used = [axis for axis in mesh_axes if axis is not None]
  if len(used) != len(set(used)):
    raise ValueError(f'logical axes {axes} use a mesh axis twice: {mesh_axes}')
  return PartitionSpec(*(None if axis in drop else axis for axis in mesh_axes))


def make_constrain(config: Config, rules: Rules) -> Callable[[jax.Array, Axes], jax.Array]:
  """The `Context.constrain` hook inside the step, where the manual axes are already local."""
  if config.mesh.tensor == 1:
    return lambda x, axes: x
  return lambda x, axes: jax.lax.with_sharding_constraint(x, partition(axes, rules, drop=MANUAL))


def make_local(config: Config, rules: Rules) -> Callable[..., Any]:
  """The `Context.local` hook inside the step: a shard_map over `tensor`, nested in the step's."""

  def local(op: Callable, operands: dict[str, tuple[jax.Array | None, Axes]], out_axes: tuple[Axes, ...]) -> Any:
    operands = {name: operand for name, operand in operands.items() if operand[0] is not None}
    arrays = {name: array for name, (array, _) in operands.items()}
    if config.mesh.tensor == 1:
      return op(**arrays)
    in_specs = {name: partition(axes, rules, drop=MANUAL) for name, (_, axes) in operands.items()}
    out_specs = tuple(partition(axes, rules, drop=MANUAL) for axes in out_axes)
    mapped = jax.shard_map(
      lambda arrays: op(**arrays), in_specs=(in_specs,), out_specs=out_specs, axis_names={'tensor'}, check_vma=False
    )
    return mapped(arrays)

  return local
