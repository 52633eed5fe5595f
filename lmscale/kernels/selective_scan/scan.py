"""The selective scan one token at a time: the definition, and the oracle of every other implementation."""

import jax
import jax.numpy as jnp


def selective_scan_scan(x, dt, A, B, C, state, start, chunk):
  """The recurrence as `selective_scan` states it. Shapes as in `api`; `chunk` is not used.

  Differentiating it stores a state per token.
  """
  del chunk
  start = jnp.zeros(x.shape[:2], bool) if start is None else start

  def step(state, token):
    x, dt, B, C, start = token
    decay = jnp.where(start[:, None, None], 0, jnp.exp(dt[..., None] * A))
    state = decay * state + (dt * x)[..., None] * B[:, None, :]
    return state, jnp.einsum('bdn,bn->bd', state, C)

  state, y = jax.lax.scan(step, state, tuple(jnp.moveaxis(token, 1, 0) for token in (x, dt, B, C, start)))
  return jnp.moveaxis(y, 0, 1), state
