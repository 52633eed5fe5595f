"""The selective scan: choice of implementation and what all implementations share.

An implementation maps (x, dt, A, B, C, state, start, chunk) to (y, state), all in the accumulator dtype, with dt = 0
at padding and `start` [b, l] bool (True where the state must be forgotten) or None.
"""

import jax
import jax.numpy as jnp

from lmscale.kernels import segments
from lmscale.kernels.selective_scan import scan, xla

IMPLEMENTATIONS = {'scan': scan.selective_scan_scan, 'xla': xla.selective_scan_xla}


def selective_scan(
  x: jax.Array,
  dt: jax.Array,
  A: jax.Array,
  B: jax.Array,
  C: jax.Array,
  *,
  D: jax.Array | None = None,
  z: jax.Array | None = None,
  initial_state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  chunk: int = 32,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Runs h_t = exp(dt_t A) h_(t-1) + (dt_t x_t) B_t and y_t = h_t C_t per channel (arXiv 2312.00752, section 3.2).

  With D, y_t + D x_t; with z, the result times silu(z). Decays, states and sums are in
  acc = promote_types(float32, x.dtype).

  Args:
    x: [b, l, d].
    dt: [b, l, d], already positive (after softplus).
    A: [d, n], negative.
    B, C: [b, l, n], shared by all channels.
    D: [d]. z: [b, l, d].
    initial_state: [b, d, n], belongs to the document of the first real token; zeros if None.
    segment_ids: [b, l], 0 = padding. The state starts from zero in every later document; padding passes it
      unchanged, outputs zero and receives zero gradient.
    chunk: tokens that 'xla' handles at a time; any length l is allowed.
    implementation: 'scan' (one token at a time, the oracle) or 'xla' (chunked). None chooses.

  Returns:
    y [b, l, d] in x.dtype and the state after the last real token [b, d, n] in acc.

  Raises:
    ValueError: an unknown implementation, or shapes that do not fit.
  """
  _check(x, dt, A, B, C, D, z, initial_state, segment_ids, chunk)
  b, l, d = x.shape
  if implementation is None:
    implementation = 'scan' if l == 1 else 'xla'
  if implementation not in IMPLEMENTATIONS:
    known = ', '.join(IMPLEMENTATIONS)
    raise ValueError(f"selective_scan: implementation '{implementation}' is unknown; choose one of {known}")
  dtype = x.dtype
  acc = jnp.promote_types(jnp.float32, dtype)
  x, dt, A, B, C = (m.astype(acc) for m in (x, dt, A, B, C))
  state = jnp.zeros((b, d, A.shape[1]), acc) if initial_state is None else initial_state.astype(acc)
  start = real = None
  if segment_ids is not None:
    document, real = segments.documents(segment_ids)
    start = segments.starts(document)
    dt = jnp.where(real[..., None], dt, 0)
  y, state = IMPLEMENTATIONS[implementation](x, dt, A, B, C, state, start, chunk)
  if D is not None:
    y = y + D.astype(acc) * x
  if z is not None:
    y = y * jax.nn.silu(z.astype(acc))
  if real is not None:
    y = jnp.where(real[..., None], y, 0)
  return y.astype(dtype), state


def _check(x, dt, A, B, C, D, z, initial_state, segment_ids, chunk):
  if x.ndim != 3 or A.ndim != 2:
    raise ValueError(f'selective_scan: x is [b, l, d] and A is [d, n], but their shapes are {x.shape} and {A.shape}')
  b, l, d = x.shape
  n = A.shape[1]
  if l < 1 or chunk < 1:
    raise ValueError(f'selective_scan: length {l} and chunk {chunk} must be at least 1')
  wanted = {
    'dt': (dt, (b, l, d)), 'A': (A, (d, n)), 'B': (B, (b, l, n)), 'C': (C, (b, l, n)), 'D': (D, (d,)),
    'z': (z, (b, l, d)), 'initial_state': (initial_state, (b, d, n)), 'segment_ids': (segment_ids, (b, l)),
  }  # fmt: skip
  for name, (value, shape) in wanted.items():
    if value is not None and value.shape != shape:
      raise ValueError(f'selective_scan: {name} has shape {value.shape}, but x {x.shape} and A {A.shape} need {shape}')
