"""The backward pass of the Triton SSD kernel, in two kernels.

With M, H and cs as in `forward`, G [n, p] the cotangent of the state that leaves a chunk, and
K_ji = (B_j . C_i) exp(cs_i - cs_j), so that M = K^T dt, the first kernel walks back over the chunks of a head:

  G   <- exp(cs_last) G + C^T (exp(cs) dy)

With every G and H in memory, the second takes the chunks in any order. A program does one chunk of one group, and one
of three things for all its heads:

  dx   = dt (K dy + exp(cs_last - cs) (B G)) + D dy
  Z_ji = (x_j . dy_i) K_ji,   u_j = exp(cs_last - cs_j) (B_j G . x_j)
  ddt  = rowsum Z + u
  da_m = sum_(j < m) dt_j (u_j + sum_(i >= m) Z_ji)

  dC_i = sum_h (sum_j dS_ij B_j + exp(cs_i) H dy_i),   dS_ij = (dy_i . x_j) exp(cs_i - cs_j) dt_j
  da_m += sum_(i >= m) exp(cs_i) (C_i H . dy_i)

  dB_j = sum_h (sum_i dS_ij C_i + exp(cs_last - cs_j) dt_j G x_j)
  da_m += exp(cs_last) (G . H)

a being the log decays, whose gradient is a sum of what reaches over a token, see `decay`. B and C being shared by the
heads of a group, B C^T is multiplied out once and dS summed over the heads first. No accumulator of a dot is transposed
into another: what is needed both ways is multiplied out both ways.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from lmscale.kernels.ssd import decay
from lmscale.kernels.ssd.triton import tiles
from lmscale.kernels.ssd.triton.tiles import Plan

PROGRAMS = 264  # two for every multiprocessor of an H200: with fewer, the heads of a group are shared out
SIDES = 3  # dx, dC and dB


def walk(plan: Plan, sums, C, dy, end, document, *, left: bool) -> dict[str, jax.Array]:
  """Walks every segment backwards from `end` [b, segments, h, n, p], the cotangent of its end state.

  The other arguments are as in the forward walk; dy is as x. Returns 'start' [b, segments, h, n, p], the cotangents
  of the start states, and if wanted 'left' [b, chunks, h, n, p] in dy.dtype, those of the states that leave a chunk.
  """
  b, _, h, p = dy.shape
  g, n = C.shape[2:]
  specs = tiles.head_specs(plan, h // g, n, p)
  inputs = {'high': sums[0], 'low': sums[1], 'C': C, 'dy': dy, 'end': end, 'document': document}
  outputs = {'start': jax.ShapeDtypeStruct(end.shape, end.dtype)}
  if left:
    outputs['left'] = jax.ShapeDtypeStruct((b, plan.chunks, h, n, p), dy.dtype)

  def ssd_backward_walk(inputs, outputs):
    _walk(plan, n, p, inputs, outputs)

  return tiles.call(ssd_backward_walk, plan, (h, plan.segments, b), inputs, outputs, specs, warps=4, stages=2)


def _walk(plan, n, p, inputs, outputs):
  """One program."""
  segment = tiles.program(1)

  def chunk(i, G):
    number = (segment + 1) * plan.per_segment - 1 - i
    start = number * plan.q
    dy, C = tiles.load_rows(inputs['dy'], start, plan, p), tiles.load_rows(inputs['C'], start, plan, n)
    decay = tiles.load_decay(inputs, start, plan)
    if 'left' in outputs:
      tiles.store_state(outputs['left'], G, number, n, p)
    weighted = (decay.from_state()[:, None] * dy).astype(dy.dtype)
    return decay.through() * G + tiles.dot(C, weighted, plan, G.dtype, trans_a=True)

  G = jax.lax.fori_loop(0, plan.per_segment, chunk, tiles.load_state(inputs['end'], segment, n, p))
  tiles.store_state(outputs['start'], G, segment, n, p)


def gradients(plan: Plan, x, dt, sums, B, C, D, states, left, dy, document) -> dict[str, jax.Array]:
  """'dx', 'ddt', 'da' [b, padded l, h] (of the natural log decays), 'dB', 'dC' and, with D, 'dD' [h, p].

  `states` [b, chunks, h, n, p] entered the chunks, `left` is that of `walk`; the rest is as in the forward walk.
  """
  b, l, h, p = x.shape
  g, n = B.shape[2:]
  parts = _parts(h // g, SIDES * b * g * plan.chunks)
  heads = h // g // parts
  inputs = {'x': x, 'dt': dt, 'high': sums[0], 'low': sums[1], 'B': B, 'C': C, 'D': D, 'states': states, 'left': left,
            'dy': dy, 'document': document}  # fmt: skip
  outputs = {'dx': jax.ShapeDtypeStruct(x.shape, x.dtype)}
  outputs['ddt'] = outputs['within'] = outputs['arrives'] = outputs['leaves'] = jax.ShapeDtypeStruct(dt.shape, dt.dtype)
  outputs['through'] = jax.ShapeDtypeStruct((b, h, plan.chunks), dt.dtype)
  if D is not None:
    outputs['dD'] = jax.ShapeDtypeStruct((b, plan.chunks, h, p), dt.dtype)
  if parts > 1 and not plan.deterministic:
    sums, added = jax.ShapeDtypeStruct((1, b, plan.padded, g, tiles.block(n)), dt.dtype), ('dB', 'dC')
  else:
    sums, added = jax.ShapeDtypeStruct((parts, b, l, g, n), B.dtype if parts == 1 else dt.dtype), ()
  outputs['dB'] = outputs['dC'] = sums
  specs = tiles.group_specs(plan, g, heads, parts, sums.shape[0], SIDES, n, p)

  def ssd_backward_chunk(inputs, outputs):
    _chunk(plan, n, p, heads, inputs, outputs, bool(added))

  grid = SIDES * parts, plan.chunks, b * g
  # Two programs share a multiprocessor's 227 KB: with three stages they would not.
  out = tiles.call(ssd_backward_chunk, plan, grid, inputs, outputs, specs, warps=4, stages=2, added=added)
  arrives = out['arrives'].reshape(b, h, plan.chunks, plan.q).at[..., -1].add(out['through'])
  within, leaves, arrives = (
    jnp.moveaxis(m.reshape(arrives.shape), 1, 3) for m in (out['within'], out['leaves'], arrives)
  )
  da = (within + decay.gradient(arrives, leaves)).reshape(b, plan.padded, h)
  gradients = {'dx': out['dx'], 'ddt': out['ddt'], 'da': da}
  gradients |= {name: out[name].sum(axis=0)[:, :l, :, :n].astype(B.dtype) for name in ('dB', 'dC')}
  return gradients | {'dD': None if D is None else out['dD'].sum(axis=(0, 1))}


def _parts(heads, programs):
  """The fewest equal parts of a group's heads that make enough programs."""
  return next(d for d in range(1, heads + 1) if heads % d == 0 and (d * programs >= PROGRAMS or d == heads))


def _chunk(plan, n, p, heads, inputs, outputs, add):
  """One program: neighbours take the three sides of the same chunk, so that what they share comes from memory once."""
  number = tiles.program(1)
  start = number * plan.q
  acc, dtype = inputs['dt'].dtype, inputs['x'].dtype
  narrow = jnp.bfloat16 if dtype.itemsize == 2 else dtype  # float16 would lose the strong decays
  dot = functools.partial(tiles.dot, plan=plan, acc=acc)

  def load(r):
    """x, dy, dt and the decay of head r."""
    x, dy = (tiles.load_rows(inputs[name], start, plan, p, head=r) for name in ('x', 'dy'))
    dt = tiles.load_vector(inputs['dt'], start, plan, head=r)
    return x, dy, dt, tiles.load_decay(inputs, start, plan, head=r)

  def parts(Z):
    """Z as a sum of what the tensor cores take. One bfloat16 would be coarser than what x and dy make of it."""
    if narrow != jnp.bfloat16:
      return (Z,)
    high = Z.astype(narrow)
    return high, (Z - high.astype(acc)).astype(narrow)

  def load_group(name):
    return tiles.load_rows(inputs[name], start, plan, n)

  def load_state(name, r):
    return tiles.load_state(inputs[name], (number, r), n, p).astype(dtype)

  def store_sum(name, value):
    """dB or dC of this program's heads: in a place of its own, or added to that of all parts."""
    if add:
      tiles.add_rows(outputs[name], value, start, plan)
    else:
      tiles.store_rows(outputs[name], value, start, plan, n)

  def sum_over_heads(head):
    """head(r) -> (a term of dS, a term through the state); returns their sums."""

    def add(r, sums):
      return tuple(total + term for total, term in zip(sums, head(r), strict=True))

    sums = jnp.zeros((plan.q, plan.q), acc), jnp.zeros((plan.q, tiles.block(n)), acc)
    return jax.lax.fori_loop(0, heads, add, sums)

  def dx_side():
    B = load_group('B')
    scores = dot(B, load_group('C'), trans_b=True)
    row, column = (lax.broadcasted_iota(jnp.int32, (plan.q, plan.q), axis) for axis in (0, 1))
    earlier, later = row < column, (row >= column).astype(narrow)

    def head(r, carry):
      x, dy, dt, decay = load(r)
      K = scores * decay.between(later_axis=1)
      from_G = decay.to_end()[:, None] * dot(B, load_state('left', r))
      u = jnp.sum(from_G * x.astype(acc), axis=1)
      dx = dt[:, None] * (dot(K.astype(dtype), dy) + from_G)
      if 'D' in inputs:
        dx += tiles.load_row(inputs['D'], p, head=r) * dy.astype(acc)
        tiles.store_row(outputs['dD'], jnp.sum(x.astype(acc) * dy.astype(acc), axis=0), (number, r), p)
      tiles.store_rows(outputs['dx'], dx, start, plan, p, head=r)
      Z = K * dot(x, dy, trans_b=True)  # behind dx, for the registers
      given = jnp.sum(Z, axis=1)
      over = dt[:, None] * sum(dot(part, later) for part in parts(Z))  # [j, m]: over i >= m
      tiles.store_vector(outputs['within'], jnp.sum(jnp.where(earlier, over, 0), axis=0), start, plan, head=r)
      tiles.store_vector(outputs['ddt'], given + u, start, plan, head=r)
      tiles.store_vector(outputs['leaves'], dt * u, start, plan, head=r)
      return carry

    jax.lax.fori_loop(0, heads, head, 0)

  def dC_side():
    C = load_group('C')

    def head(r):
      x, dy, dt, decay = load(r)
      H, from_state = load_state('states', r), decay.from_state()
      from_H = from_state * jnp.sum(dot(C, H) * dy.astype(acc), axis=1)
      tiles.store_vector(outputs['arrives'], from_H, start, plan, head=r)
      dS = dot(dy, x, trans_b=True) * decay.between(later_axis=0) * dt[None, :]
      return dS, dot((from_state[:, None] * dy).astype(dtype), H, trans_b=True)

    dS, from_states = sum_over_heads(head)
    store_sum('dC', dot(dS.astype(dtype), load_group('B')) + from_states)

  def dB_side():
    def head(r):
      x, dy, dt, decay = load(r)
      H, G = load_state('states', r), load_state('left', r)
      tiles.store_scalar(outputs['through'], decay.through() * jnp.sum(G.astype(acc) * H.astype(acc)), (r, number))
      dS = dot(x, dy, trans_b=True) * decay.between(later_axis=1) * dt[:, None]
      return dS, dot(((decay.to_end() * dt)[:, None] * x).astype(dtype), G, trans_b=True)

    dS, from_states = sum_over_heads(head)
    store_sum('dB', dot(dS.astype(dtype), load_group('C')) + from_states)

  for side, run in enumerate((dx_side, dC_side, dB_side)):
    pl.when(pl.program_id(0) % SIDES == side)(run)
