"""The SSD operation: choice of implementation and what all implementations share.

An implementation maps (x, dt, A, B, C, D, state, document, chunk) to (y, state) with dt, A, D and the states in the
accumulator dtype, y (D skip included) in that or in x.dtype, dt = 0 at padding, and `document` from
`segments.documents` or None. Everything else (padding, the z gate, dtypes) is done here once.
"""

import jax
import jax.numpy as jnp

from lmscale.kernels import segments
from lmscale.kernels.ssd import scan, xla

IMPLEMENTATIONS = {'scan': scan.ssd_scan, 'xla': xla.ssd_xla}


def ssd(
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
  chunk: int = 64,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Runs h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t^T and y_t = h_t C_t (arXiv 2405.21060, sections 2 and 6).

  With D, y_t + D x_t; with z, the result times silu(z). Decays, states and sums are in
  acc = promote_types(float32, x.dtype).

  Args:
    x: [b, l, h, p].
    dt: [b, l, h], already positive (after softplus).
    A: [h], negative.
    B, C: [b, l, g, n]; heads (h / g) i .. (h / g) (i + 1) - 1 use group i.
    D: [h]. z: [b, l, h, p].
    initial_state: [b, h, p, n], belongs to the document of the first real token; zeros if None.
    segment_ids: [b, l], 0 = padding. The state starts from zero in every later document; padding passes it
      unchanged, outputs zero and receives zero gradient.
    chunk: tokens that 'xla' handles at a time; any length l is allowed.
    implementation: 'scan' (one token at a time, the oracle) or 'xla' (chunked). None chooses.

  Returns:
    y [b, l, h, p] in x.dtype and the state after the last real token [b, h, p, n] in acc.

  Raises:
    ValueError: an unknown implementation, or shapes that do not fit.
  """
  _check(x, dt, A, B, C, D, z, initial_state, segment_ids, chunk)
  b, l, h, p = x.shape
  if implementation is None:
    implementation = 'scan' if l == 1 else 'xla'
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"ssd: implementation '{implementation}' is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
  acc = jnp.promote_types(jnp.float32, x.dtype)
  dt, A, D = dt.astype(acc), A.astype(acc), None if D is None else D.astype(acc)
  B, C = B.astype(x.dtype), C.astype(x.dtype)
  state = jnp.zeros((b, h, p, B.shape[-1]), acc) if initial_state is None else initial_state.astype(acc)
  document = real = None
  if segment_ids is not None:
    document, real = segments.documents(segment_ids)
    dt = jnp.where(real[..., None], dt, 0)
  y, state = IMPLEMENTATIONS[implementation](x, dt, A, B, C, D, state, document, chunk)
  if z is not None:
    y = y.astype(acc) * jax.nn.silu(z.astype(acc))
  if real is not None:
    y = jnp.where(real[..., None, None], y, 0)
  return y.astype(x.dtype), state


def _check(x, dt, A, B, C, D, z, initial_state, segment_ids, chunk):
  if x.ndim != 4 or B.ndim != 4:
    raise ValueError(f'ssd: x is [b, l, h, p] and B is [b, l, g, n], but their shapes are {x.shape} and {B.shape}')
  b, l, h, p = x.shape
  g, n = B.shape[2:]
  if l < 1 or chunk < 1:
    raise ValueError(f'ssd: length {l} and chunk {chunk} must be at least 1')
  if h % g:
    raise ValueError(f'ssd: {h} heads (x.shape[2]) do not divide into {g} groups (B.shape[2])')
  wanted = {
    'dt': (dt, (b, l, h)), 'A': (A, (h,)), 'B': (B, (b, l, g, n)), 'C': (C, (b, l, g, n)), 'D': (D, (h,)),
    'z': (z, x.shape), 'initial_state': (initial_state, (b, h, p, n)), 'segment_ids': (segment_ids, (b, l)),
  }  # fmt: skip
  for name, (value, shape) in wanted.items():
    if value is not None and value.shape != shape:
      raise ValueError(f'ssd: {name} has shape {value.shape}, but x {x.shape} and B {B.shape} need {shape}')
