"""SSD on Hopper GPUs: Pallas kernels for Mosaic GPU (TMA, wgmma, warp specialisation).

This file is the entry, the small arrays and the derivative.

XLA computes the decays of every token into one small array, `vectors`, so the kernels contain no sums along the
sequence and know of documents only the causal mask. The forward pass is a walk over the chunks; the backward pass is
the same walk in reverse with B and C exchanged, which gives the gradient of x and of the state, and a kernel that is
parallel over chunks and gives the rest. No step adds in an order that may vary: two runs agree to the bit.
"""

import jax
import jax.numpy as jnp

from lmscale.kernels.ssd import decay

try:
  from lmscale.kernels.ssd.mosaic import outer, walk
except ImportError as error:
  MISSING = f'this JAX ({jax.__version__}) has no Pallas Mosaic GPU lowering ({error})'
else:
  MISSING = None


def unsupported(x: jax.Array, B: jax.Array, chunk: int) -> str | None:
  """Why `ssd_pallas_mosaic` cannot take these arguments, in words, or None if it can."""
  if MISSING:
    return MISSING
  l, p, n = x.shape[1], x.shape[3], B.shape[3]
  if x.dtype not in (jnp.bfloat16, jnp.float16):
    return f'x is {x.dtype}; wgmma takes bfloat16 and float16'
  if p != 64 or n not in (64, 128):
    return f'head_dim {p} and state {n} are not the 64 and 64 or 128 that its tiles have'
  if chunk != 64:
    return f'chunk {chunk} is not 64, the only size it was built for'
  if l % chunk:
    return f'length {l} is not a multiple of {chunk}: {l} % {chunk} = {l % chunk}'
  return None


def ssd_pallas_mosaic(x, dt, A, B, C, D, state, document, chunk, *, deterministic=True):
  """Shapes and dtypes as in `api`; y is in x.dtype. Deterministic whatever `deterministic` says."""
  del deterministic
  reason = unsupported(x, B, chunk)
  if reason is not None:
    raise ValueError(f'ssd: pallas_mosaic cannot do this: {reason}')
  if D is not None:
    D = jnp.broadcast_to(D.reshape(x.shape[2], -1), (x.shape[2], x.shape[3]))
  return _ssd(x, decay.log_decay(dt, A), dt, B, C, D, state, document)


@jax.custom_vjp
def _ssd(x, a, dt, B, C, D, state, document):
  """The kernels; a [b, l, h] are the log decays."""
  (y, state), _ = _forward(x, a, dt, B, C, D, state, document, save=False)
  return y, state


def _forward(x, a, dt, B, C, D, state, document, save=True):
  v, start = vectors(a, dt, document), starts(document)
  y, final, H = walk.walk(x, C, B, v, start, D, state, reverse=False, save=save)
  return (y, final), (x, a, dt, B, C, D, document, H)


def _backward(saved, cotangents):
  x, a, dt, B, C, D, document, H = saved
  dy, dfinal = cotangents
  v, start = vectors(a, dt, document), starts(document)
  dx, dstate, G = walk.walk(dy, B, C, v, start, D, dfinal, reverse=True, save=True)
  dB, dC, dv = outer.outer(x, dy, B, C, v, start, H, G)
  column_sum, within, de, dw, keep = (_chunks(m, walk.Q) for m in jnp.moveaxis(dv, (1, 2), (3, 0)))
  enters, leaves = (_chunks(m, walk.Q) for m in scales(*_sums(a, document), document))
  arrives = (enters * de).at[:, :, -1].add(enters[:, :, -1] * keep.sum(2))
  ddt = column_sum + leaves * dw
  da = within + decay.gradient(arrives, _chunks(dt, walk.Q) * leaves * dw)
  dD = None if D is None else jnp.einsum('blhp,blhp->hp', x, dy, preferred_element_type=D.dtype)
  return dx, da.reshape(a.shape), ddt.reshape(dt.shape), dB.astype(B.dtype), dC.astype(C.dtype), dD, dstate, None


_ssd.defvjp(_forward, _backward)


def _chunks(m, q):
  """[b, l, ...] -> [b, chunks, q, ...]."""
  return m.reshape(m.shape[0], -1, q, *m.shape[2:])


def _sums(a, document):
  """(high, low) of `decay.running` to base 2, [b, l, h]."""
  sums = decay.running(_chunks(a * decay.LOG2E, walk.Q), None if document is None else _chunks(document, walk.Q))
  return tuple(m.reshape(a.shape) for m in sums)


def scales(high: jax.Array, low: jax.Array, document: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  """How much of the state that enters a chunk reaches each of its tokens, and of each token the state that leaves.

  Args:
    high, low: [b, l, h] from `decay.running` in base 2. document: [b, l] or None.

  Returns:
    e_i and w_j / dt_j of `walk`, like high; 0 where a document begins in between. The last e of a chunk is the
    factor of the state itself.
  """
  h, s = _chunks(high, walk.Q), _chunks(low, walk.Q)
  enters, leaves = h + s, (h[:, :, -1:] - h) + (s[:, :, -1:] - s)
  if document is not None:
    doc = _chunks(document, walk.Q)
    entering = jnp.pad(doc[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))
    enters = jnp.where((doc == entering)[..., None], enters, -jnp.inf)
    leaves = jnp.where((doc == doc[:, :, -1:])[..., None], leaves, -jnp.inf)
  return jnp.exp2(enters).reshape(high.shape), jnp.exp2(leaves).reshape(high.shape)


def vectors(a: jax.Array, dt: jax.Array, document: jax.Array | None) -> jax.Array:
  """What the kernels need of every token, [b, h, 6, l]: the parts high and low of the sum of its log decays, low - log dt,
  dt, e and w; logarithms to base 2."""
  high, low = _sums(a, document)
  e, leaves = scales(high, low, document)
  return jnp.stack([high, low, low - jnp.log2(dt), dt, e, leaves * dt], 2).transpose(0, 3, 2, 1)


def starts(document: jax.Array | None) -> jax.Array | None:
  """[b, l] int32: where in its chunk the document of a token starts, as an index; None for one document."""
  if document is None:
    return None
  doc = _chunks(document, walk.Q)
  return (doc[:, :, None, :] < doc[:, :, :, None]).sum(-1, dtype=jnp.int32).reshape(document.shape)
