"""SSD one token at a time: the definition, and the oracle of every other implementation."""

import jax
import jax.numpy as jnp

from lmscale.kernels import segments


def ssd_scan(x, dt, A, B, C, D, state, document, chunk):
  """The recurrence as `ssd` states it. Shapes and dtypes as in `api`; `chunk` is not used.

  Differentiating it stores a state per token, and computes the rest of a step again.
  """
  del chunk
  acc = state.dtype
  repeat = x.shape[2] // B.shape[2]
  keep = jnp.ones(x.shape[:2], bool) if document is None else ~segments.starts(document)

  def step(state, token):
    x, dt, B, C, keep = token
    B, C = (jnp.repeat(m.astype(acc), repeat, axis=1) for m in (B, C))
    decay = jnp.where(keep[:, None], jnp.exp(dt * A), 0)
    state = decay[..., None, None] * state + (dt[..., None] * x)[..., None] * B[:, :, None, :]
    return state, jnp.einsum('bhpn,bhn->bhp', state, C)

  tokens = (x.astype(acc), dt, B, C, keep)
  step = jax.checkpoint(step, prevent_cse=False)
  state, y = jax.lax.scan(step, state, tuple(jnp.moveaxis(token, 1, 0) for token in tokens))
  y = jnp.moveaxis(y, 0, 1)
  return y if D is None else y + D.reshape(x.shape[2], -1) * x.astype(acc), state
