"""What every layer is told besides its parameters and its input."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Axes = tuple[str | None, ...]  # a logical axis, or None, per dim


def _unconstrained(x: jax.Array, axes: Axes) -> jax.Array:
  return x


def _call(op: Callable, operands: dict[str, tuple[jax.Array | None, Axes]], out_axes: tuple[Axes, ...]) -> Any:
  return op(**{name: array for name, (array, _) in operands.items() if array is not None})


@struct.dataclass
class Context:
  """Per-batch facts and the hooks to the mesh.

  positions: int32 [b, t], restart at 0 in each document. segment_ids: int32 [b, t] or None, 0 = padding; required where
  documents are packed, so that attention, convolution and SSM state reset at boundaries.
  slots: int32 [b], needed with caches: how many tokens each row's caches hold, so the row's next token is number slots[row].
  Then a row's padding comes after its tokens (see `padding_last`), and its first token begins a document where its position
  is 0, else goes on with the last one; without segment_ids every token is real and goes on.
  constrain(x, logical_axes) -> x: where an activation lives on the mesh. local(op, {name: (array or None, logical axes)},
  (logical axes of each result)) -> results: op(**arrays) on each device's own heads, for kernels, which the compiler cannot
  cut; what is None is left out. gather(kind, params) -> params: brings one
  layer's parameters together where they are used (ZeRO 3). tensor: ways in which heads are cut over the mesh.
  deterministic: kernels add up gradients in a fixed order. vocab_axis: a manual mesh axis over which the rows of the embedding
  and the columns of the head are cut (None: the step is given them whole, but for `tensor`).
  """

  positions: jax.Array
  segment_ids: jax.Array | None = None
  slots: jax.Array | None = None
  constrain: Callable[[jax.Array, Axes], jax.Array] = struct.field(
    pytree_node=False, default=_unconstrained
  )
  local: Callable[..., Any] = struct.field(pytree_node=False, default=_call)
  gather: Callable[[str, Any], Any] | None = struct.field(pytree_node=False, default=None)
  tensor: int = struct.field(pytree_node=False, default=1)
  deterministic: bool = struct.field(pytree_node=False, default=True)
  vocab_axis: str | None = struct.field(pytree_node=False, default=None)


def plain_context(tokens: jax.Array, segment_ids: jax.Array | None = None) -> Context:
  """A context for one unpacked document per row: positions 0..t-1. tokens: [b, t]."""
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
  return Context(positions, segment_ids)


def padding_last(tokens: jax.Array, ctx: Context) -> tuple[jax.Array, Context, Callable[[jax.Array], jax.Array]]:
  """(tokens, context, undo): every row with its padding, wherever it was, after its tokens, whose order stays.

  tokens: [b, t]. undo: puts an array [b, t, d] of the result's order back into the given one.
  """
  if ctx.segment_ids is None or tokens.shape[1] == 1:
    return tokens, ctx, lambda x_BTD: x_BTD
  order_BT = jnp.argsort(ctx.segment_ids == 0, axis=1, stable=True)
  back_BT = jnp.argsort(order_BT, axis=1)
  tokens, positions, segment_ids = (
    jnp.take_along_axis(m, order_BT, axis=1) for m in (tokens, ctx.positions, ctx.segment_ids)
  )
  ctx = ctx.replace(positions=positions, segment_ids=segment_ids)
  return tokens, ctx, lambda x_BTD: jnp.take_along_axis(x_BTD, back_BT[..., None], axis=1)
