"""The backward pass of the Triton SSD kernel, in two kernels.

With M, H and cs as in `pallas_triton_forward`, G [n, p] the cotangent of the state that leaves a chunk, and
K_ji = (B_j . C_i) exp(cs_i - cs_j), so that M = K^T dt,

  walk, from the last chunk to the first, for one head:
    dx   = dt (K dy + exp(cs_last - cs) (B G)) + D dy
    Z_ji = (x_j . dy_i) K_ji,   u_j = exp(cs_last - cs_j) (B_j G . x_j)
    ddt  = rowsum Z + u
    dcs  = colsum (dt Z) - dt ddt + exp(cs) (C H . dy),  and at the last token + sum(dt u) + exp(cs_last) (G . H)
    G   <- exp(cs_last) G + C^T (exp(cs) dy)
  then for one chunk of one group, over its heads:
    dC_i = sum_h (sum_j dS_ij B_j + exp(cs_i) H dy_i),   dS_ij = (dy_i . x_j) exp(cs_i - cs_j) dt_j
    dB_j = sum_h (sum_i dS_ij C_i + exp(cs_last - cs_j) dt_j G x_j)

The rows and columns of Z cancel in dcs, so both sums are of the same float32 numbers. B and C being shared by the
heads of a group, dS is summed over the heads first. No accumulator of a dot is transposed into another: what is
needed both ways is multiplied out both ways.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from lmscale.kernels.ssd import pallas_triton_tiles as tiles
from lmscale.kernels.ssd.pallas_triton_tiles import Plan

PROGRAMS = 264  # two for every multiprocessor of an H200: with fewer, the heads of a group are shared out


def walk(plan: Plan, x, dt, cs, B, C, D, states, dy, end, document, *, full: bool) -> dict[str, jax.Array]:
  """Walks every segment backwards from the cotangent of its end state.

  Args:
    x, dy: [b, l, h, p]. dt, cs, B, C, D, document: as in the forward walk.
    states: [b, chunks, h, n, p], what entered each chunk. end: [b, segments, h, n, p].
    full: False for 'start' alone.

  Returns:
    'start' [b, segments, h, n, p], the cotangents of the start states; 'dx'; 'ddt' and 'dcs' [b, h, padded l] (dcs
    of the natural logarithm); 'dD' [b, segments, h, p] or absent; 'left' [b, chunks, h, n, p], the cotangent of the
    state that leaves each chunk.
  """
  b, _, h, p = x.shape
  g, n = B.shape[2:]
  specs = tiles.head_specs(plan, h // g, n, p)
  inputs = {'cs': cs, 'C': C, 'dy': dy, 'end': end, 'document': document}
  outputs = {'start': jax.ShapeDtypeStruct(end.shape, end.dtype)}
  if full:
    inputs |= {'x': x, 'dt': dt, 'B': B, 'D': D, 'states': states}
    outputs |= {'dx': jax.ShapeDtypeStruct(x.shape, x.dtype), 'left': states,
                'ddt': jax.ShapeDtypeStruct(dt.shape, dt.dtype), 'dcs': jax.ShapeDtypeStruct(cs.shape, cs.dtype)}  # fmt: skip
    if D is not None:
      outputs['dD'] = jax.ShapeDtypeStruct((b, plan.segments, h, p), D.dtype)

  def ssd_backward_walk(inputs, outputs):
    _walk(plan, n, p, inputs, outputs)

  return tiles.call(ssd_backward_walk, plan, (h, plan.segments, b), inputs, outputs, specs, warps=4, stages=2)


def _walk(plan, n, p, inputs, outputs):
  """One program."""
  acc, dtype = inputs['cs'].dtype, inputs['dy'].dtype
  dot = functools.partial(tiles.dot, acc=acc)
  segment = tiles.program(1)

  def chunk(i, carry):
    G, dD = carry
    number = (segment + 1) * plan.per_segment - 1 - i
    start = number * plan.q
    dy, C = tiles.load_rows(inputs['dy'], start, plan, p), tiles.load_rows(inputs['C'], start, plan, n)
    decay = tiles.load_decay(inputs['cs'], inputs['document'], start, plan)
    if 'dx' in outputs:
      x = tiles.load_rows(inputs['x'], start, plan, p)
      tiles.store_state(outputs['left'], G, number, n, p)
      dx, dcs, ddt = _chunk_gradients(plan, n, p, inputs, number, decay, x, dy, C, G)
      if dD is not None:
        dx += tiles.load_row(inputs['D'], p) * dy.astype(acc)
        dD += jnp.sum(x.astype(acc) * dy.astype(acc), axis=0)
      tiles.store_rows(outputs['dx'], dx, start, plan, p)
      tiles.store_vector(outputs['ddt'], ddt, start, plan)
      tiles.store_vector(outputs['dcs'], dcs, start, plan)
    weighted = (decay.from_state()[:, None] * dy).astype(dtype)
    return decay.through() * G + dot(C, weighted, trans_a=True), dD

  dD = jnp.zeros(tiles.block(p), acc) if 'dD' in outputs else None
  G = tiles.load_state(inputs['end'], segment, n, p)
  G, dD = jax.lax.fori_loop(0, plan.per_segment, chunk, (G, dD))
  tiles.store_state(outputs['start'], G, segment, n, p)
  if dD is not None:
    tiles.store_row(outputs['dD'], dD, segment, p)


def _chunk_gradients(plan, n, p, inputs, number, decay, x, dy, C, G):
  """dx without the D skip, dcs and ddt of one chunk."""
  acc, dtype, start = G.dtype, x.dtype, number * plan.q
  dot = functools.partial(tiles.dot, acc=acc)
  B, dt = tiles.load_rows(inputs['B'], start, plan, n), tiles.load_vector(inputs['dt'], start, plan)
  H = tiles.load_state(inputs['states'], number, n, p)
  K = dot(B, C, trans_b=True) * decay.between(later_axis=1)
  Z = K * dot(x, dy, trans_b=True)
  to_end, from_state = decay.to_end(), decay.from_state()
  BG = dot(B, G.astype(dtype))
  dx = dt[:, None] * (dot(K.astype(dtype), dy) + to_end[:, None] * BG)
  u = to_end * jnp.sum(BG * x.astype(acc), axis=1)
  ddt = jnp.sum(Z, axis=1) + u
  from_H = from_state * jnp.sum(dot(C, H.astype(dtype)) * dy.astype(acc), axis=1)
  dcs = jnp.sum(dt[:, None] * Z, axis=0) - dt * ddt + from_H
  at_end = jnp.sum(dt * u) + decay.through() * jnp.sum(G * H.astype(acc))
  return dx, dcs + jnp.where(lax.iota(jnp.int32, plan.q) == plan.q - 1, at_end, 0), ddt


def group_gradients(plan: Plan, x, dt, cs, B, C, states, left, dy, document) -> tuple[jax.Array, jax.Array]:
  """dB and dC [b, l, g, n] in B.dtype. `states` and `left` are those of `walk`."""
  b, l, h, p = x.shape
  g, n = B.shape[2:]
  parts = _parts(h // g, 2 * b * g * plan.chunks)
  heads = h // g // parts
  specs = tiles.group_specs(plan, g, heads, parts, n, p)
  inputs = {'x': x, 'dt': dt, 'cs': cs, 'B': B, 'C': C, 'states': states, 'left': left, 'dy': dy,
            'document': document}  # fmt: skip
  shape = jax.ShapeDtypeStruct((parts, b, l, g, n), B.dtype if parts == 1 else dt.dtype)

  def ssd_backward_group(inputs, outputs):
    _group(plan, n, p, heads, inputs, outputs)

  out = tiles.call(ssd_backward_group, plan, (2 * parts, plan.chunks, b * g), inputs, {'dB': shape, 'dC': shape}, specs,
                   warps=4, stages=2)  # fmt: skip
  return tuple(out[name].sum(axis=0).astype(B.dtype) for name in ('dB', 'dC'))


def _parts(heads, programs):
  """The fewest equal parts of a group's heads that make enough programs."""
  return next(d for d in range(1, heads + 1) if heads % d == 0 and (d * programs >= PROGRAMS or d == heads))


def _group(plan, n, p, heads, inputs, outputs):
  """One program: neighbours take dC and dB of the same chunk, so that x and dy come from memory once."""
  side, number = pl.program_id(0) % 2, tiles.program(1)
  dtype, start = inputs['x'].dtype, number * plan.q

  def gradient(later_axis, left, right, states, other):
    """dC has the later tokens as rows (axis 0), dB as columns; left are the rows' arrays, right the columns'."""
    acc = inputs['dt'].dtype
    dot = functools.partial(tiles.dot, acc=acc)

    def head(r, sums):
      dS, sum_state = sums
      rows, columns = (tiles.load_rows(inputs[name], start, plan, p, head=r) for name in (left, right))
      decay = tiles.load_decay(inputs['cs'], inputs['document'], start, plan, head=r)
      dt = tiles.load_vector(inputs['dt'], start, plan, head=r)
      dS += dot(rows, columns, trans_b=True) * decay.between(later_axis) * jnp.expand_dims(dt, later_axis)
      weight = decay.from_state() if later_axis == 0 else decay.to_end() * dt
      state = tiles.load_state(inputs[states], (number, r), n, p)
      weighted = (weight[:, None] * rows).astype(dtype)
      return dS, sum_state + dot(weighted, state.astype(dtype), trans_b=True)

    sums = jnp.zeros((plan.q, plan.q), acc), jnp.zeros((plan.q, tiles.block(n)), acc)
    dS, sum_state = jax.lax.fori_loop(0, heads, head, sums)
    return sum_state + dot(dS.astype(dtype), tiles.load_rows(inputs[other], start, plan, n))

  @pl.when(side == 0)
  def _():
    tiles.store_rows(outputs['dC'], gradient(0, 'dy', 'x', 'states', 'B'), start, plan, n)

  @pl.when(side == 1)
  def _():
    tiles.store_rows(outputs['dB'], gradient(1, 'x', 'dy', 'left', 'C'), start, plan, n)
