"""The selective scan: choice of implementation and what all implementations share.

An implementation maps (x, dt, A, B, C, D, z, state, start, ...) to (y, state): x and z in x.dtype, B and C [b, l, g, n]
in a floating dtype, the others in the accumulator dtype, all zero at padding, and `start` [b, l] bool (True where the
state must be forgotten) or None. y (D skip and gate included) is in x.dtype or in the accumulator dtype. The Pallas
one says in `unsupported` what it cannot do.
"""

import functools
import importlib

import jax
import jax.numpy as jnp

from lmscale.kernels import choice, segments
from lmscale.kernels.selective_scan import scan, xla

IMPLEMENTATIONS = ('scan', 'xla', 'pallas_triton')


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
  chunk: int | None = None,
  implementation: str | None = None,
  deterministic: bool = True,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Runs h_t = exp(dt_t A) h_(t-1) + (dt_t x_t) B_t and y_t = h_t C_t per channel (arXiv 2312.00752, section 3.2).

  With D, y_t + D x_t; with z, the result times silu(z). Decays, states and sums are in
  acc = promote_types(float32, x.dtype). Differentiable once, in reverse, with respect to every floating argument.

  Args:
    x: [b, l, d].
    dt: [b, l, d], already positive (after softplus).
    A: [d, n], negative.
    B, C: [b, l, n], shared by all channels, or [b, l, g, n]: channels (d / g) i .. (d / g) (i + 1) - 1 use group i.
    D: [d]. z: [b, l, d].
    initial_state: [b, d, n], belongs to the document of the first real token; zeros if None.
    segment_ids: [b, l], 0 = padding. The state starts from zero in every later document; padding passes it
      unchanged, outputs zero and receives zero gradient; no value there matters, be it NaN.
    chunk: tokens between the states that are kept for the backward pass, which changes memory and speed and not the
      result; any length l is allowed. None chooses; 'scan' keeps every state in any case.
    implementation: 'scan' (one token at a time, the oracle), 'xla' (chunked) or 'pallas_triton' (an NVIDIA GPU
      kernel). None chooses: 'scan' for one token, else 'pallas_triton' on an NVIDIA GPU where it can and has proved
      itself (`proof`), else 'xla'.
    deterministic: False lets the backward pass of 'pallas_triton' sum in any order, which is faster; the others are
      deterministic in any case.
    interpret: run 'pallas_triton' on the CPU, slowly, for tests.

  Returns:
    y [b, l, d] in x.dtype and the state after the last real token [b, d, n] in acc.

  Raises:
    ValueError: shapes that do not fit, an unknown implementation, or a named one that cannot do what is asked.
  """
  _check(x, dt, A, B, C, D, z, initial_state, segment_ids, chunk)
  if B.ndim == 3:
    B, C = B[:, :, None], C[:, :, None]
  run = _choose(x, B, chunk, implementation, deterministic, interpret)
  b, _, d = x.shape
  acc = jnp.promote_types(jnp.float32, x.dtype)
  dt, A, D = dt.astype(acc), A.astype(acc), None if D is None else D.astype(acc)
  z = None if z is None else z.astype(x.dtype)
  state = jnp.zeros((b, d, A.shape[1]), acc) if initial_state is None else initial_state.astype(acc)
  start = real = None
  if segment_ids is not None:
    document, real = segments.documents(segment_ids)
    start = segments.starts(document)
    x, dt, B, C, z = segments.clear(real, x, dt, B, C, z)
  y, state = run(x, dt, A, B, C, D, z, state, start)
  if real is not None:  # y is zero there already; this is for its cotangent
    (y,) = segments.clear(real, y)
  return y.astype(x.dtype), state


def _choose(x, B, chunk, name, deterministic, interpret):
  """The function of the implementation called `name`; None: the best one here."""

  def unsupported(name):
    return _pallas_triton().unsupported(x, B, chunk) if name == 'pallas_triton' else None

  preferred = ('scan',) if x.shape[1] == 1 else ('pallas_triton', 'xla') if choice.nvidia() else ('xla',)
  name = choice.choose('selective_scan', name, IMPLEMENTATIONS, preferred, unsupported, x.dtype, interpret)
  if name == 'scan':
    return scan.selective_scan_scan
  if name == 'xla':
    return functools.partial(xla.selective_scan_xla, chunk=chunk)
  options = {'chunk': chunk, 'deterministic': deterministic, 'interpret': interpret}
  return functools.partial(_pallas_triton().selective_scan_pallas_triton, **options)


def _pallas_triton():
  """The module, imported where it is used: Pallas is slow to import."""
  return importlib.import_module('lmscale.kernels.selective_scan.pallas_triton')


def _check(x, dt, A, B, C, D, z, initial_state, segment_ids, chunk):
  if x.ndim != 3 or A.ndim != 2:
    raise ValueError(f'selective_scan: x is [b, l, d] and A is [d, n], but their shapes are {x.shape} and {A.shape}')
  b, l, d = x.shape
  n = A.shape[1]
  if l < 1 or (chunk is not None and chunk < 1):
    raise ValueError(f'selective_scan: length {l} and chunk {chunk} must be at least 1')
  shared = (b, l, n) if B.ndim == 3 else (b, l, B.shape[2] if B.ndim == 4 else 1, n)
  if B.ndim == 4 and d % B.shape[2]:
    raise ValueError(f'selective_scan: {d} channels (x.shape[2]) do not divide into {B.shape[2]} groups (B.shape[2])')
  wanted = {
    'dt': (dt, (b, l, d)), 'A': (A, (d, n)), 'B': (B, shared), 'C': (C, shared), 'D': (D, (d,)),
    'z': (z, (b, l, d)), 'initial_state': (initial_state, (b, d, n)), 'segment_ids': (segment_ids, (b, l)),
  }  # fmt: skip
  for name, (value, shape) in wanted.items():
    if value is not None and value.shape != shape:
      raise ValueError(f'selective_scan: {name} has shape {value.shape}, but x {x.shape} and A {A.shape} need {shape}')
