"""The selective scan by chunks, with a reverse walk as its derivative; states are held for one chunk at a time.

The decay differs for every (channel, state) pair, so there is no matmul form. Within a chunk a loop makes one state
after the other; what does not depend on the loop (the gradients of a chunk's inputs) is done for the whole chunk at
once. The forward pass keeps the inputs and the state at the start of each chunk. The backward pass walks the chunks
from the last to the first, makes a chunk's states again and carries the gradient of the state. With g_t the gradient
of h_t, and a_t = exp(dt_t A), 0 at the start of a document:

  g_t = dy_t C_t + a_(t+1) g_(t+1)        dB_t = sum_d g_t dt_t x_t      dC_t = sum_d dy_t h_t
  du_t = sum_n g_t B_t                    dx_t = dt_t du_t
  w_t = g_t a_t h_(t-1)                   ddt_t = x_t du_t + sum_n w_t A      dA = sum_t dt_t w_t

No exponent is positive. Channels are the last dim of every state, where a CPU's vectors are filled and sums over the
state and over the channels are matrix products; an associative scan within the chunk was several times slower.
"""

import functools

import jax
import jax.numpy as jnp

CHUNK = 32  # tokens: [b, chunk, d, n] fits a CPU's cache for small batches


def selective_scan_xla(x, dt, A, B, C, D, z, state, start, chunk):
  """Shapes and dtypes as in `api`. Inside, channels are [groups, channels of the group]."""
  b, l, d = x.shape
  g, n = B.shape[2:]
  q = min(chunk or CHUNK, l)

  def split(m, *channels):
    """[b, l, ...] -> [chunks, q, b, ..., channels], padded with zeros: dt = 0 leaves the state as it is."""
    if m is None:
      return None
    m = jnp.pad(m, ((0, 0), (0, -l % q)) + ((0, 0),) * (m.ndim - 2))
    return jnp.moveaxis(m, 1, 0).reshape(-1, q, b, *(channels or m.shape[2:]))

  def grouped(m):
    return jnp.swapaxes(m.reshape(*m.shape[:-2], g, d // g, n), -1, -2)

  x, dt, z = (split(m, g, d // g) for m in (x, dt, z))
  D = None if D is None else D.reshape(g, d // g)
  y, state = _scan(x, dt, grouped(A), split(B), split(C), D, z, grouped(state), split(start))
  y = jnp.moveaxis(y.reshape(-1, b, d), 0, 1)[:, :l]
  return y, jnp.swapaxes(state, -1, -2).reshape(b, d, n)


@jax.custom_vjp
def _scan(x, dt, A, B, C, D, z, state, start):
  """x, dt, z [chunks, q, b, g, r]; A [g, n, r]; B, C [chunks, q, b, g, n]; D [g, r]; state [b, g, n, r];
  start [chunks, q, b]. Returns y as x and the final state."""  # fmt: skip
  return _scan_fwd(x, dt, A, B, C, D, z, state, start)[0]


def _scan_fwd(x, dt, A, B, C, D, z, state, start):
  def body(state, chunk):
    last, states = _states(A, state, chunk)
    y = _sum_n(states, chunk[3].astype(state.dtype))
    return last, (_output(y, chunk[0], D, chunk[4]).astype(x.dtype), state)

  chunks = (x, dt, B, C, z, start)
  last, (y, entering) = jax.lax.scan(body, state, chunks)
  return (y, last), (chunks, A, D, entering)


def _scan_bwd(kept, cotangents):
  chunks, A, D, entering = kept
  dy, dstate = cotangents

  def body(carry, inputs):
    dstate, dA, dD = carry
    chunk, entering, dout = inputs
    x, dt, B, C, z, start = chunk
    x, B, C = (m.astype(A.dtype) for m in (x, B, C))
    _, states = _states(A, entering, chunk)
    before = jnp.concatenate([entering[None], states[:-1]])
    _, output_vjp = jax.vjp(_output, _sum_n(states, C), x, D, z)
    dy, dx, dD_chunk, dz = output_vjp(dout.astype(A.dtype))
    decay = _decay(A, dt, start)

    def step(dnext, token):  # dnext: a_(t+1) g_(t+1)
      decay, dy, C = token
      g = dnext + dy[..., None, :] * C[..., None]
      return decay * g, g

    dstate, g = jax.lax.scan(step, dstate, (decay, dy, C), reverse=True)
    du = _sum_n(g, B)
    w = g * decay * before
    ddt = x * du + jnp.einsum('qbgnr,gnr->qbgr', w, A)
    dB, dC = _sum_r(g, dt * x), _sum_r(states, dy)
    dA += jnp.sum(dt[..., None, :] * w, (0, 1))
    dD = None if D is None else dD + dD_chunk
    return (dstate, dA, dD), ((dx + dt * du).astype(chunk[0].dtype), ddt, dB, dC, dz)

  start = (dstate, jnp.zeros_like(A), None if D is None else jnp.zeros_like(D))
  (dstate, dA, dD), (dx, ddt, dB, dC, dz) = jax.lax.scan(body, start, (chunks, entering, dy), reverse=True)
  return dx, ddt, dA, dB.astype(chunks[2].dtype), dC.astype(chunks[3].dtype), dD, dz, dstate, None


_scan.defvjp(_scan_fwd, _scan_bwd)


def _decay(A, dt, start):
  """exp(dt A) [..., b, g, n, r], zero at the start of a document."""
  decay = jnp.exp(dt[..., None, :] * A)
  return decay if start is None else decay * ~start[..., None, None, None]  # a product: faster than a select here


def _states(A, state, chunk):
  """The state after the last token of a chunk and the states after each of its tokens, [q, b, g, n, r]."""
  x, dt, B, _, _, start = chunk

  def step(state, token):
    x, dt, B, start = token
    state = _decay(A, dt, start) * state + (dt * x)[..., None, :] * B.astype(dt.dtype)[..., None]
    return state, state

  return jax.lax.scan(step, state, (x, dt, B, start))


def _output(y, x, D, z):
  """y + D x, times silu(z): in the accumulator dtype."""
  if D is not None:
    y = y + D * x.astype(y.dtype)
  return y if z is None else y * jax.nn.silu(z.astype(y.dtype))


_sum_n = functools.partial(jnp.einsum, '...nr,...n->...r', precision='highest')
_sum_r = functools.partial(jnp.einsum, '...nr,...r->...n', precision='highest')
