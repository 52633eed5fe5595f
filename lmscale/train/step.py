"""One optimizer step as one pure function: step(state, batch) -> (state, metrics).

Inside the jitted step there is one shard_map, manual over `pipe` and `data`, with `tensor` left to the compiler. Each rank
walks its microbatches in a loop that has no `data` collective (but for ZeRO 3's), accumulates gradients, and reduces them
over `data` once. Clipping and AdamW follow outside, on the shards that the reduction leaves.

A batch: tokens, labels, segment_ids, positions, int32 [microbatches, rows, seq_len] with rows cut over `data`;
`microbatches`, int32, how many of them count (a batch-size ramp fills fewer); `learning_rate`, float32.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from lmscale.batch import ROWS
from lmscale.config import Config
from lmscale.kernels.cross_entropy import cross_entropy
from lmscale.models import model, stack
from lmscale.models.context import Context
from lmscale.parallel import zero
from lmscale.parallel.layout import make_layout, map_layout
from lmscale.parallel.mesh import MANUAL
from lmscale.parallel.rules import make_constrain, make_local, make_rules
from lmscale.train.optimizer import apply_update, decays, global_norm, make_optimizer
from lmscale.train.spikes import is_spike, keep_norm, usual_norm
from lmscale.train.state import TrainState

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """Everything about a step that is decided before tracing: config, mesh, runs, layouts, optimizer."""

  config: Config
  mesh: Mesh
  runs: stack.Plan
  layout: Any
  tx: optax.GradientTransformation
  dtype: Any

  @property
  def master_dtype(self) -> Any:
    """float32, or float64 in a float64 run."""
    return jnp.promote_types(jnp.float32, self.dtype)

  @property
  def grad_dtype(self) -> Any:
    """Of accumulation and reduction: train.grad_dtype, or float64 in a float64 run."""
    return self.dtype if self.dtype == jnp.float64 else jnp.dtype(self.config.train.grad_dtype)


def make_step_plan(config: Config, mesh: Mesh) -> Plan:
  """The plan of a resolved config on a mesh."""
  runs = stack.make_plan(config.model.layers, config.train.stack)
  layout = make_layout(config, runs, make_rules(config))
  mask = map_layout(lambda leaf: decays(leaf.name, leaf.spec.shape), layout)
  tx = make_optimizer(config.optimizer, mask)
  return Plan(config, mesh, runs, layout, tx, jnp.dtype(config.train.compute_dtype))


def make_step(plan: Plan) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
  """The step of a plan, not yet jitted.

  metrics: loss (mean nats per counted label), grad_norm (before clipping), usual_norm (the median of the steps before, see
  `train.spikes`), tokens (counted labels, int32), ok (bool: False where loss or gradient was not finite, or the norm was
  above train.spike_skip; parameters and moments are then unchanged), skipped and spikes (int32: steps so far for either reason).
  """
  gradients = make_gradients(plan)

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    grads, loss_sum, count = gradients(state.params, batch)
    share = 1 / jnp.maximum(count, 1).astype(plan.master_dtype)
    grads = jax.tree.map(lambda g: g.astype(plan.master_dtype) * share, grads)
    loss, norm = loss_sum * share, global_norm(grads)
    finite, usual = jnp.isfinite(loss) & jnp.isfinite(norm), usual_norm(state.norms)
    spike = finite & is_spike(norm, usual, plan.config.train.spike_skip)
    ok = finite & ~spike
    params, opt_state = apply_update(
      plan.tx, grads, state.opt_state, state.params, batch['learning_rate'], norm, plan.config.optimizer.clip
    )

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
      return jnp.where(ok, new, old)

    state = TrainState(
      params=jax.tree.map(keep, params, state.params),
      opt_state=jax.tree.map(keep, opt_state, state.opt_state),
      step=state.step + 1,
      skipped=state.skipped + (~finite).astype(jnp.int32),
      spikes=state.spikes + spike.astype(jnp.int32),
      norms=keep_norm(state.norms, norm),
    )
    metrics = {'loss': loss, 'grad_norm': norm, 'usual_norm': usual, 'tokens': count, 'ok': ok}
    return state, metrics | {'skipped': state.skipped, 'spikes': state.spikes}

  return step


def make_gradients(plan: Plan) -> Callable[[Any, Batch], tuple[Any, jax.Array, jax.Array]]:
  """(params, batch) -> (gradients of the summed loss cut like the masters, summed loss, counted labels)."""
  config = plan.config
  grad_dtype = plan.grad_dtype
  loss_fn = make_loss(plan, differentiated=True)

  def local(params: Any, batch: Batch) -> tuple[Any, jax.Array, jax.Array]:
    used = params if config.mesh.zero == 3 else zero.gather_once(plan.layout, params, plan.dtype)

    def one(microbatch: Batch) -> tuple[Any, jax.Array, jax.Array]:
      (loss, count), grads = jax.value_and_grad(loss_fn, has_aux=True)(used, microbatch)
      return jax.tree.map(lambda g: g.astype(grad_dtype), grads), loss, count

    total = _sum_microbatches(one, batch)
    grads = zero.reduce_gradients(plan.layout, total[0], config.mesh.zero)
    loss, count = jax.lax.psum(total[1:], 'data')
    return grads, loss, count

  return _over_mesh(plan, local, gradients_too=True)


def make_evaluate(plan: Plan) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
  """(params, batch) -> (summed loss, counted labels); no gradients."""
  loss_fn = make_loss(plan, differentiated=False)

  def local(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    used = params if plan.config.mesh.zero == 3 else zero.gather_once(plan.layout, params, plan.dtype)
    return jax.lax.psum(_sum_microbatches(lambda microbatch: loss_fn(used, microbatch), batch), 'data')

  return _over_mesh(plan, local, gradients_too=False)


def make_loss(plan: Plan, differentiated: bool) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
  """(compute copy or ZeRO-3 shards, microbatch [rows, seq_len]) -> (summed loss, counted labels) of this data rank."""
  config = plan.config
  rules = make_rules(config)
  constrain = make_constrain(config, rules)
  local = make_local(config, rules)
  remat = config.train.remat if differentiated else 'none'
  outer = {part: leaves for part, leaves in plan.layout.items() if part != 'layers'}

  layer_layout = {kind: leaves for run, (unit, _) in zip(plan.layout['layers'], plan.runs, strict=True)
                  for kind, leaves in zip(unit, run, strict=True)}
  stage3 = config.mesh.zero == 3

  def loss(params: Any, microbatch: Batch) -> tuple[jax.Array, jax.Array]:
    def gather(layout: Any, params: Any) -> Any:
      return zero.gather_where_used(layout, params, microbatch['tokens'][0, 0], plan.dtype, plan.grad_dtype)

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
      params = {**{part: gather(outer[part], params[part]) for part in outer}, 'layers': params['layers']}
    hidden_BTD, _ = model.forward(config.model, params, microbatch['tokens'], ctx, plan=plan.runs, remat=remat)
    hidden_BTD = constrain(hidden_BTD, ('batch', 'length', 'embed'))
    hidden_ND = hidden_BTD.reshape(-1, config.model.d_model)
    labels_N = microbatch['labels'].reshape(-1)
    kernel_DV = constrain(model.head_kernel(params), ('embed', 'vocab'))
    return cross_entropy(hidden_ND, kernel_DV, labels_N, chunk=config.train.loss_chunk, constrain=constrain)

  return loss


def _sum_microbatches(one: Callable[[Batch], Any], batch: Batch) -> Any:
  """Sums one(microbatch) over the first `microbatches` rows of the leading dim; a single one needs no loop."""

  def row(i: jax.Array | int) -> Batch:
    return {name: jax.lax.dynamic_index_in_dim(batch[name], i, keepdims=False) for name in ROWS}

  if batch['tokens'].shape[0] == 1:
    return one(row(0))
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, row(0)))
  return jax.lax.fori_loop(0, batch['microbatches'], lambda i, total: jax.tree.map(jnp.add, total, one(row(i))), zeros)


def _over_mesh(plan: Plan, local: Callable, gradients_too: bool) -> Callable:
  stored = map_layout(lambda leaf: leaf.manual, plan.layout)
  rows = dict.fromkeys(ROWS, PartitionSpec(None, 'data')) | {'microbatches': PartitionSpec()}
  scalars = (PartitionSpec(), PartitionSpec())

  def run(params: Any, batch: Batch) -> Any:
    arguments = {name: batch[name] for name in rows}
    return jax.shard_map(
      local,
      mesh=plan.mesh,
      in_specs=(stored, rows),
      out_specs=(stored, *scalars) if gradients_too else scalars,
      axis_names=set(MANUAL),
      check_vma=False,
    )(params, arguments)

  return run
