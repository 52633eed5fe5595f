"""The single-token update in plain jnp; XLA fuses it."""

import jax
import jax.numpy as jnp


def ssd_update_xla(state, x, dt, A, B, C, D, z, slots):
  """Shapes as in `api`, and every step in `api`'s acc."""
  rows = state
  if slots is not None:
    slots = jnp.where(slots < 0, state.shape[0], slots)  # a negative index would count from the end
    rows = state.at[slots].get(mode='fill', fill_value=0)
  # The state keeps its shape throughout, so that it is updated in place; B and C, which are small, go to every head.
  heads = rows.shape[1] // B.shape[1]
  acc = jnp.promote_types(jnp.float32, jnp.promote_types(x.dtype, state.dtype))
  x, dt, A = (m.astype(acc) for m in (x, dt, A))
  B, C = (jnp.repeat(m.astype(acc), heads, axis=1) for m in (B, C))
  decay = jnp.exp(dt * A)[..., None, None]
  rows = decay * rows.astype(acc) + (dt[..., None] * x)[..., None] * B[:, :, None, :]
  y = jnp.sum(rows * C[:, :, None, :], axis=-1)
  if D is not None:
    y += D.astype(acc).reshape(x.shape[1], -1) * x
  if z is not None:
    y *= jax.nn.silu(z.astype(acc))
  rows = rows.astype(state.dtype)
  return y, rows if slots is None else state.at[slots].set(rows, mode='drop')
