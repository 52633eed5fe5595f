"""SSD on Hopper GPUs: Pallas kernels for Mosaic GPU (TMA, wgmma, warp specialisation).

This file is the entry, the small arrays and the derivative.

XLA computes the decays of every token into one small array, `vectors`, so the kernels contain no sums along the
sequence and know of documents only the causal mask. The forward pass is a walk over the chunks; the backward pass is
the same walk in reverse with B and C exchanged, which gives the gradient of x and of the state, and a kernel that is
parallel over chunks and gives the rest. No step adds in an order that may vary: two runs agree to the bit.
"""

import functools

import jax
import jax.numpy as jnp

from lmscale.kernels.ssd.decay import chunk_decay

try:
  from lmscale.kernels.ssd.mosaic import outer, walk
except ImportError as error:
  MISSING = f'this JAX ({jax.__version__}) has no Pallas Mosaic GPU lowering ({error})'
else:
  MISSING = None

LOG2E = 1.4426950408889634


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
  cs = chunk_decay(dt, A, document, chunk)
  if D is not None:
    D = jnp.broadcast_to(D.reshape(x.shape[2], -1), (x.shape[2], x.shape[3]))
  return _ssd(x, cs, dt, B, C, D, state, document)


@jax.custom_vjp
def _ssd(x, cs, dt, B, C, D, state, document):
  v, start = vectors(cs, dt, document), starts(document)
  y, state, _ = walk.walk(x, C, B, v, start, D, state, reverse=False, save=False)
  return y, state


def _forward(x, cs, dt, B, C, D, state, document):
  v, start = vectors(cs, dt, document), starts(document)
  y, final, H = walk.walk(x, C, B, v, start, D, state, reverse=False, save=True)
  return (y, final), (x, cs, dt, B, C, D, document, H)


def _backward(saved, cotangents):
  x, cs, dt, B, C, D, document, H = saved
  dy, dfinal = cotangents
  v, start = vectors(cs, dt, document), starts(document)
  dx, dstate, G = walk.walk(dy, B, C, v, start, D, dfinal, reverse=True, save=True)
  dB, dC, dv = outer.outer(x, dy, B, C, v, start, H, G)
  q = walk.Q
  row_sum, column_sum, de, dw, keep = jnp.moveaxis(dv, (1, 2), (3, 0))
  keep = _chunks(keep, q).sum(2)  # keep is e of a chunk's last token, so this gradient is added to that token's.
  de = _chunks(de, q).at[:, :, -1].add(keep).reshape(de.shape)
  _, through_scales = jax.vjp(functools.partial(scales, document=document, q=q), cs, dt)
  dcs, ddt = through_scales((de, dw))
  dcs += row_sum - dt * column_sum
  ddt += column_sum
  dD = None if D is None else jnp.einsum('blhp,blhp->hp', x, dy, preferred_element_type=D.dtype)
  return dx, dcs, ddt, dB.astype(B.dtype), dC.astype(C.dtype), dD, dstate, None


_ssd.defvjp(_forward, _backward)


def _chunks(m, q):
  """[b, l, ...] -> [b, chunks, q, ...]."""
  return m.reshape(m.shape[0], -1, q, *m.shape[2:])


def scales(cs: jax.Array, dt: jax.Array, document: jax.Array | None, q: int) -> tuple[jax.Array, jax.Array]:
  """How much of the state that enters a chunk reaches each of its tokens, and of each token the state that leaves.

  Args:
    cs: [b, l, h] from `chunk_decay` with chunks of q. dt: [b, l, h]. document: [b, l] or None.

  Returns:
    e_i = exp(cs_i) and w_j = exp(cs_last - cs_j) dt_j, like cs; 0 where a document begins in between. The last e of a
    chunk is the factor of the state itself.
  """
  c, d = _chunks(cs, q), _chunks(dt, q)
  enters, leaves = c, c[:, :, -1:] - c
  if document is not None:
    doc = _chunks(document, q)
    entering = jnp.pad(doc[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))
    enters = jnp.where((doc == entering)[..., None], enters, -jnp.inf)
    leaves = jnp.where((doc == doc[:, :, -1:])[..., None], leaves, -jnp.inf)
  return jnp.exp(enters).reshape(cs.shape), (jnp.exp(leaves) * d).reshape(cs.shape)


def vectors(cs: jax.Array, dt: jax.Array, document: jax.Array | None) -> jax.Array:
  """What the kernels need of every token, [b, h, 5, l]: cs, cs - log dt, dt, e and w; cs and log to base 2."""
  e, w = scales(cs, dt, document, walk.Q)
  cs = cs * LOG2E
  return jnp.stack([cs, cs - jnp.log2(dt), dt, e, w], 2).transpose(0, 3, 2, 1)


def starts(document: jax.Array | None) -> jax.Array | None:
  """[b, l] int32: where in its chunk the document of a token starts, as an index; None for one document."""
  if document is None:
    return None
  doc = _chunks(document, walk.Q)
  return (doc[:, :, None, :] < doc[:, :, :, None]).sum(-1, dtype=jnp.int32).reshape(document.shape)
