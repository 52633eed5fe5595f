"""The forward walk of the Triton SSD kernel: one pass over memory with the state on chip.

A program takes one segment of the sequence for one head and walks its chunks; neighbouring programs are heads of one
group, so B and C come from memory once per group and from the L2 cache after that. With cs the running sum of the log
decays within a chunk (in two parts, see `decay`), and H [n, p] the (transposed) state that enters it,

  M_ij = (C_i . B_j) exp(cs_i - cs_j) dt_j     for i >= j
  y    = M x + exp(cs) (C H) + D x
  H   <- exp(cs_last) H + B^T (exp(cs_last - cs) dt x)

(arXiv 2405.21060, section 6). Only what is wanted is computed and stored.
"""

import functools

import jax

from lmscale.kernels.ssd.triton import tiles
from lmscale.kernels.ssd.triton.tiles import Plan


def walk(plan: Plan, x, dt, sums, B, C, D, start, document, *, y=False, end=False, saved=None) -> dict[str, jax.Array]:
  """Walks every segment from its own start state.

  Args:
    x: [b, l, h, p]. dt and sums, the pair (high, low) of `decay.running` in base 2: [b, h, padded l].
    B, C: [b, l, g, n]. D: [h, p] or None.
    start: [b, segments, h, n, p]. document: [b, padded l] or None.
    y, end, saved: what is wanted; saved is the dtype of the states to keep, None for none.

  Returns:
    'y' [b, l, h, p] in x.dtype; 'end' [b, segments, h, n, p], the state after each segment; 'saved'
    [b, chunks / save_every, h, n, p], the state that enters every save_every-th chunk.
  """
  b, _, h, p = x.shape
  g, n = B.shape[2:]
  specs = tiles.head_specs(plan, h // g, n, p)
  inputs = {'x': x, 'dt': dt, 'high': sums[0], 'low': sums[1], 'B': B, 'C': C if y else None,
            'D': D if y else None, 'start': start, 'document': document}  # fmt: skip
  outputs = {}
  if y:
    outputs['y'] = jax.ShapeDtypeStruct(x.shape, x.dtype)
  if end:
    outputs['end'] = jax.ShapeDtypeStruct(start.shape, dt.dtype)
  if saved is not None:
    outputs['saved'] = jax.ShapeDtypeStruct((b, plan.chunks // plan.save_every, h, n, p), saved)

  def ssd_forward(inputs, outputs):
    _forward(plan, n, p, inputs, outputs)

  return tiles.call(ssd_forward, plan, (h, plan.segments, b), inputs, outputs, specs, warps=4, stages=2)


def _forward(plan, n, p, inputs, outputs):
  """One program."""
  acc, dtype = inputs['dt'].dtype, inputs['x'].dtype
  dot = functools.partial(tiles.dot, plan=plan, acc=acc)
  segment = tiles.program(1)

  def chunk(i, state):
    number = segment * plan.per_segment + i
    start = number * plan.q
    if 'saved' in outputs:
      tiles.store_state(outputs['saved'], state, number // plan.save_every, n, p, when=number % plan.save_every == 0)
    x, B = tiles.load_rows(inputs['x'], start, plan, p), tiles.load_rows(inputs['B'], start, plan, n)
    dt = tiles.load_vector(inputs['dt'], start, plan)
    decay = tiles.load_decay(inputs, start, plan)
    # This order, and that of the terms of y, spill the fewest registers.
    weighted = ((decay.to_end() * dt)[:, None] * x).astype(dtype)
    if 'y' in outputs:
      C = tiles.load_rows(inputs['C'], start, plan, n)
      y = decay.from_state()[:, None] * dot(C, state.astype(dtype))
      if 'D' in inputs:
        y += tiles.load_row(inputs['D'], p) * x.astype(acc)
      mix = dot(C, B, trans_b=True) * decay.between(later_axis=0) * dt[None, :]
      y += dot(mix.astype(dtype), x)
      tiles.store_rows(outputs['y'], y, start, plan, p)
    return decay.through() * state + dot(B, weighted, trans_a=True)

  state = tiles.load_state(inputs['start'], segment, n, p).astype(acc)
  state = jax.lax.fori_loop(0, plan.per_segment, chunk, state)
  if 'end' in outputs:
    tiles.store_state(outputs['end'], state, segment, n, p)
