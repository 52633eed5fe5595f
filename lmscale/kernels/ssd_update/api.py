"""One decoding step of the SSD: choice of implementation and checks."""

import functools
import importlib

import jax

from lmscale.kernels import choice
from lmscale.kernels.ssd_update.xla import ssd_update_xla

IMPLEMENTATIONS = ('xla', 'pallas_triton')


def ssd_update(
  state: jax.Array,
  x: jax.Array,
  dt: jax.Array,
  A: jax.Array,
  B: jax.Array,
  C: jax.Array,
  *,
  D: jax.Array | None = None,
  z: jax.Array | None = None,
  slots: jax.Array | None = None,
  implementation: str | None = None,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """state <- exp(dt A) state + dt x B^T and y = state C (arXiv 2405.21060, section 2), for one token of every row.

  With D, y + D x; with z, the result times silu(z). Computed in acc = promote_types(float32, x.dtype, state.dtype).

  Args:
    state: [b, h, p, n], or with slots a pool [s, h, p, n]. Donate it to have it updated in place.
    x: [b, h, p].
    dt: [b, h], already positive (after softplus).
    A: [h], negative.
    B, C: [b, g, n]; heads (h / g) i .. (h / g) (i + 1) - 1 use group i.
    D: [h] or [h, p]. z: [b, h, p].
    slots: [b] int32, the row of the pool that belongs to each row of x, none twice. The pool's other rows stay as
      they are, to the bit. A slot outside the pool marks an idle row: it starts from zero and nothing is stored.
    implementation: 'xla', or 'pallas_triton' (one NVIDIA GPU kernel, in place). None chooses: 'pallas_triton' on an
      NVIDIA GPU where it can do the dtypes and has proved itself (`proof`), else 'xla'.
    interpret: run 'pallas_triton' on the CPU, slowly, for tests.

  Returns:
    y [b, h, p] in x.dtype and the state (or pool) in its own dtype.

  Raises:
    ValueError: shapes that do not fit, an unknown implementation, or a named one that cannot do what is asked.
  """
  _check(state, x, dt, A, B, C, D, z, slots)
  run = _choose(state, x, implementation, interpret)
  y, state = run(state, x, dt, A, B, C, D, z, slots)
  return y.astype(x.dtype), state


def _choose(state, x, name, interpret):
  def unsupported(name):
    return _pallas().unsupported(state, x) if name == 'pallas_triton' else None

  preferred = ('pallas_triton', 'xla') if choice.nvidia() else ('xla',)
  if choice.choose('ssd_update', name, IMPLEMENTATIONS, preferred, unsupported, x.dtype, interpret) == 'xla':
    return ssd_update_xla
  return functools.partial(_pallas().ssd_update_pallas_triton, interpret=interpret)


def _pallas():
  """Imported where it is used: Pallas is slow to import."""
  return importlib.import_module('lmscale.kernels.ssd_update.pallas_triton')


def _check(state, x, dt, A, B, C, D, z, slots):
  if state.ndim != 4 or x.ndim != 3 or B.ndim != 3:
    shapes = f'{state.shape}, {x.shape} and {B.shape}'
    raise ValueError(f'ssd_update: state is [b, h, p, n], x [b, h, p] and B [b, g, n], but their shapes are {shapes}')
  b, h, p = x.shape
  g, n = B.shape[1:]
  if h % g:
    raise ValueError(f'ssd_update: {h} heads (x.shape[1]) do not divide into {g} groups (B.shape[1])')
  wanted = {
    'state': (state, (b if slots is None else state.shape[0], h, p, n)), 'dt': (dt, (b, h)), 'A': (A, (h,)),
    'B': (B, (b, g, n)), 'C': (C, (b, g, n)), 'D': (D, (h,) if D is None or D.ndim == 1 else (h, p)),
    'z': (z, x.shape), 'slots': (slots, (b,)),
  }  # fmt: skip
  for name, (value, shape) in wanted.items():
    if value is not None and value.shape != shape:
      raise ValueError(f'ssd_update: {name} has shape {value.shape}, but x {x.shape} and B {B.shape} need {shape}')
