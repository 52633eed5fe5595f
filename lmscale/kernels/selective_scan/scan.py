"""The selective scan one token at a time: the definition, and the oracle of every other implementation."""

import jax
import jax.numpy as jnp


def selective_scan_scan(x, dt, A, B, C, state, start, chunk):
  """The recurrence as `selective_scan` states it. Shapes as in `api`; `chunk` is not used.

  Differentiating it stores a state per token.
  """
  del chunk

  def step(state, token):
    x, dt, B, C, start = token
    decay = jnp.exp(dt[..., None] * A)
    if start is not None:
      decay = decay * ~start[:, None, None]  # a product: on a CPU half the time of a select here
    state = decay * state + (dt * x)[..., None] * B[:, None, :]
    return state, jnp.einsum('bdn,bn->bd', state, C)

  tokens = jax.tree.map(lambda token: jnp.moveaxis(token, 1, 0), (x, dt, B, C, start))
  state, y = jax.lax.scan(step, state, tokens)
  return jnp.moveaxis(y, 0, 1), state
