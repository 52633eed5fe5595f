"""ZeRO (arXiv 1910.02054) as explicit collectives over `data` inside the step's shard_map.

Stage 0 keeps everything whole. Stage 1 cuts optimizer and master; stage 2 the reduced gradients too; both gather each
parameter once per step, before the accumulation loop. Stage 3 gathers each layer's parameters where they are used, again
in the recomputation, and scatters their gradients in the same place.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lmscale.parallel.layout import LeafLayout, map_layout


def compute_dtype(leaf: LeafLayout, dtype: Any) -> Any:
  """The dtype in which a parameter is used: `dtype`, or at least float32 for the ones kept in full precision."""
  return jnp.promote_types(jnp.float32, dtype) if leaf.spec.full_precision else jnp.dtype(dtype)


def gather_once(layout: Any, params: Any, dtype: Any) -> Any:
  """Stages 0 to 2: the whole compute copy of every parameter, cast before it is gathered."""

  def gather(leaf: LeafLayout, x: jax.Array) -> jax.Array:
    x = x.astype(compute_dtype(leaf, dtype))
    if leaf.data_dim is None:
      return x
    return jax.lax.all_gather(x, 'data', axis=leaf.stacked_data_dim, tiled=True)

  return map_layout(gather, layout, params)


def gather_where_used(layout: Any, params: Any, dtype: Any, grad_dtype: Any) -> Any:
  """Stage 3: one layer's parameters (or the embedding's, the head's) from their shards.

  Differentiable: the gradient is summed over `data` in `grad_dtype` and comes back as a shard.
  """

  def gather(leaf: LeafLayout, x: jax.Array) -> jax.Array:
    used = compute_dtype(leaf, dtype)
    if leaf.data_dim is None:
      return x.astype(used)
    return checkpoint_name(_gather(x, leaf.data_dim, used, jnp.dtype(grad_dtype)), 'gathered')

  return map_layout(gather, layout, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(x: jax.Array, dim: int, dtype: Any, grad_dtype: Any) -> jax.Array:
  return jax.lax.all_gather(x.astype(dtype), 'data', axis=dim, tiled=True)


def _gather_forward(x: jax.Array, dim: int, dtype: Any, grad_dtype: Any) -> tuple[jax.Array, jax.Array]:
  return _gather(x, dim, dtype, grad_dtype), jnp.zeros((), x.dtype)


def _gather_backward(dim: int, dtype: Any, grad_dtype: Any, like: jax.Array, ct: jax.Array) -> tuple[jax.Array]:
  scattered = jax.lax.psum_scatter(ct.astype(grad_dtype), 'data', scatter_dimension=dim, tiled=True)
  return (scattered.astype(like.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def reduce_gradients(layout: Any, grads: Any, stage: int) -> Any:
  """The one reduction of a step: sums every gradient over `data`, in the dtype in which it was accumulated.

  Stage 1 keeps the shard of the sum that belongs to this rank's optimizer; stage 2 receives nothing else. Stage 3 has
  already scattered all but the leaves that are whole on every rank.
  """

  def reduce(leaf: LeafLayout, g: jax.Array) -> jax.Array:
    dim = leaf.stacked_data_dim
    if dim is None or stage == 0:
      return jax.lax.psum(g, 'data')
    if stage == 1:
      return _own_shard(jax.lax.psum(g, 'data'), dim)
    if stage == 2:
      return jax.lax.psum_scatter(g, 'data', scatter_dimension=dim, tiled=True)
    return g

  return map_layout(reduce, layout, grads)


def _own_shard(x: jax.Array, dim: int) -> jax.Array:
  size = x.shape[dim] // jax.lax.axis_size('data')
  return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index('data') * size, size, dim)
