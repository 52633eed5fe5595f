"""The gradients that need both walks' states, for Hopper (Mosaic GPU): of B, C and of every token's decays.

A program owns one chunk of one group and loops over heads of that group; two compute warpgroups share the tiles that
a third streams in. With H the state that enters the chunk and G the gradient of the one that leaves it (arXiv
2405.21060, section 6, differentiated):

  warpgroup 0, rows i:   dM = dy x^T     dC += (dM decay dt) B + e (dy H)      de_i = <dy_i H, C_i>
  warpgroup 1, rows j:   dM^T = x dy^T   dB += (dM decay dt)^T C + w (x G)     dw_j = <x_j G, B_j>

and of Z_ij = dM_ij (C_i . B_j) decay_ij, again in warpgroup 1, the sums over i, and for every token m those of dt_j Z_ij
over j < m <= i.

dC and dB stay in registers until every head of the program is added: the sum over heads has one order, no atomics.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lmscale.kernels.ssd.mosaic.walk import (
  COLUMN,
  DT,
  MEMORY_REGISTERS,
  ROW,
  STAGES,
  TRANSFORMS,
  E,
  Q,
  W,
  columns,
  decay,
  load,
  rows,
  tile,
)

PROGRAMS = 132  # The multiprocessors of an H200: with fewer programs the heads of a group are split.

COLUMN_SUM, WITHIN, DE, DW, KEEP = range(5)  # The rows of the gradients of a token.


def split_heads(heads: int, programs: int) -> int:
  """Into how many parts the heads of a group go so that `programs` per part fill the GPU, each part equally large."""
  return next(s for s in range(1, heads + 1) if heads % s == 0 and (s * programs >= PROGRAMS or s == heads))


def outer(x, dy, B, C, v, start, H, G):
  """Launches the kernel.

  Args:
    x, dy: [b, l, h, p], 16 bit. B, C: [b, l, g, n] like x. v: [b, h, 6, l] float32. start: [b, l] int32 or None.
    H, G: [b, h, l / q, p, n] like x, the entering states of the forward and of the reverse walk.

  Returns:
    dB, dC [b, l, g, n] float32, and [b, h, 5, l] float32: of token j, sum_i Z_ij; of token m, the sum of dt_j Z_ij over
    j < m <= i; de; dw; and of the chunk's p-th token <G_p, H_p>, row p's part of the gradient of keep.
  """
  b, l, h, p = x.shape
  g, n = B.shape[2:]
  chunks = l // Q
  parts = split_heads(h // g, b * chunks * g)
  heads = h // g // parts
  narrow = jnp.bfloat16 if x.dtype.itemsize == 2 else x.dtype  # of Z: float16 would lose the strong decays

  def body(*refs):
    refs = iter(refs)
    x_g, dy_g, H_g, G_g, v_g, B_g, C_g, later_g = (next(refs) for _ in range(8))
    start_g = None if start is None else next(refs)
    dB_g, dC_g, dv_g, B_s, C_s, later_s, start_s, arrived = refs
    batch, chunk, part = lax.axis_index('batch'), lax.axis_index('chunks'), lax.axis_index('parts')
    group, first = part // parts, part * heads
    wg = lax.axis_index('wg')
    tokens = pl.ds(chunk * Q, Q)

    def side(first_s, second_s, state_s, row_s, column_s, v_s, transposed, carry, head=None):
      """One warpgroup's share of a head; if transposed, it stores the sums of Z. Returns the new carry and the sum of the
      state's term."""
      total, scores = carry
      differential = _product_transposed(first_s, second_s)
      differential *= decay(v_s, start_s, transposed=transposed, dt=False)
      dt = load(v_s.at[DT], ROW if transposed else COLUMN)
      weighted = differential * (rows if transposed else columns)(dt, (Q, Q))
      if transposed:  # before the large products, for the registers
        dv_g[batch, head, COLUMN_SUM, tokens] = (differential * scores).sum(axis=1)
        dv_g[batch, head, WITHIN, tokens] = _over_each((weighted * scores).astype(narrow), later_s)
      weighted = weighted.astype(x.dtype)

      def products(refs):
        total, through_state = refs
        plgpu.wgmma(total, weighted, column_s)
        plgpu.wgmma(through_state, first_s, state_s)

      zero = plgpu.layout_cast(jnp.zeros((Q, n), jnp.float32), plgpu.Layout.WGMMA)
      total, through_state = pl.run_state(products)((plgpu.ACC.init(total), plgpu.ACC.init(zero)))
      scale = load(v_s.at[W if transposed else E], ROW)
      along = (through_state * load(row_s, plgpu.Layout.WGMMA).astype(jnp.float32)).sum(axis=1)
      return (total + through_state * rows(scale, (Q, n)), scores), along

    def step(indices, x_s, dy_s, H_s, G_s, v_s, carry):
      head = first + indices[0]

      def queries(carry):
        carry, de = side(dy_s, x_s, H_s, C_s, B_s, v_s, False, carry)
        dv_g[batch, head, DE, tokens] = de
        return carry

      def keys(carry):
        carry, dw = side(x_s, dy_s, G_s, B_s, C_s, v_s, True, carry, head)
        dv_g[batch, head, DW, tokens] = dw
        enters, leaves = (load(m, plgpu.Layout.WGMMA).astype(jnp.float32) for m in (H_s, G_s))
        dv_g[batch, head, KEEP, tokens] = (enters * leaves).sum(axis=1)
        return carry

      return lax.cond(wg == 0, queries, keys, carry)

    def compute(pipeline):
      @pl.when(wg == 0)
      def _():
        for source, target in ((B_g, B_s), (C_g, C_s)):
          plgpu.copy_gmem_to_smem(source.at[batch, tokens, pl.ds(group * n, n)], target, arrived)
        plgpu.copy_gmem_to_smem(later_g, later_s, arrived)
        if start is not None:
          plgpu.copy_gmem_to_smem(start_g.at[batch, tokens], start_s, arrived)

      plgpu.barrier_wait(arrived)

      zero = plgpu.layout_cast(jnp.zeros((Q, n), jnp.float32), plgpu.Layout.WGMMA)
      scores = lax.cond(wg == 0, lambda: _product_transposed(C_s, B_s), lambda: _product_transposed(B_s, C_s))
      total, _ = pipeline((zero, scores))

      @pl.when(wg == 0)
      def _():
        dC_g[batch, part, tokens] = total

      @pl.when(wg == 1)
      def _():
        dB_g[batch, part, tokens] = total

    matrix = functools.partial(plgpu.BlockSpec, transforms=TRANSFORMS)
    token_spec = matrix((None, Q, p), lambda i: (batch, chunk, first + i))
    state_spec = matrix((None, None, None, p, n), lambda i: (batch, first + i, chunk, 0, 0))
    plgpu.emit_pipeline_warp_specialized(
      step,
      grid=(heads,),
      in_specs=[
        token_spec, token_spec, state_spec, state_spec,
        plgpu.BlockSpec((None, None, 6, Q), lambda i: (batch, first + i, 0, chunk)),
      ],
      max_concurrent_steps=min(STAGES, heads),
      num_compute_wgs=2,
      memory_registers=MEMORY_REGISTERS,
      wg_axis='wg',
      compute_context=compute,
    )(x_g, dy_g, H_g, G_g, v_g)  # fmt: skip

  total = jax.ShapeDtypeStruct((b, g * parts, l, n), jnp.float32)
  kernel = plgpu.kernel(
    body,
    out_type=(total, total, jax.ShapeDtypeStruct((b, h, 5, l), jnp.float32)),
    scratch_types=(
      tile((Q, n), x.dtype), tile((Q, n), x.dtype), tile((Q, Q), narrow),
      None if start is None else plgpu.SMEM((Q,), jnp.int32),
      plgpu.Barrier(num_arrivals=3 if start is None else 4),
    ),
    grid=(b, chunks, g * parts),
    grid_names=('batch', 'chunks', 'parts'),
    num_threads=3,
    thread_name='wg',
    kernel_name='ssd_mosaic_outer',
    compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
  )
  flat = [m.reshape(b, l, -1) for m in (x, dy, B, C)]
  optional = [] if start is None else [start]
  later = jnp.tril(jnp.ones((Q, Q), narrow))  # [i, m]: i >= m
  dB, dC, dv = kernel(*flat[:2], H, G, v, *flat[2:], later, *optional)
  dB, dC = (jnp.moveaxis(m.reshape(b, g, parts, l, n).sum(2), 1, 2) for m in (dB, dC))
  return dB, dC, dv


def _product_transposed(a, b):
  """a b^T of two references [q, k]."""

  def product(acc):
    plgpu.wgmma(acc, a, b.transpose((1, 0)))
    return acc[...]

  return pl.run_scoped(product, plgpu.ACC((Q, Q), jnp.float32))


def _over_each(z, later):
  """For every token m the sum of z [j, i] over j < m <= i."""

  def product(acc):
    plgpu.wgmma(acc, z, later)
    return acc[...]

  over = pl.run_scoped(product, plgpu.ACC((Q, Q), jnp.float32))
  row, column = (plgpu.broadcasted_iota(jnp.int32, (Q, Q), axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))
  return jnp.where(row < column, over, 0).sum(axis=0)
