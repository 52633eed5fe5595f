"""The SSD operation: choice of implementation and what all implementations share.

An implementation maps (x, dt, A, B, C, D, state, document, chunk) to (y, state) with dt, A, D and the states in the
accumulator dtype, y (D skip included) in that or in x.dtype, x, dt, B and C zero at padding, and `document` from
`segments.documents` or None. Everything else (padding, the z gate, dtypes) is done here once. The Pallas ones also
take deterministic and interpret, and say in `unsupported` what they cannot do.
"""

import functools
import importlib

import jax
import jax.numpy as jnp

from lmscale.kernels import choice, segments
from lmscale.kernels.ssd import scan, xla
from lmscale.kernels.ssd_update import ssd_update

IMPLEMENTATIONS = ('scan', 'xla', 'pallas_triton', 'pallas_mosaic')
PALLAS_CHUNK = 64  # tokens per chunk of both Pallas kernels: their state stays on chip, so more would only add matmuls


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
  chunk: int | None = None,
  implementation: str | None = None,
  deterministic: bool = True,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Runs h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t^T and y_t = h_t C_t (arXiv 2405.21060, sections 2 and 6).

  With D, y_t + D x_t; with z, the result times silu(z). Decays, states and sums are in
  acc = promote_types(float32, x.dtype). One token without segments takes `ssd_update`. Differentiable once, in
  reverse, with respect to every floating argument.

  Args:
    x: [b, l, h, p].
    dt: [b, l, h], already positive (after softplus).
    A: [h], negative.
    B, C: [b, l, g, n]; heads (h / g) i .. (h / g) (i + 1) - 1 use group i.
    D: [h] or [h, p]. z: [b, l, h, p].
    initial_state: [b, h, p, n], belongs to the document of the first real token; zeros if None.
    segment_ids: [b, l], 0 = padding. The state starts from zero in every later document; padding passes it
      unchanged, outputs zero and receives zero gradient; no value there matters, be it NaN. An id does not come back
      once it has changed.
    chunk: tokens handled at a time, which changes the speed and not the result; any length l is allowed. None
      chooses per implementation and platform; 'scan' takes one token at a time in any case.
    implementation: 'scan' (one token at a time, the oracle), 'xla' (chunked), 'pallas_triton' (an NVIDIA GPU kernel) or
      'pallas_mosaic' (one for Hopper). None chooses: for 16-bit x on an NVIDIA GPU the faster of the kernels that can do
      the shapes and have proved themselves there (`proof`), else 'xla'.
    deterministic: False lets the backward pass of a Pallas kernel sum in any order, which is faster; the others are
      deterministic in any case.
    interpret: run 'pallas_triton' on the CPU, slowly, for tests.

  Returns:
    y [b, l, h, p] in x.dtype and the state after the last real token [b, h, p, n] in acc.

  Raises:
    ValueError: shapes that do not fit, an unknown implementation, or a named one that cannot do what is asked.
  """
  _check(x, dt, A, B, C, D, z, initial_state, segment_ids, chunk)
  run, chunk = _choose(x, B, chunk, implementation, deterministic, interpret)
  b, l, h, p = x.shape
  acc = jnp.promote_types(jnp.float32, x.dtype)
  dt, A, D = dt.astype(acc), A.astype(acc), None if D is None else D.astype(acc)
  B, C = B.astype(x.dtype), C.astype(x.dtype)
  state = jnp.zeros((b, h, p, B.shape[-1]), acc) if initial_state is None else initial_state.astype(acc)
  if l == 1 and segment_ids is None and implementation != 'scan':
    x, dt, B, C, z = (None if m is None else m[:, 0] for m in (x, dt, B, C, z))
    y, state = ssd_update(state, x, dt, A, B, C, D=D, z=z, implementation=implementation, interpret=interpret)
    return y[:, None], state
  document = real = None
  if segment_ids is not None:
    document, real = segments.documents(segment_ids)
    x, dt, B, C, z = segments.clear(real, x, dt, B, C, z)
  y, state = run(x, dt, A, B, C, D, state, document, chunk)
  if z is not None:
    y = y.astype(acc) * jax.nn.silu(z.astype(acc))
  if real is not None:  # y is zero there already; this is for its cotangent
    (y,) = segments.clear(real, y)
  return y.astype(x.dtype), state


def _choose(x, B, chunk, name, deterministic, interpret):
  """The function of the implementation called `name` (None: the best one here), and its chunk."""

  def unsupported(name):
    if not name.startswith('pallas'):
      return None
    return _load(name).unsupported(x, B, chunk or PALLAS_CHUNK)

  # float32 stays out: on a GPU the kernel multiplies it as three TF32 products, which nobody has measured yet.
  preferred = ('pallas_triton', 'pallas_mosaic', 'xla') if x.dtype.itemsize == 2 and choice.nvidia() else ('xla',)
  name = choice.choose('ssd', name, IMPLEMENTATIONS, preferred, unsupported, x.dtype, interpret)
  if name == 'scan':
    return scan.ssd_scan, 1
  if name == 'xla':
    return xla.ssd_xla, chunk or xla.default_chunk()
  options = {'interpret': interpret} if name == 'pallas_triton' else {}
  run = getattr(_load(name), f'ssd_{name}')
  return functools.partial(run, deterministic=deterministic, **options), chunk or PALLAS_CHUNK


def _load(name):
  """The module of a Pallas implementation, imported where it is used: Pallas is slow to import."""
  return importlib.import_module(f'lmscale.kernels.ssd.{name.removeprefix("pallas_")}.entry')


def _check(x, dt, A, B, C, D, z, initial_state, segment_ids, chunk):
  if x.ndim != 4 or B.ndim != 4:
    raise ValueError(f'ssd: x is [b, l, h, p] and B is [b, l, g, n], but their shapes are {x.shape} and {B.shape}')
  b, l, h, p = x.shape
  g, n = B.shape[2:]
  if l < 1 or (chunk is not None and chunk < 1):
    raise ValueError(f'ssd: length {l} and chunk {chunk} must be at least 1')
  if h % g:
    raise ValueError(f'ssd: {h} heads (x.shape[2]) do not divide into {g} groups (B.shape[2])')
  wanted = {
    'dt': (dt, (b, l, h)), 'A': (A, (h,)), 'B': (B, (b, l, g, n)), 'C': (C, (b, l, g, n)),
    'D': (D, (h,) if D is None or D.ndim == 1 else (h, p)), 'z': (z, x.shape),
    'initial_state': (initial_state, (b, h, p, n)), 'segment_ids': (segment_ids, (b, l)),
  }  # fmt: skip
  for name, (value, shape) in wanted.items():
    if value is not None and value.shape != shape:
      raise ValueError(f'ssd: {name} has shape {value.shape}, but x {x.shape} and B {B.shape} need {shape}')
