"""The single-token update on NVIDIA GPUs: one Pallas kernel, lowered through Triton, that reads and writes the state once.

A program has one row, head and part of head_dim: it loads its tile of the state, decays it, adds dt x B^T, takes the
product with C, the D skip and the gate, and stores the tile where it came from. Tiles have power-of-two sides; loads
and stores are masked where they stand out. Pallas computes offsets in 64 bits where an array has more than 2^32 bytes.
"""

import functools

import jax
import jax.numpy as jnp

from lmscale.kernels.ssd_update.xla import ssd_update_xla

try:
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton as pltriton
except ImportError as error:
  MISSING = f'this JAX ({jax.__version__}) has no Pallas Triton lowering ({error})'
else:
  MISSING = None

TILE_ELEMENTS = 8192  # of float32 state in a program's registers
FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def unsupported(state: jax.Array, x: jax.Array) -> str | None:
  """Why `ssd_update_pallas_triton` cannot take these arguments, in words, or None if it can."""
  if MISSING:
    return MISSING
  for name, array in (('state', state), ('x', x)):
    if array.dtype not in FLOATS:
      return f'{name} is {array.dtype}; the kernel has float32, bfloat16 and float16'
  if state.shape[3] > TILE_ELEMENTS:
    return f'state {state.shape[3]} is more than the {TILE_ELEMENTS} that fit on chip'
  return None


def ssd_update_pallas_triton(state, x, dt, A, B, C, D, z, slots, *, interpret=False):
  """Shapes as in `api`; y in x.dtype. The gradient is that of 'xla'."""
  return _update(interpret, state, x, dt, A, B, C, D, z, slots)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _update(interpret, state, x, dt, A, B, C, D, z, slots):
  s, h, p, n = state.shape
  b, g = B.shape[:2]
  N = pl.next_power_of_2(n)
  P = min(pl.next_power_of_2(p), TILE_ELEMENTS // N)
  acc = jnp.float32
  D = None if D is None else jnp.broadcast_to(D.astype(acc).reshape(h, -1), (h, p))
  inputs = {'x': x, 'dt': dt.astype(acc), 'A': A.astype(acc), 'B': B, 'C': C, 'D': D, 'z': z, 'slots': slots}
  inputs = {name: array for name, array in inputs.items() if array is not None}
  pool = pl.BlockSpec((s, None, P, N), lambda row, head, part: (0, head, part, 0))
  rows = pl.BlockSpec((None, None, P), lambda row, head, part: (row, head, part))
  group = pl.BlockSpec((None, None, N), lambda row, head, part: (row, head // (h // g), 0))
  specs = {
    'x': rows, 'z': rows, 'B': group, 'C': group, 'D': pl.BlockSpec((None, P), lambda row, head, part: (head, part)),
    'dt': pl.BlockSpec((None, h), lambda row, head, part: (row, 0)), 'A': pl.BlockSpec((h,), lambda *_: (0,)),
    'slots': pl.BlockSpec((b,), lambda *_: (0,)),
  }  # fmt: skip
  return pl.pallas_call(
    functools.partial(_kernel, (s, p, n)),
    grid=(b, h, -(-p // P)),
    in_specs=[pool, {name: specs[name] for name in inputs}],
    out_specs=(rows, pool),
    out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(state.shape, state.dtype)),
    input_output_aliases={0: 1},
    name='ssd_update',
    interpret=interpret,
    compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
  )(state, inputs)


def _kernel(sizes, state_ref, refs, y_ref, new_ref):
  s, p, n = sizes
  P, N = state_ref.shape[1:]
  row, head, part = (pl.program_id(axis).astype(int) for axis in range(3))
  inside_p = part * P + jnp.arange(P) < p
  inside_n = jnp.arange(N) < n
  slot = pltriton.load(refs['slots'].at[row]) if 'slots' in refs else row
  used = (slot >= 0) & (slot < s)
  tile = inside_p[:, None] & inside_n[None, :] & used

  def vector(name, mask):
    return pltriton.load(refs[name], mask=mask, other=0).astype(jnp.float32)

  x, B, C = vector('x', inside_p), vector('B', inside_n), vector('C', inside_n)
  dt, A = pltriton.load(refs['dt'].at[head]), pltriton.load(refs['A'].at[head])
  state = pltriton.load(state_ref.at[slot], mask=tile, other=0).astype(jnp.float32)
  state = jnp.exp(dt * A) * state + (dt * x)[:, None] * B[None, :]
  y = jnp.sum(state * C[None, :], axis=1)
  if 'D' in refs:
    y += vector('D', inside_p) * x
  if 'z' in refs:
    z = vector('z', inside_p)
    y *= z * jax.nn.sigmoid(z)
  pltriton.store(y_ref, y.astype(y_ref.dtype), mask=inside_p)
  pltriton.store(new_ref.at[slot], state.astype(new_ref.dtype), mask=tile)


def _forward(interpret, *arguments):
  return _update(interpret, *arguments), arguments


def _backward(interpret, arguments, cotangents):
  *arguments, slots = arguments

  def in_xla(*arguments):
    y, state = ssd_update_xla(*arguments, slots)
    return y.astype(arguments[1].dtype), state

  return *jax.vjp(in_xla, *arguments)[1](cotangents), None


_update.defvjp(_forward, _backward)
