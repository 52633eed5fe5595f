"""The walk: one pass over the chunks of a head with the state in registers, for Hopper (Mosaic GPU).

A program owns R heads of one group, one compute warpgroup each; a further warpgroup streams tiles through shared
memory by TMA. It is the forward pass and, with time reversed, the gradient of x:

  out_i  = scale_i State r_i + sum_j mix_ij x_j + D x_i    mix_ij = (r_i . c_j) decay_ij, j <= i (reverse: j >= i)
  State <- keep State + sum_j weight_j x_j c_j^T

              x    r   c   scale  weight  out   State, [p, n]
  forward     x    C   B   e      w       y     h
  reverse     dy   B   C   w      e       dx    the gradient of h

with e, w and keep = e_last from `entry.vectors`. Tokens of other documents have e = 0, w = 0 and no decay_ij.
The state that enters a chunk is rounded to 16 bit for its matmul, and saved so if asked.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Q = 64  # Tokens per chunk: what one wgmma takes, and with q = 128 the kernels spill.
STAGES = 2
MEMORY_REGISTERS = 32

HIGH, LOW, LOW_DT, DT, E, W = range(6)  # The rows of `vectors`.


def tile(shape: tuple[int, ...], dtype):
  """Shared memory for 16-bit matrices in the layout that TMA and wgmma share."""
  return plgpu.SMEM(shape, dtype, transforms=TRANSFORMS)


TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
ROW, COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

_LOAD_WANTS_INDEX = inspect.signature(plgpu.load).parameters['idx'].default is inspect.Parameter.empty


def load(ref, layout, optimized: bool = True) -> jax.Array:
  """plgpu.load, which needs an index in JAX 0.10 and takes none in 0.11."""
  index = ((),) if _LOAD_WANTS_INDEX else ()
  return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def rows(vector, shape):
  """vector_i at [i, j]."""
  return lax.broadcast_in_dim(vector, shape, (0,))


def columns(vector, shape):
  """vector_j at [i, j]."""
  return lax.broadcast_in_dim(vector, shape, (1,))


def decay(v, start, *, transposed: bool, dt: bool = True):
  """exp(cs_i - cs_j) dt_j at [i, j], or at [j, i] if transposed, for j <= i of one document; else 0.

  dt: False leaves the factor dt_j out.

  v: a reference [6, q], the rows of `vectors`. start: a reference [q], see `entry.starts`, or None. The mask
  comes before the exponential, whose argument is thus never above log dt, up to rounding.
  """
  shape = (Q, Q)
  row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
  column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
  earlier = (HIGH, LOW_DT if dt else LOW)
  if transposed:
    high, low = (
      columns(load(v.at[i], COLUMN), shape) - rows(load(v.at[j], ROW), shape)
      for i, j in zip((HIGH, LOW), earlier, strict=True)
    )
    visible = column >= row
    if start is not None:
      visible &= columns(load(start, COLUMN), shape) <= row
  else:
    high, low = (
      rows(load(v.at[i], ROW), shape) - columns(load(v.at[j], COLUMN), shape)
      for i, j in zip((HIGH, LOW), earlier, strict=True)
    )
    visible = row >= column
    if start is not None:
      visible &= rows(load(start, ROW), shape) <= column
  return jnp.exp2(jnp.where(visible, high + low, -jnp.inf))


def walk(x, r, c, v, start, D, state, *, reverse: bool, save: bool):
  """Launches the walk.

  Args:
    x: [b, l, h, p], 16 bit. r, c: [b, l, g, n] like x. v: [b, h, 6, l] float32. start: [b, l] int32 or None.
    D: [h, p] float32 or None. state: [b, h, p, n] float32, before the first chunk of the walk.
    reverse: from the last chunk to the first, with the decays transposed. save: also return the entering states.

  Returns:
    out like x; the state after the last chunk; the state that enters each chunk, [b, h, l / q, p, n] in x.dtype, or
    None.
  """
  b, l, h, p = x.shape
  g, n = r.shape[2:]
  heads = 2 if h // g % 2 == 0 else 1
  dtype, chunks = x.dtype, l // Q
  scale_row, weight_row = (W, E) if reverse else (E, W)

  def body(*refs):
    refs = iter(refs)
    x_g, r_g, c_g, v_g = (next(refs) for _ in range(4))
    start_g = None if start is None else next(refs)
    D_g = None if D is None else next(refs)
    state_g, out_g, final_g = (next(refs) for _ in range(3))
    saved_g = next(refs) if save else None
    state_s, tile_s, D_s, D_arrived = refs
    batch, block = lax.axis_index('batch'), lax.axis_index('heads')
    group = block * heads // (h // g)
    wg = lax.axis_index('wg')
    head = block * heads + wg

    def chunk_of(step):
      return chunks - 1 - step if reverse else step

    def compute(pipeline):
      if D is not None:
        plgpu.copy_gmem_to_smem(D_g.at[head], D_s.at[wg], D_arrived.at[wg])
        plgpu.barrier_wait(D_arrived.at[wg])
      final = pipeline(load(state_g.at[batch, head], plgpu.Layout.WGMMA, optimized=False))
      final_g[batch, head] = final
      plgpu.wait_smem_to_gmem(0)

    def step(indices, x_s, r_s, c_s, v_s, *rest):
      start_s, state = rest if start is not None else (None, *rest)
      chunk = chunk_of(indices[0])
      mine, v_w = (slice(None), pl.ds(wg * p, p)), v_s.at[wg]
      state_w, tile_w = state_s.at[wg], tile_s.at[wg]
      # The copies of the step before have left these buffers.
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      state_w[...] = state.astype(dtype)
      x_f = load(x_s.at[mine], plgpu.Layout.WGMMA).astype(jnp.float32)
      tile_w[...] = (x_f * rows(load(v_w.at[weight_row], ROW), (Q, p))).astype(dtype)
      plgpu.commit_smem()
      if save:
        plgpu.copy_smem_to_gmem(state_w, saved_g.at[batch, head, chunk])

      def products(scores, out):
        plgpu.wgmma(scores, r_s, c_s.transpose((1, 0)))
        plgpu.wgmma(out, r_s, state_w.transpose((1, 0)))
        return scores[...], out[...]

      scores, out = pl.run_scoped(products, plgpu.ACC((Q, Q), jnp.float32), plgpu.ACC((Q, p), jnp.float32))
      mix = (scores * decay(v_w, start_s, transposed=reverse)).astype(dtype)
      out *= rows(load(v_w.at[scale_row], ROW), (Q, p))
      if D is not None:
        x_f = load(x_s.at[mine], plgpu.Layout.WGMMA).astype(jnp.float32)
        out += x_f * columns(load(D_s.at[wg], COLUMN), (Q, p))
      state *= v_w[E, Q - 1]

      def accumulate(refs):
        out, state = refs
        plgpu.wgmma(out, mix, x_s.at[mine])
        plgpu.wgmma(state, tile_w.transpose((1, 0)), c_s)

      out, state = pl.run_state(accumulate)((plgpu.ACC.init(out), plgpu.ACC.init(state)))
      tile_w[...] = out.astype(dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(tile_w, out_g.at[batch, pl.ds(chunk * Q, Q), pl.ds(head * p, p)])
      return state

    matrix = functools.partial(plgpu.BlockSpec, transforms=TRANSFORMS)
    specs = [
      matrix((None, Q, heads * p), lambda i: (batch, chunk_of(i), block)),
      matrix((None, Q, n), lambda i: (batch, chunk_of(i), group)),
      matrix((None, Q, n), lambda i: (batch, chunk_of(i), group)),
      plgpu.BlockSpec((None, heads, 6, Q), lambda i: (batch, block, 0, chunk_of(i))),
    ]
    inputs = [x_g, r_g, c_g, v_g]
    if start is not None:
      specs.append(plgpu.BlockSpec((None, Q), lambda i: (batch, chunk_of(i))))
      inputs.append(start_g)
    plgpu.emit_pipeline_warp_specialized(
      step,
      grid=(chunks,),
      in_specs=specs,
      max_concurrent_steps=min(STAGES, chunks),
      num_compute_wgs=heads,
      memory_registers=MEMORY_REGISTERS,
      wg_axis='wg',
      compute_context=compute,
    )(*inputs)

  out_type = [jax.ShapeDtypeStruct((b, l, h * p), dtype), jax.ShapeDtypeStruct(state.shape, jnp.float32)]
  if save:
    out_type.append(jax.ShapeDtypeStruct((b, h, chunks, p, n), dtype))
  kernel = plgpu.kernel(
    body,
    out_type=tuple(out_type),
    scratch_types=(
      tile((heads, p, n), dtype), tile((heads, Q, p), dtype),
      *((None, None) if D is None else (plgpu.SMEM((heads, p), jnp.float32), plgpu.Barrier(num_barriers=heads))),
    ),
    grid=(b, h // heads),
    grid_names=('batch', 'heads'),
    num_threads=heads + 1,
    thread_name='wg',
    kernel_name='ssd_mosaic_walk_reverse' if reverse else 'ssd_mosaic_walk',
    compiler_params=plgpu.CompilerParams(
      approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
  )
  flat = [m.reshape(b, l, -1) for m in (x, r, c)]
  optional = [m for m in (start, D) if m is not None]
  out, final, *saved = kernel(*flat, v, *optional, state)
  return out.reshape(x.shape), final, saved[0] if save else None
