"""The single-token update in plain jnp; XLA fuses it."""

import jax
import jax.numpy as jnp


def ssd_update_xla(state, x, dt, A, B, C, D, z, slots):
  """Shapes as in `api`, and every step in `api`'s acc. Heads are [groups, heads per group] inside."""
  rows = state
  if slots is not None:
    slots = jnp.where(slots < 0, state.shape[0], slots)  # a negative index would count from the end
    rows = state.at[slots].get(mode='fill', fill_value=0)
  b, h, p, n = rows.shape
  g = B.shape[1]
  acc = jnp.promote_types(jnp.float32, jnp.promote_types(x.dtype, state.dtype))
  x, dt, A, B, C = (m.astype(acc) for m in (x, dt, A, B, C))
  decay = jnp.exp(dt * A).reshape(b, g, h // g, 1, 1)
  update = (dt[..., None] * x).reshape(b, g, h // g, p, 1) * B[:, :, None, None, :]
  rows = decay * rows.astype(acc).reshape(b, g, h // g, p, n) + update
  y = jnp.sum(rows * C[:, :, None, None, :], axis=-1).reshape(b, h, p)
  if D is not None:
    y += D.astype(acc).reshape(h, -1) * x
  if z is not None:
    y *= jax.nn.silu(z.astype(acc))
  rows = rows.reshape(b, h, p, n).astype(state.dtype)
  return y, rows if slots is None else state.at[slots].set(rows, mode='drop')
