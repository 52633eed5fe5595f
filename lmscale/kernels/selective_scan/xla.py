"""The selective scan by chunks: an associative scan within a chunk, a scan over chunks that carries the state.

The decay differs for every (channel, state) pair, so there is no matmul form. The largest array is
[b, chunk, d, n]; the body is rematerialised, so the backward pass keeps of a chunk its inputs and the state at its start.
"""

import functools

import jax
import jax.numpy as jnp


def selective_scan_xla(x, dt, A, B, C, state, start, chunk):
  """Shapes as in `api`."""
  b, l, d = x.shape
  q = min(chunk, l)

  def split(m):
    """[b, l, ...] -> [chunks, b, q, ...], padded with zeros: dt = 0 leaves the state as it is."""
    m = jnp.pad(m, ((0, 0), (0, -l % q)) + ((0, 0),) * (m.ndim - 2))
    return jnp.moveaxis(m.reshape(b, -1, q, *m.shape[2:]), 1, 0)

  chunks = (split(x), split(dt), split(B), split(C), None if start is None else split(start))
  body = jax.checkpoint(functools.partial(_chunk, A), prevent_cse=False)
  state, y = jax.lax.scan(body, state, chunks)
  return jnp.moveaxis(y, 0, 1).reshape(b, -1, d)[:, :l], state


def _chunk(A, state, inputs):
  """One chunk. state [b, d, n]; x, dt [b, q, d]; B, C [b, q, n]; start [b, q] or None."""
  x, dt, B, C, start = inputs
  decay = jnp.exp(dt[..., None] * A)
  if start is not None:
    decay = jnp.where(start[..., None, None], 0, decay)
  update = (dt * x)[..., None] * B[:, :, None, :]
  update = update.at[:, 0].add(decay[:, 0] * state)
  _, states = jax.lax.associative_scan(_combine, (decay, update), axis=1)
  return states[:, -1], jnp.einsum('bqdn,bqn->bqd', states, C)


def _combine(first, second):
  return first[0] * second[0], second[0] * first[1] + second[1]
