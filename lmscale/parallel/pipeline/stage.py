"""The layers of a device's pipeline stages, run forward and backward inside the step's shard_map.

Stages differ, and all devices run one program: a scan over the layers of a stage switches on the kind of each and reads its
row of that kind's stack. Nothing differentiates through the switch: each kind's derivative is taken in two halves (`split`),
between which what was saved waits in a ring of buffers, [slots, layers of the kind in a stage, ...]. The rings, and the
gradients' stacks, are written outside of the switch, one row at a time: a conditional that handed them on would copy them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmscale.models.context import Context
from lmscale.models.layers import RESIDUAL
from lmscale.models.stack import SELECTIVE, apply_layer
from lmscale.parallel.pipeline import split
from lmscale.parallel.pipeline.layout import stage_places
from lmscale.parallel.pipeline.table import NOTHING
from lmscale.parallel.setup import Setup

Ring = list[list[jax.Array]]  # for each kind, for each array that a layer saves


def take(buffer: jax.Array, *index: jax.Array) -> jax.Array:
  """buffer[index]; NOTHING, -1, is the last row."""
  rest = buffer.shape[len(index) :]
  start = (*index, *[np.int32(0)] * len(rest))
  return jax.lax.dynamic_slice(buffer, start, (*[1] * len(index), *rest)).reshape(rest)


def put(buffer: jax.Array, value: jax.Array, *index: jax.Array) -> jax.Array:
  """The buffer with `value` at `index`; NOTHING, -1, is the last row."""
  start = (*index, *[np.int32(0)] * value.ndim)
  return jax.lax.dynamic_update_slice(buffer, value.reshape((1,) * len(index) + value.shape), start)


class StageLayers:
  """stacks: the device's parameters, [rows, ...], for each kind. x: zeros like the input of a layer, [b, t, d_model]."""

  def __init__(self, setup: Setup, stacks: list[Any], x: jax.Array, ctx: Context):
    self._setup, self.stacks, self._x = setup, stacks, x
    places = stage_places(setup.config)
    self._kinds = places.kinds
    device = jax.lax.axis_index('pipe')
    self._places = [jnp.asarray(table)[device] for table in places[:3]]
    self._most = places.most
    rows = self._rows(stacks)
    self._keep, self._saved = zip(*(split.kept(self._layer(k, ctx), row, x) for k, row in enumerate(rows)), strict=True)

  def ring(self, slots: int) -> Ring:
    """Room for what the layers of a stage save, `slots` times and once more for what nobody reads."""
    return [
      [jnp.zeros((slots + 1, most, *leaf.shape), leaf.dtype) for leaf in saved]
      for saved, most in zip(self._saved, self._most, strict=True)
    ]

  def forward(
    self, x: jax.Array, chunk: jax.Array, ctx: Context, ring: Ring | None = None, slot: jax.Array | None = None
  ) -> tuple[jax.Array, Ring | None]:
    """(output of the device's stage `chunk`, of NOTHING its input; the ring, with what was saved in `slot`)."""

    def run(k: int, x: jax.Array, row: jax.Array) -> tuple[jax.Array, list]:
      if ring is None:
        return self._layer(k, ctx)(self._row(k, row), x), []
      y, saved = split.forward(self._layer(k, ctx), self._row(k, row), x, self._keep[k])
      return y, self._beside(k, saved, self._saved)

    def body(carry: tuple, place: tuple) -> tuple[tuple, None]:
      x, ring = carry
      kind, row, rank = place
      idle = (lambda x, row: (x, [])) if ring is None else (lambda x, row: (x, split.zeros_like(list(self._saved))))
      x, saved = self._switch(kind, run, idle, x, row)
      if ring is not None:
        slots = [jnp.where(kind == k, slot, NOTHING) for k in range(len(self._kinds))]
        ring = [[put(b, leaf, at, rank) for b, leaf in zip(*pair, strict=True)] for at, *pair in zip(slots, ring, saved, strict=True)]
      return (x, ring), None

    (y, ring), _ = jax.lax.scan(body, (x, ring), self._layers_of(chunk))
    return y, ring

  def backward(
    self, ct: jax.Array, chunk: jax.Array, ctx: Context, ring: Ring, slot: jax.Array, grads: list[Any]
  ) -> tuple[jax.Array, list[Any]]:
    """(gradient of the stage's input, grads with the stage's added) from that of its output and what waits in `slot`."""

    def run(k: int, ct: jax.Array, row: jax.Array, rank: jax.Array) -> tuple[jax.Array, list]:
      saved = [take(buffer, slot, rank) for buffer in ring[k]]
      dparams, dx = split.backward(self._layer(k, ctx), self._row(k, row), self._x, self._keep[k], saved, ct)
      dparams = jax.tree.map(lambda g: g.astype(self._setup.grad_dtype), dparams)
      return ctx.constrain(dx, RESIDUAL), self._beside(k, dparams, self._rows(grads))

    def body(carry: tuple, place: tuple) -> tuple[tuple, None]:
      ct, grads = carry
      kind, row, rank = place
      ct, added = self._switch(kind, run, lambda ct, row, rank: (ct, split.zeros_like(self._rows(grads))), ct, row, rank)
      rows = [jnp.where(kind == k, row, 0) for k in range(len(self._kinds))]
      grads = [jax.tree.map(lambda s, g, at=at: put(s, take(s, at) + g, at), *pair) for at, *pair in zip(rows, grads, added, strict=True)]
      return (ct, grads), None

    return jax.lax.scan(body, (ct, grads), self._layers_of(chunk), reverse=True)[0]

  def _switch(self, kind: jax.Array, run: Any, idle: Any, *operands: jax.Array) -> Any:
    branches = [lambda *operands, k=k: run(k, *operands) for k in range(len(self._kinds))]
    return jax.lax.switch(kind + 1, [idle, *branches], *operands)

  def _layer(self, k: int, ctx: Context) -> split.Function:
    def layer(params: Any, x: jax.Array) -> jax.Array:
      y, _ = apply_layer(self._setup.config.model, self._kinds[k], params, x, ctx, None)
      return ctx.constrain(y, RESIDUAL)

    # `full`, too, keeps no more than this of the one microbatch that it goes backward through.
    none = self._setup.config.train.remat == 'none'
    return layer if none else jax.checkpoint(layer, policy=SELECTIVE, prevent_cse=False)

  def _layers_of(self, chunk: jax.Array) -> tuple:
    return tuple(take(table, chunk) for table in self._places)

  def _row(self, k: int, row: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: take(leaf, row), self.stacks[k])

  def _rows(self, stacks: list[Any]) -> list[Any]:
    """Shapes of one row of each stack."""
    return [jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stack) for stack in stacks]

  def _beside(self, k: int, value: Any, shapes: list[Any]) -> list[Any]:
    """`value` for kind k, zeros for the others."""
    return [value if i == k else split.zeros_like(shape) for i, shape in enumerate(shapes)]
