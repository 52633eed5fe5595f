"""The selective scan on NVIDIA GPUs: Pallas kernels lowered through Triton. The entry, the layout and the derivative.

A program walks the tokens of one row for a block of channels, see `pallas_triton_kernels`. Channels are the last dim
of every array, so states are [n, d] here. The gradients of B and C are sums over channels: by default each program
writes its own part and XLA adds the parts, so that two runs are equal in every bit; with deterministic False the
programs add to one array, in any order.

JAX 0.11 deprecates the Triton lowering (a DeprecationWarning when a kernel is lowered); `unsupported` says so in words
where it is gone.
"""

import functools

import jax
import jax.numpy as jnp

try:
  from lmscale.kernels.selective_scan import pallas_triton_kernels as kernels
except ImportError as error:
  MISSING = f'this JAX ({jax.__version__}) has no Pallas Triton lowering ({error})'
else:
  MISSING = None

CHUNK = 64  # tokens between kept states: at d_inner 8192 and length 4096 as many bytes as x in 16 bits has
PROGRAMS = 128  # about as many as an H200 has multiprocessors (132): fewer leave some idle
STATE_ELEMENTS = 4096  # of one program: 16 for each of at most 256 threads


def unsupported(x: jax.Array, B: jax.Array, chunk: int | None = None) -> str | None:
  """Why `selective_scan_pallas_triton` cannot take these arguments, in words, or None if it can. B: [b, l, g, n]."""
  if MISSING:
    return MISSING
  if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
    return f'x is {x.dtype}; the kernel has float32, bfloat16 and float16'
  if B.shape[3] > 256:
    return f'a state of {B.shape[3]} per channel is more than the 256 that fit on chip'
  if (chunk or CHUNK) % kernels.UNROLL:
    return f'chunk {chunk} is not a multiple of {kernels.UNROLL}'
  return None


def selective_scan_pallas_triton(
  x, dt, A, B, C, D, z, state, start, *, chunk=None, deterministic=True, interpret=False, block=None
):
  """Shapes and dtypes as in `api`; y is in x.dtype. block: channels per program, a power of two; None chooses."""
  b, length, d = x.shape
  g, n = B.shape[2:]
  block = block or _block(b, d, n)
  if g > 1:
    block = min(block, (d // g) & -(d // g))  # a power of two that divides: no program has channels of two groups
  plan = kernels.Plan(
    length=length, d=d, n=n, groups=g, block=block, chunk=chunk or CHUNK, deterministic=deterministic,
    interpret=interpret,
  )  # fmt: skip
  start = None if start is None else start.astype(jnp.int32)
  A, state = (jnp.pad(m, [(0, 0)] * (m.ndim - 1) + [(0, plan.width - d)]) for m in (A.T, jnp.swapaxes(state, 1, 2)))
  y, state = _scan(plan, x, dt, A, B, C, D, z, state, start)
  return y, jnp.swapaxes(state[..., :d], 1, 2)


def _block(b, d, n):
  """Channels per program: few parts of the gradients of B and C, but enough programs, and a state that fits them."""
  block = min(128, max(16, STATE_ELEMENTS // n))
  while block > 32 and b * -(-d // block) < PROGRAMS:
    block //= 2
  return 1 << (block.bit_length() - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan, x, dt, A, B, C, D, z, state, start):
  """x, dt, z [b, l, d]; A [n, width]; B, C [b, l, g, n]; D [d]; state [b, n, width]; start [b, l] int32."""
  outputs = kernels.forward(plan, x, dt, A, B, C, D, z, state, start, save=False)
  return outputs['y'], outputs['last']


def _scan_fwd(plan, x, dt, A, B, C, D, z, state, start):
  outputs = kernels.forward(plan, x, dt, A, B, C, D, z, state, start, save=True)
  return (outputs['y'], outputs['last']), (x, dt, A, B, C, D, z, start, outputs['saved'])


def _scan_bwd(plan, kept, cotangents):
  x, dt, A, B, C, D, z, start, saved = kept
  out = kernels.backward(plan, x, dt, A, B, C, D, z, start, saved, *cotangents)
  dB, dC = (out[name][..., : plan.n] for name in ('dB', 'dC'))
  if plan.deterministic:  # [programs, b, l, n] -> [b, l, g, n]
    dB, dC = (jnp.moveaxis(m.reshape(plan.groups, -1, *m.shape[1:]).sum(1), 0, 2) for m in (dB, dC))
  dD = None if D is None else out['dD'].sum(0)
  dz = None if z is None else out['dz']
  return out['dx'], out['ddt'], out['dA'].sum(0), dB.astype(B.dtype), dC.astype(C.dtype), dD, dz, out['dfirst'], None


_scan.defvjp(_scan_fwd, _scan_bwd)
