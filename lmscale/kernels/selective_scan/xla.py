"""The selective scan by chunks: token by token within a chunk, and a scan over chunks that carries the state.

The decay differs for every (channel, state) pair, so there is no matmul form. The body of a chunk is rematerialised:
the backward pass keeps of a chunk its inputs and the state at its start, and [b, chunk, d, n] only while it works on
one. On a CPU an associative scan within the chunk took five times as long and three times the memory.
"""

import functools

import jax
import jax.numpy as jnp

from lmscale.kernels.selective_scan.scan import selective_scan_scan


def selective_scan_xla(x, dt, A, B, C, state, start, chunk):
  """Shapes as in `api`."""
  b, l, d = x.shape
  q = min(chunk, l)

  def split(m):
    """[b, l, ...] -> [chunks, b, q, ...], padded with zeros: dt = 0 leaves the state as it is."""
    m = jnp.pad(m, ((0, 0), (0, -l % q)) + ((0, 0),) * (m.ndim - 2))
    return jnp.moveaxis(m.reshape(b, -1, q, *m.shape[2:]), 1, 0)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def body(state, inputs):
    x, dt, B, C, start = inputs
    y, state = selective_scan_scan(x, dt, A, B, C, state, start, chunk)
    return state, y

  state, y = jax.lax.scan(body, state, (split(x), split(dt), split(B), split(C), None if start is None else split(start)))
  return jnp.moveaxis(y, 0, 1).reshape(b, -1, d)[:, :l], state
