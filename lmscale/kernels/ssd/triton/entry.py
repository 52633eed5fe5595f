"""SSD on NVIDIA GPUs: Pallas kernels lowered through Triton. This file is the entry, the layout and the derivative.

Around the kernels, XLA pads the small arrays (dt, the sums of the log decays, document) to whole chunks and puts them
head-major; x, B, C and y are read and written where they are. A head whose state is too large for the registers of a
program becomes two or more, each with a part of head_dim: heads of one group, so the kernels need not know.

Where there are too few heads and rows to fill the GPU, the sequence is walked in segments at once: a first pass gives
each segment's end state from a zero start, a scan over the segments gives the states they really start from, and the
second pass is the walk itself.

JAX 0.11 deprecates the Triton lowering (a DeprecationWarning when a kernel is lowered); `unsupported` says so in words
where it is gone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from lmscale.kernels.ssd import decay

try:
  from lmscale.kernels.ssd.triton import backward, forward, tiles
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
    return f'x is {x.dtype}; the kernel has float32, bfloat16 and float16'
  p, n = x.shape[3], B.shape[3]
  if p > 128 or n > 256:
    return f'head_dim {p} and state {n} are more than the 128 and 256 that fit on chip'
  if chunk not in (16, 32, 64, 128):
    return f'chunk {chunk} is not 16, 32, 64 or 128, the sizes that the tensor cores and the registers take'
  return None


def ssd_pallas_triton(
  x, dt, A, B, C, D, state, document, chunk, *, deterministic=True, interpret=False, segments=None, save_every=8
):
  """Shapes and dtypes as in `api`; y is in x.dtype.

  segments: parts of the sequence that are walked at once; None chooses from the number of programs.
  save_every: chunks between the states kept for the backward pass.
  """
  b, l, h, p = x.shape
  n = B.shape[3]
  parts = _parts(p, n)
  plan = _plan(l, chunk, segments or _segments(b * h * parts, -(-l // chunk)), save_every, deterministic, interpret)
  dt = jnp.pad(dt, ((0, 0), (0, plan.padded - l), (0, 0)))
  if document is not None:
    document = jnp.pad(document, ((0, 0), (0, plan.padded - l)), mode='edge')
  dt, a = (jnp.repeat(m, parts, axis=2) for m in (dt, decay.log_decay(dt, A)))
  if D is not None:
    D = jnp.broadcast_to(D if D.ndim == 2 else D[:, None], (h, p)).reshape(h * parts, p // parts)
  x = x.reshape(b, l, h * parts, p // parts)
  state = jnp.swapaxes(state.reshape(b, h * parts, p // parts, n), 2, 3)
  y, state = _ssd(plan, x, jnp.swapaxes(dt, 1, 2), a, B, C, D, state, document)
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


def _plan(length, q, segments, save_every, deterministic, interpret):
  """Segments of equal length, in chunks a multiple of save_every."""
  per_segment = -(-length // (q * segments))
  save_every = min(save_every, per_segment)
  per_segment = -(-per_segment // save_every) * save_every
  return tiles.Plan(length, q, segments, per_segment, save_every, deterministic, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ssd(plan, x, dt, a, B, C, D, state, document):
  """The kernels. x [b, l, h, p]; dt [b, h, padded l]; a [b, padded l, h], the log decays; B, C [b, l, g, n]; D [h, p];
  state [b, h, n, p]."""
  out, _ = _run(plan, x, dt, a, B, C, D, state, document)
  return out['y'], out['end'][:, -1]


def _sums(plan, a, document):
  """(high, low) of `decay.running` to base 2, [b, h, padded l]."""
  b, padded, h = a.shape
  chunks = (b, padded // plan.q, plan.q)
  sums = decay.running((a * decay.LOG2E).reshape(*chunks, h), None if document is None else document.reshape(chunks))
  return tuple(jnp.swapaxes(m.reshape(a.shape), 1, 2) for m in sums)


def _run(plan, x, dt, a, B, C, D, state, document, saved=None):
  sums = _sums(plan, a, document)
  start = state[:, None]
  if plan.segments > 1:
    zero = jnp.zeros((state.shape[0], plan.segments, *state.shape[1:]), state.dtype)
    end = forward.walk(plan, x, dt, sums, B, C, None, zero, document, end=True)['end']
    start = _carry(state, end, _through(plan, sums, document))
  return forward.walk(plan, x, dt, sums, B, C, D, start, document, y=True, end=True, saved=saved), sums


def _ssd_forward(plan, x, dt, a, B, C, D, state, document):
  # States in x.dtype: the dots read them so in any case, and bfloat16 gradients were no better from float32 states.
  out, sums = _run(plan, x, dt, a, B, C, D, state, document, saved=x.dtype)
  return (out['y'], out['end'][:, -1]), (x, dt, sums, B, C, D, out['saved'], document)


def _ssd_backward(plan, residuals, cotangents):
  x, dt, sums, B, C, D, states, document = residuals
  dy, dstate = cotangents
  if plan.save_every > 1:
    inner = dataclasses.replace(
      plan, segments=plan.chunks // plan.save_every, per_segment=plan.save_every, save_every=1)  # fmt: skip
    states = forward.walk(inner, x, dt, sums, B, None, None, states, document, saved=states.dtype)['saved']
  end = dstate[:, None]
  if plan.segments > 1:
    zero = jnp.zeros((dstate.shape[0], plan.segments, *dstate.shape[1:]), dstate.dtype)
    start = backward.walk(plan, sums, C, dy, zero, document, left=False)['start']
    end = _carry(dstate, start[:, ::-1], _through(plan, sums, document)[:, ::-1])[:, ::-1]
  walked = backward.walk(plan, sums, C, dy, end, document, left=True)
  out = backward.gradients(plan, x, dt, sums, B, C, D, states, walked['left'], dy, document)
  return *(out[name] for name in ('dx', 'ddt', 'da', 'dB', 'dC', 'dD')), walked['start'][:, 0], None


_ssd.defvjp(_ssd_forward, _ssd_backward)


def _carry(first, added, through):
  """s_(i+1) = through_i s_i + added_i along axis 1, from s_0 = first; returns every s_i but the last."""

  def step(state, segment):
    added, through = segment
    return through[..., None, None] * state + added, state

  _, states = jax.lax.scan(step, first, (jnp.moveaxis(added, 1, 0), jnp.moveaxis(through, 1, 0)))
  return jnp.moveaxis(states, 0, 1)


def _through(plan, sums, document):
  """[b, segments, h]: the decay of a state through each segment, 0 where its document ends within."""
  b, h, _ = sums[0].shape
  total = sum(m[..., plan.q - 1 :: plan.q] for m in sums).reshape(b, h, plan.segments, plan.per_segment).sum(-1)
  through = jnp.exp2(jnp.swapaxes(total, 1, 2))
  if document is None:
    return through
  length = plan.per_segment * plan.q
  last = document[:, length - 1 :: length]
  entering = jnp.pad(last[:, :-1], ((0, 0), (1, 0)))
  return jnp.where((entering == last)[..., None], through, 0)
