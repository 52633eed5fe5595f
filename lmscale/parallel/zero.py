"""ZeRO (arXiv 1910.02054) as explicit collectives over `data` inside the step's shard_map.

Stage 0 keeps everything whole. Stage 1 cuts optimizer and master; stage 2 the reduced gradients too; both gather each
parameter once per step, before the accumulation loop. Stage 3 gathers each layer's parameters where they are used, again
in the recomputation, and scatters their gradients in the same place.

Every collective runs in a nested shard_map over `tensor`, on the shards that tensor parallelism leaves: in the compiler's
hands it would first be made whole over `tensor`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

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

  specs = map_layout(lambda leaf: leaf.kept, layout)
  return _on_tensor_shards(lambda tree: map_layout(gather, layout, tree), specs)(params)


def gather_stages(layout: Any, params: Any) -> Any:
  """The parts of every stage on each device, of what `gather_once` gave."""

  def gather_rows(leaf: LeafLayout, x: jax.Array) -> jax.Array:
    return x if leaf.rows is None else jax.lax.all_gather(x, 'pipe', axis=0, tiled=True)

  def gather_vocabulary(leaf: LeafLayout, x: jax.Array) -> jax.Array:
    # Not on shards: a part of one stage is cut over `tensor` in itself.
    return x if leaf.pipe_dim is None else jax.lax.all_gather(x, 'pipe', axis=leaf.pipe_dim, tiled=True)

  specs = map_layout(lambda leaf: leaf.kept, layout)
  params = _on_tensor_shards(lambda tree: map_layout(gather_rows, layout, tree), specs)(params)
  return map_layout(gather_vocabulary, layout, params)


def gather_where_used(layout: Any, params: Any, microbatch: jax.Array, dtype: Any, grad_dtype: Any) -> Any:
  """Stage 3: one layer's parameters (or the embedding's, the head's) from their shards.

  Differentiable: the gradient is summed over `data` in `grad_dtype` and comes back as a shard. microbatch: any integer
  scalar that changes from microbatch to microbatch; without it the compiler would see that the gathers repeat, and move
  them, and so the whole model, out of the accumulation loop.
  """

  def gather(leaf: LeafLayout, x: jax.Array) -> jax.Array:
    used = compute_dtype(leaf, dtype)
    if leaf.data_dim is None:
      return x.astype(used)
    how = _Gather(leaf.data_dim, used, jnp.dtype(grad_dtype), leaf.tensor)
    return checkpoint_name(_gather(x, microbatch, how), 'gathered')

  return map_layout(gather, layout, params)


class _Gather(NamedTuple):
  dim: int
  dtype: Any
  grad_dtype: Any
  tensor: PartitionSpec


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gather(x: jax.Array, microbatch: jax.Array, how: _Gather) -> jax.Array:
  x, _ = jax.lax.optimization_barrier((x, microbatch))
  gather = functools.partial(jax.lax.all_gather, axis_name='data', axis=how.dim, tiled=True)
  return _on_tensor_shards(gather, how.tensor)(x.astype(how.dtype))


def _gather_forward(x: jax.Array, microbatch: jax.Array, how: _Gather) -> tuple[jax.Array, jax.Array]:
  return _gather(x, microbatch, how), jnp.zeros((), x.dtype)


def _gather_backward(how: _Gather, like: jax.Array, ct: jax.Array) -> tuple[jax.Array, None]:
  scatter = functools.partial(jax.lax.psum_scatter, axis_name='data', scatter_dimension=how.dim, tiled=True)
  return _on_tensor_shards(scatter, how.tensor)(ct.astype(how.grad_dtype)).astype(like.dtype), None


_gather.defvjp(_gather_forward, _gather_backward)


def reduce_gradients(layout: Any, grads: Any, stage: int) -> Any:
  """The one reduction of a step: sums every gradient over `data`, in the dtype in which it was accumulated.

  Stage 1 keeps the shard of the sum that belongs to this rank's optimizer; stage 2 receives nothing else. Stage 3 has
  already scattered all but the leaves that are whole on every rank. In a pipeline (which has not scattered: for it stage 3 is
  stage 2) what is outside of the layers is summed over its stages as well.
  """
  pipe = jax.lax.axis_size('pipe') > 1
  stage = min(stage, 2) if pipe else stage

  def reduce(leaf: LeafLayout, g: jax.Array) -> jax.Array:
    g = over_data(leaf, g)
    return jax.lax.psum(g, 'pipe') if pipe and not leaf.on_pipe else g

  def over_data(leaf: LeafLayout, g: jax.Array) -> jax.Array:
    dim = leaf.stacked_data_dim
    if dim is None or stage == 0:
      return jax.lax.psum(g, 'data')
    if stage == 1:
      return _own_shard(jax.lax.psum(g, 'data'), dim)
    if stage == 2:
      return jax.lax.psum_scatter(g, 'data', scatter_dimension=dim, tiled=True)
    return g

  specs = map_layout(lambda leaf: leaf.kept, layout)
  return _on_tensor_shards(lambda tree: map_layout(reduce, layout, tree), specs)(grads)


def _on_tensor_shards(function: Callable, specs: Any) -> Callable:
  """`function` of one tree, run on each device's `tensor` shards; what goes in and comes out is cut by `specs`."""
  return jax.shard_map(function, in_specs=(specs,), out_specs=specs, axis_names={'tensor'}, check_vma=False)


def _own_shard(x: jax.Array, dim: int) -> jax.Array:
  size = x.shape[dim] // jax.lax.axis_size('data')
  return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index('data') * size, size, dim)
