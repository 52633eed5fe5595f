"""One optimizer step as one pure function: step(state, batch) -> (state, metrics).

Knows clipping, skipping and the update, and no mesh: gradients are an argument, and everything here is done leaf by leaf
on whatever shards they come in.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from lmscale.config import Config
from lmscale.parallel.gradients import Batch, Gradients
from lmscale.train.optimizer import apply_update, global_norm
from lmscale.train.spikes import is_spike, keep_norm, usual_norm
from lmscale.train.state import TrainState

Metrics = dict[str, jax.Array]


def make_step(
  config: Config, tx: optax.GradientTransformation, gradients: Gradients
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """The step, not yet jitted. A batch is one of `parallel.gradients` with `learning_rate`, float32.

  metrics: loss (mean nats per counted label), grad_norm (before clipping), usual_norm (the median of the steps before, see
  `train.spikes`), tokens (counted labels, int32), ok (bool: False where loss or gradient was not finite, the norm was above
  train.spike_skip, or no label counts; parameters and moments are then unchanged), skipped and spikes (int32: steps so far for either reason).
  """

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    grads, loss_sum, count = gradients(state.params, batch)
    share = 1 / jnp.maximum(count, 1).astype(loss_sum.dtype)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype) * share, grads, state.params)
    loss, norm = loss_sum * share, global_norm(grads)
    finite, usual = jnp.isfinite(loss) & jnp.isfinite(norm), usual_norm(state.norms)
    spike = finite & is_spike(norm, usual, config.train.spike_skip)
    ok = finite & ~spike & (count > 0)  # without a gradient, decay and momentum alone would move the parameters
    params, opt_state = apply_update(
      tx, grads, state.opt_state, state.params, batch['learning_rate'], norm, config.optimizer.clip
    )

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
      return jnp.where(ok, new, old)

    state = TrainState(
      params=jax.tree.map(keep, params, state.params),
      opt_state=jax.tree.map(keep, opt_state, state.opt_state),
      step=state.step + 1,
      skipped=state.skipped + (~finite).astype(jnp.int32),
      spikes=state.spikes + spike.astype(jnp.int32),
      norms=jnp.where(count > 0, keep_norm(state.norms, norm), state.norms),
    )
    metrics = {'loss': loss, 'grad_norm': norm, 'usual_norm': usual, 'tokens': count, 'ok': ok}
    return state, metrics | {'skipped': state.skipped, 'spikes': state.spikes}

  return step
