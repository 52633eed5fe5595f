"""SSD on NVIDIA GPUs: Pallas kernels lowered through Triton. This file is the entry, the layout and the derivative.

Around the kernels, XLA pads the small arrays (dt, its cumulative decay, document) to whole chunks and puts them
head-major; x, B, C and y are read and written where they are. A head whose state is too large for the registers of a
program becomes two or more, each with a part of head_dim: heads of one group, so the kernels need not know.

Where there are too few heads and rows to fill the GPU, the sequence is walked in segments at once: a first pass gives
each segment's end state from a zero start, a scan over the segments gives the states they really start from, and the
second pass is the walk itself.

JAX 0.11 deprecates the Triton lowering (a DeprecationWarning when a kernel is lowered); `unsupported` says so in words
where it is gone.
"""

import jax
import jax.numpy as jnp

from lmscale.kernels.ssd.decay import chunk_decay

try:
  from lmscale.kernels.ssd import pallas_triton_forward as forward
  from lmscale.kernels.ssd import pallas_triton_tiles as tiles
except ImportError as error:
  MISSING = f'this JAX ({jax.__version__}) has no Pallas Triton lowering ({error})'
else:
  MISSING = None

STATE_ELEMENTS = 8192  # of one program's float32 state: half of the registers of its 128 threads
PROGRAMS = 132  # the multiprocessors of an H200: fewer programs than these leave some idle
SHORTEST_SEGMENT = 4  # chunks: a shorter segment would spend more on its first pass than it saves


def unsupported(x: jax.Array, B: jax.Array, chunk: int) -> str | None:
  """Why `ssd_pallas_triton` cannot take these arguments, in words, or None if it can."""
  if MISSING:
    return MISSING
  if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
    return f"x is {x.dtype}; the kernel has float32, bfloat16 and float16, 'xla' has the others"
  p, n = x.shape[3], B.shape[3]
  if p > 128 or n > 256:
    return f'head_dim {p} and state {n} are more than the 128 and 256 that fit on chip'
  if chunk not in (16, 32, 64, 128):
    return f'chunk {chunk} is not 16, 32, 64 or 128, the sizes that the tensor cores and the registers take'
  return None


def ssd_pallas_triton(
  x, dt, A, B, C, D, state, document, chunk, *, deterministic=True, interpret=False, segments=None, save_every=4
):
  """Shapes and dtypes as in `api`; y is in x.dtype.

  segments: parts of the sequence that are walked at once; None chooses from the number of programs.
  save_every: chunks between the states kept for the backward pass.
  """
  b, l, h, p = x.shape
  n = B.shape[3]
  parts = _parts(p, n)
  if segments is None:
    segments = _segments(b * h * parts, -(-l // chunk))
  plan = tiles.Plan(
    length=l, q=chunk, segments=segments, per_segment=-(-l // (chunk * segments)), save_every=save_every,
    deterministic=deterministic, interpret=interpret,
  )  # fmt: skip
  dt = jnp.pad(dt, ((0, 0), (0, plan.padded - l), (0, 0)))
  if document is not None:
    document = jnp.pad(document, ((0, 0), (0, plan.padded - l)), mode='edge')
  cs = chunk_decay(dt, A, document, chunk) * tiles.LOG2E
  dt, cs = (jnp.repeat(jnp.swapaxes(m, 1, 2), parts, axis=1) for m in (dt, cs))
  if D is not None:
    D = jnp.broadcast_to(D if D.ndim == 2 else D[:, None], (h, p)).reshape(h * parts, p // parts)
  x = x.reshape(b, l, h * parts, p // parts)
  state = jnp.swapaxes(state.reshape(b, h * parts, p // parts, n), 2, 3)
  y, state = _ssd(plan, x, dt, cs, B, C, D, state, document)
  return y.reshape(b, l, h, p), jnp.swapaxes(state, 2, 3).reshape(b, h, p, n)


def _parts(p, n):
  """Into how many parts a head is cut: the fewest equal ones whose state fits in the registers, or whose width is odd."""
  parts = 1
  while tiles.block(p // parts) * tiles.block(n) > STATE_ELEMENTS and (p // parts) % 2 == 0:
    parts *= 2
  return parts


def _segments(programs, chunks):
  """Enough segments to give every multiprocessor a program, none shorter than SHORTEST_SEGMENT."""
  return max(1, min(round(PROGRAMS / programs), chunks // SHORTEST_SEGMENT))


def _ssd(plan, x, dt, cs, B, C, D, state, document):
  """The kernels. x [b, l, h, p]; dt, cs [b, h, padded l]; B, C [b, l, g, n]; D [h, p]; state [b, h, n, p]."""
  start = _start_states(plan, x, dt, cs, B, state, document)
  out = forward.walk(plan, x, dt, cs, B, C, D, start, document, y=True)
  return out['y'], out['end'][:, -1]


def _start_states(plan, x, dt, cs, B, state, document):
  """[b, segments, h, n, p]: the state each segment starts from, the first from `state`."""
  if plan.segments == 1:
    return state[:, None]
  zero = jnp.zeros((state.shape[0], plan.segments, *state.shape[1:]), state.dtype)
  end = forward.walk(plan, x, dt, cs, B, None, None, zero, document, y=False)['end']
  return _carry(state, end, _through(plan, cs, document))


def _carry(state, end, through):
  """state_(s+1) = through_s state_s + end_s over axis 1; returns every state_s."""

  def step(state, segment):
    end, through = segment
    return through[..., None, None] * state + end, state

  _, states = jax.lax.scan(step, state, (jnp.moveaxis(end, 1, 0), jnp.moveaxis(through, 1, 0)))
  return jnp.moveaxis(states, 0, 1)


def _through(plan, cs, document):
  """[b, segments, h]: the decay of a state through each segment, 0 where its document ends within."""
  b, h, _ = cs.shape
  total = cs[..., plan.q - 1 :: plan.q].reshape(b, h, plan.segments, plan.per_segment).sum(-1)
  through = jnp.exp2(jnp.swapaxes(total, 1, 2))
  if document is None:
    return through
  length = plan.per_segment * plan.q
  last = document[:, length - 1 :: length]
  entering = jnp.pad(last[:, :-1], ((0, 0), (1, 0)))
  return jnp.where((entering == last)[..., None], through, 0)
