"""Loss and gradients of a batch on the mesh.

One shard_map, manual over `pipe` and `data`, with `tensor` left to the compiler. Each rank walks its microbatches in a loop
that has no `data` collective (but for ZeRO 3's), accumulates gradients, and reduces them over `data` once.

A batch: tokens, labels, segment_ids, positions, int32 [microbatches, rows, seq_len] with rows cut over `data`;
`microbatches`, int32, how many of them count (a batch-size ramp fills fewer). What is minimised is an argument, a
`model.HeadLoss`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmscale.batch import ROWS
from lmscale.models import model
from lmscale.models.context import Context
from lmscale.parallel import zero
from lmscale.parallel.layout import map_layout
from lmscale.parallel.mesh import MANUAL
from lmscale.parallel.rules import make_constrain, make_local, make_rules
from lmscale.parallel.setup import Setup

Batch = dict[str, jax.Array]
Gradients = Callable[[Any, Batch], tuple[Any, jax.Array, jax.Array]]


def make_gradients(setup: Setup, head_loss: model.HeadLoss) -> Gradients:
  """(params, batch) -> (gradients of the summed loss cut like the masters, summed loss, how many were counted)."""
  loss = _make_loss(setup, head_loss, setup.config.train.remat)

  def local(params: Any, batch: Batch) -> tuple[Any, jax.Array, jax.Array]:
    used = _compute_copy(setup, params)

    def one(microbatch: Batch) -> tuple[Any, jax.Array, jax.Array]:
      (total, count), grads = jax.value_and_grad(loss, has_aux=True)(used, microbatch)
      return jax.tree.map(lambda g: g.astype(setup.grad_dtype), grads), total, count

    grads, *sums = _sum_microbatches(one, batch)
    return zero.reduce_gradients(setup.layout, grads, setup.config.mesh.zero), *jax.lax.psum(sums, 'data')

  return _over_mesh(setup, local, (map_layout(lambda leaf: leaf.manual, setup.layout), PartitionSpec(), PartitionSpec()))


def make_evaluate(setup: Setup, head_loss: model.HeadLoss) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
  """(params, batch) -> (summed loss, how many were counted); no gradients."""
  loss = _make_loss(setup, head_loss, 'none')

  def local(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    used = _compute_copy(setup, params)
    return jax.lax.psum(_sum_microbatches(lambda microbatch: loss(used, microbatch), batch), 'data')

  return _over_mesh(setup, local, (PartitionSpec(), PartitionSpec()))


def _compute_copy(setup: Setup, params: Any) -> Any:
  """What the microbatches use: the whole compute copy, or under ZeRO 3 the shards that are gathered where they are used."""
  return params if setup.config.mesh.zero == 3 else zero.gather_once(setup.layout, params, setup.dtype)


def _make_loss(setup: Setup, head_loss: model.HeadLoss, remat: str) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
  """(what `_compute_copy` gives, microbatch [rows, seq_len]) -> (summed loss, how many were counted) of this data rank."""
  config, layout = setup.config, setup.layout
  rules = make_rules(config)
  constrain, local = make_constrain(config, rules), make_local(config, rules)
  layer_layout = {stack.kind: leaves for run, stacks in zip(layout['layers'], setup.stacking, strict=True)
                  for leaves, stack in zip(run, stacks, strict=True)}  # fmt: skip

  def loss(params: Any, microbatch: Batch) -> tuple[jax.Array, jax.Array]:
    def gather(layout: Any, params: Any) -> Any:
      return zero.gather_where_used(layout, params, microbatch['tokens'][0, 0], setup.dtype, setup.grad_dtype)

    stage3 = config.mesh.zero == 3
    ctx = Context(
      positions=microbatch['positions'],
      segment_ids=microbatch['segment_ids'],
      constrain=constrain,
      local=local,
      gather=(lambda kind, p: gather(layer_layout[kind], p)) if stage3 else None,
      tensor=config.mesh.tensor,
      deterministic=config.train.deterministic,
    )
    if stage3:
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
  rows = dict.fromkeys(ROWS, PartitionSpec(None, 'data')) | {'microbatches': PartitionSpec()}
  stored = map_layout(lambda leaf: leaf.manual, setup.layout)

  def run(params: Any, batch: Batch) -> Any:
    mapped = jax.shard_map(
      local, mesh=setup.mesh, in_specs=(stored, rows), out_specs=out_specs, axis_names=set(MANUAL), check_vma=False
    )
    return mapped(params, {name: batch[name] for name in rows})

  return run
