"""The selective scan one token at a time: the definition, and the oracle of every other implementation."""

import jax
import jax.numpy as jnp


def selective_scan_scan(x, dt, A, B, C, D, z, state, start):
  """The recurrence as `selective_scan` states it. Shapes and dtypes as in `api`; y in the accumulator dtype.

  Differentiating it stores a state per token.
  """
  b, l, d = x.shape
  g, n = B.shape[2:]
  channels = (g, d // g)
  acc = dt.dtype
  A = A.reshape(*channels, n)

  def step(state, token):
    x, dt, B, C, start = token
    decay = jnp.exp(dt[..., None] * A)
    if start is not None:
      decay = decay * ~start[:, None, None, None]  # a product: on a CPU half the time of a select here
    state = decay * state + (dt * x)[..., None] * B[:, :, None]
    return state, jnp.einsum('bgrn,bgn->bgr', state, C)

  grouped = (x.astype(acc).reshape(b, l, *channels), dt.reshape(b, l, *channels), B.astype(acc), C.astype(acc), start)
  tokens = jax.tree.map(lambda token: jnp.moveaxis(token, 1, 0), grouped)
  state, y = jax.lax.scan(step, state.reshape(b, *channels, n), tokens)
  y = jnp.moveaxis(y, 0, 1).reshape(b, l, d)
  if D is not None:
    y = y + D * x.astype(acc)
  return y if z is None else y * jax.nn.silu(z.astype(acc)), state.reshape(b, d, n)
