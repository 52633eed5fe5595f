"""Sudden spikes of the gradient norm, which often go before a loss that does not come back.

The norms of the last steps are part of the training state, so that a run which was stopped judges its next step as if it had
not been. A spike counts among them like any other norm: what has become usual is no spike any more.
"""

import jax
import jax.numpy as jnp

WINDOW = 64  # steps that are looked back on
ENOUGH = 16  # of them, before which nothing is a spike: the first steps' norms fall fast
TIMES = 10.0  # above the median: worth a message


def no_norms() -> jax.Array:
  """What is kept before the first step: float32 [WINDOW], -1 where there is no norm yet, the oldest first."""
  return jnp.full(WINDOW, -1.0, jnp.float32)


def keep_norm(norms: jax.Array, norm: jax.Array) -> jax.Array:
  """`norms` with the newest instead of the oldest. One that is not finite is not kept."""
  norm = norm.astype(norms.dtype)
  return jnp.where(jnp.isfinite(norm), jnp.append(norms[1:], norm), norms)


def usual_norm(norms: jax.Array) -> jax.Array:
  """The median of the norms that are kept, float32; 0 while there are fewer than ENOUGH."""
  count = jnp.sum(norms >= 0)
  ordered, first = jnp.sort(norms), WINDOW - count
  middle = ordered[first + (count - 1) // 2] / 2 + ordered[first + count // 2] / 2
  return jnp.where(count >= ENOUGH, middle, 0.0)


def is_spike(norm: jax.Array, usual: jax.Array, times: float) -> jax.Array:
  """Whether `norm` is more than `times` the usual one, a bool; never where times is 0 or nothing is usual yet."""
  return (usual > 0) & (norm > times * usual) if times else jnp.zeros((), bool)
