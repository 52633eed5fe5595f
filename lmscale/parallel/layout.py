"""Where each parameter lives: its tensor-parallel dims from the rules, its `data` dim from ZeRO."""

import dataclasses
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lmscale.config import Config
from lmscale.models import model
from lmscale.models.params import ParamSpec
from lmscale.models.stack import layer_specs
from lmscale.models.stacking import Stack, Stacking, make_stacking, map_stacks
from lmscale.parallel.mesh import MANUAL
from lmscale.parallel.rules import Rules, make_rules, partition


@dataclasses.dataclass(frozen=True)
class LeafLayout:
  """One parameter in memory.

  name: of the leaf in its layer. spec: of one layer. tensor: PartitionSpec over the compiler's axes. data_dim: the dim cut
  over `data` by ZeRO 1 to 3, None where nothing divides. pipe_dim: the dim cut over `pipe`, of the vocabulary. All count the
  dims of one layer; a leaf of a `stack` has a leading one, its rows, cut over `pipe` where there is a pipeline (`rows`).
  """

  name: str
  spec: ParamSpec
  tensor: PartitionSpec
  data_dim: int | None
  stack: Stack | None = None
  rows: str | None = None
  pipe_dim: int | None = None

  @property
  def stored(self) -> PartitionSpec:
    """How the master copy, the reduced gradient and the optimizer's moments are cut (all mesh axes)."""
    dims: list[Any] = list(self.tensor) + [None] * (len(self.spec.shape) - len(self.tensor))
    if self.data_dim is not None:
      dims[self.data_dim] = 'data'
    if self.pipe_dim is not None:
      dims[self.pipe_dim] = 'pipe' if dims[self.pipe_dim] is None else ('pipe', dims[self.pipe_dim])
    return PartitionSpec(*self._rows, *dims)

  @property
  def kept(self) -> PartitionSpec:
    """How the gathered parameter is cut where its device's rows are: by `tensor` only."""
    return PartitionSpec(*[None] * len(self._rows), *self.tensor)

  @property
  def manual(self) -> PartitionSpec:
    """The part of `stored` that the step's shard_map names: what `pipe` and `data` cut."""
    outer = (axis[0] if isinstance(axis, tuple) else axis for axis in self.stored)
    return PartitionSpec(*(axis if axis in MANUAL else None for axis in outer))

  @property
  def on_pipe(self) -> bool:
    """Whether each stage has a part of its own."""
    return self.rows is not None or self.pipe_dim is not None

  @property
  def stacked_data_dim(self) -> int | None:
    return None if self.data_dim is None else self.data_dim + len(self._rows)

  @property
  def _rows(self) -> tuple[str | None, ...]:
    """How the rows of the stack are cut."""
    return () if self.stack is None else (self.rows,)


def leaf_layout(name: str, spec: ParamSpec, config: Config, rules: Rules, stack: Stack | None = None) -> LeafLayout:
  """Cuts the largest dim that `tensor` does not use and `data` divides (the first of equals)."""
  tensor = partition(spec.axes, rules)
  data_dim = None
  if config.mesh.zero > 0 and config.mesh.data > 1:
    free = [i for i, n in enumerate(spec.shape) if tensor[i] is None and n % config.mesh.data == 0]
    data_dim = max(free, key=lambda i: spec.shape[i], default=None)
  rows = 'pipe' if stack and config.mesh.pipe > 1 else None
  pipe_dim = spec.axes.index('vocab') if config.mesh.vocab_on_pipe and 'vocab' in spec.axes else None
  return LeafLayout(name, spec, tensor, data_dim, stack, rows, pipe_dim)


def make_layout(config: Config, stacking: Stacking, rules: Rules) -> dict[str, Any]:
  """The tree of LeafLayout, like the stacked parameters."""

  def of(specs: dict[str, ParamSpec], stack: Stack | None = None) -> dict[str, LeafLayout]:
    return {name: leaf_layout(name, spec, config, rules, stack) for name, spec in specs.items()}

  outer = {part: of(specs) for part, specs in model.outer_specs(config.model).items()}
  return {**outer, 'layers': map_stacks(lambda stack: of(layer_specs(config.model, stack.kind), stack), stacking)}


def zero_share(config: Config) -> float:
  """The share of the parameters' elements that ZeRO cuts over `data`; where no free dim divides, a leaf stays whole."""
  layout = make_layout(config, make_stacking(config.model.layers, 'unrolled'), make_rules(config))
  leaves = jax.tree.leaves(layout, is_leaf=lambda leaf: isinstance(leaf, LeafLayout))
  return sum(leaf.spec.size for leaf in leaves if leaf.data_dim is not None) / sum(leaf.spec.size for leaf in leaves)


def map_layout(function: Any, layout: Any, *trees: Any) -> Any:
  """tree.map over a tree of LeafLayout beside trees of arrays."""
  return jax.tree.map(function, layout, *trees, is_leaf=lambda leaf: isinstance(leaf, LeafLayout))
