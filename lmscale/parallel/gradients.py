"""Loss and gradients of a batch on the mesh.

One shard_map, manual over `pipe` and `data`, with `tensor` left to the compiler. Each rank walks its microbatches in a loop
that has no `data` collective (but for ZeRO 3's), accumulates gradients, and reduces them over `data` once.

A batch: tokens, labels, segment_ids, positions, int32 [microbatches, rows, seq_len] with rows cut over `data`;
`microbatches`, int32, how many of them count (a batch-size ramp fills fewer); in a pipeline also `table` and `ticks`, which
say when each is where (`parallel.feed`). What is minimised is an argument, a `model.HeadLoss`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmscale.batch import ROWS
from lmscale.models import model
from lmscale.parallel import zero
from lmscale.parallel.feed import batch_specs
from lmscale.parallel.layout import map_layout
from lmscale.parallel.mesh import MANUAL
from lmscale.parallel.pipeline.executor import run_pipeline
from lmscale.parallel.setup import Setup, make_context

Batch = dict[str, jax.Array]
Gradients = Callable[[Any, Batch], tuple[Any, jax.Array, jax.Array]]


def make_gradients(setup: Setup, head_loss: model.HeadLoss) -> Gradients:
  """(params, batch) -> (gradients of the summed loss cut like the masters, summed loss, how many were counted)."""
  loss = _make_loss(setup, head_loss, setup.config.train.remat)

  def pipelined(params: Any, batch: Batch) -> tuple[Any, jax.Array, jax.Array]:
    grads, sums = run_pipeline(setup, head_loss, _compute_copy(setup, params), batch, trains=True)
    return zero.reduce_gradients(setup.layout, grads, setup.config.mesh.zero), *jax.lax.psum(sums[:2], MANUAL)

  def local(params: Any, batch: Batch) -> tuple[Any, jax.Array, jax.Array]:
    used = _compute_copy(setup, params)

    def one(microbatch: Batch) -> tuple[Any, jax.Array, jax.Array]:
      (total, count), grads = jax.value_and_grad(loss, has_aux=True)(used, microbatch)
      return jax.tree.map(lambda g: g.astype(setup.grad_dtype), grads), total, count

    grads, *sums = _sum_microbatches(one, batch)
    return zero.reduce_gradients(setup.layout, grads, setup.config.mesh.zero), *jax.lax.psum(sums, 'data')

  specs = map_layout(lambda leaf: leaf.manual, setup.layout), PartitionSpec(), PartitionSpec()
  return _over_mesh(setup, pipelined if setup.config.mesh.pipe > 1 else local, specs)


def make_evaluate(setup: Setup, head_loss: model.HeadLoss) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
  """(params, batch) -> (summed loss, how many were counted); no gradients."""
  loss = _make_loss(setup, head_loss, 'none')

  def pipelined(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    _, sums = run_pipeline(setup, head_loss, _compute_copy(setup, params), batch, trains=False)
    return jax.lax.psum(sums[:2], MANUAL)

  def local(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    used = _compute_copy(setup, params)
    return jax.lax.psum(_sum_microbatches(lambda microbatch: loss(used, microbatch), batch), 'data')

  return _over_mesh(setup, pipelined if setup.config.mesh.pipe > 1 else local, (PartitionSpec(), PartitionSpec()))


def _compute_copy(setup: Setup, params: Any) -> Any:
  """What the microbatches use: the whole compute copy, or under ZeRO 3 the shards that are gathered where they are used.

  A pipeline gathers its stages once a step under ZeRO 3, too: a tick has a microbatch, and many ticks make a step.
  """
  late = setup.config.mesh.zero == 3 and setup.config.mesh.pipe == 1
  return params if late else zero.gather_once(setup.layout, params, setup.dtype)


def _make_loss(setup: Setup, head_loss: model.HeadLoss, remat: str) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
  """(what `_compute_copy` gives, microbatch [rows, seq_len]) -> (summed loss, how many were counted) of this data rank."""
  config, layout = setup.config, setup.layout
  context = make_context(setup)
  layer_layout = {stack.kind: leaves for run, stacks in zip(layout['layers'], setup.stacking, strict=True)
                  for leaves, stack in zip(run, stacks, strict=True)}  # fmt: skip

  def loss(params: Any, microbatch: Batch) -> tuple[jax.Array, jax.Array]:
    def gather(layout: Any, params: Any) -> Any:
      return zero.gather_where_used(layout, params, microbatch['tokens'][0, 0], setup.dtype, setup.grad_dtype)

    stage3 = config.mesh.zero == 3
    ctx = context(microbatch)
    if stage3:
      ctx = ctx.replace(gather=lambda kind, p: gather(layer_layout[kind], p))
      params = {part: p if part == 'layers' else gather(layout[part], p) for part, p in params.items()}
    tokens = microbatch['tokens']
    hidden_BTD, _ = model.forward(config.model, params, tokens, ctx, stacking=setup.stacking, remat=remat)
    return head_loss(params, hidden_BTD, microbatch, ctx)

  return loss


def _sum_microbatches(one: Callable[[Batch], Any], batch: Batch) -> Any:
  """Sums one(microbatch) over the first `microbatches` rows of the leading dim; a single one needs no loop."""

  def row(i: jax.Array | int) -> Batch:
    return {name: jax.lax.dynamic_index_in_dim(batch[name], i, keepdims=False) for name in ROWS}

  if batch['tokens'].shape[0] == 1:
    return one(row(0))
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, row(0)))
  return jax.lax.fori_loop(0, batch['microbatches'], lambda i, total: jax.tree.map(jnp.add, total, one(row(i))), zeros)


def _over_mesh(setup: Setup, local: Callable, out_specs: tuple) -> Callable:
  rows = batch_specs(setup.config)
  stored = map_layout(lambda leaf: leaf.manual, setup.layout)

  def run(params: Any, batch: Batch) -> Any:
    mapped = jax.shard_map(
      local, mesh=setup.mesh, in_specs=(stored, rows), out_specs=out_specs, axis_names=set(MANUAL), check_vma=False
    )
    return mapped(params, {name: batch[name] for name in rows})

  return run
