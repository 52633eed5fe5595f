"""AdamW as pure functions over optax, with one named rule for what decays.

The learning rate and the gradient norm enter `apply_update` as values, so one compiled step serves the whole
schedule, and a norm that was summed over a mesh can be used without optax knowing about the mesh.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lmscale.config import OptimizerConfig


def decays(name: str, shape_per_layer: tuple[int, ...]) -> bool:
  """Whether weight decay applies to a parameter, by its last name and its shape in one layer (unstacked).

  Not to 1-D parameters (norm scales, dt_bias, D, Mamba-2's A_log, biases), not to any name that ends in `bias`, and
  not to `A_log`, which is 2-D in Mamba-1: it holds the logarithm of a decay rate, and shrinking it pulls every rate
  to 1 rather than the map to 0. The authors of Mamba (arXiv 2312.00752) exempt A and D in the same way. Everything
  else decays, embeddings and convolution kernels included.
  """
  return len(shape_per_layer) > 1 and not name.endswith('bias') and name != 'A_log'


def make_optimizer(config: OptimizerConfig, decay_mask: Any) -> optax.GradientTransformation:
  """Adam's direction plus decoupled weight decay (arXiv 1711.05101), without learning rate and clipping.

  decay_mask: a tree of bools shaped like the parameters, from `decays`. The state is (adam state with count int32, mu
  and nu in the parameters' shapes and dtype; the decay's empty state).
  """
  return optax.chain(
    optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
    optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
  )


def global_norm(tree: Any) -> jax.Array:
  """The 2-norm of all leaves together, summed in at least float32."""
  squares = [jnp.sum(jnp.square(x.astype(jnp.promote_types(jnp.float32, x.dtype)))) for x in jax.tree.leaves(tree)]
  return jnp.sqrt(sum(squares))


def apply_update(
  tx: optax.GradientTransformation,
  grads: Any,
  opt_state: Any,
  params: Any,
  learning_rate: jax.Array | float,
  grad_norm: jax.Array,
  clip: float,
) -> tuple[Any, Any]:
  """One AdamW update; returns (params, opt_state).

  Gradients are cast to the parameters' dtype and scaled by clip / grad_norm where the norm is larger (never when
  clip is 0). learning_rate may be traced. Non-finite values are the caller's to reject.
  """
  scale = jnp.where(grad_norm > clip, clip / grad_norm, 1.0) if clip else 1.0
  grads = jax.tree.map(lambda g, p: g.astype(p.dtype) * jnp.asarray(scale, p.dtype), grads, params)
  updates, opt_state = tx.update(grads, opt_state, params)
  params = jax.tree.map(lambda p, u: p - jnp.asarray(learning_rate, p.dtype) * u, params, updates)
  return params, opt_state
