"""Chunked SSD: matmuls within a chunk, a state carried from chunk to chunk (arXiv 2405.21060, section 6).

With cs the running sum of the log decays a of a chunk (in two parts, see `decay`), L_ij = exp(cs_i - cs_j) for i >= j in
one document else 0, and H the state that enters:

  y_i  = sum_j L_ij (C_i . B_j) dt_j x_j + exp(cs_i) H C_i     the second term for tokens of H's document
  H   <- exp(cs_last) H + sum_j exp(cs_last - cs_j) dt_j x_j B_j^T     of the last token's document

Masks are applied before exp, so no exponent is above 0. Chunks are taken a few at a time (a block): their matmuls
are batched, then the state walks through them. What is kept for the backward pass is the inputs and the state at the
start of every block; the backward pass walks the blocks in reverse, computes a block again, and carries the
gradient G of the state. With S_ij = C_i . B_j, it is, dM_ij = dy_i . x_j:

  d(dt x)_j = sum_i L_ij S_ij dy_i + exp(cs_last - cs_j) G B_j        dS_ij = sum over a group's heads of dM_ij L_ij dt_j
  dC_i = sum_j dS_ij B_j + sum over heads of exp(cs_i) H^T dy_i        dB_j alike, from dS^T C and G^T x_j
  G   <- exp(cs_last) G + sum_i exp(cs_i) dy_i C_i^T

ddt from the same products, and the gradient of a_m from those that reach over token m, which no difference replaces:

  da_m = sum_(j<m<=i) Z_ij + sum_(i>=m) exp(cs_i) dy_i . H C_i + sum_(j<m) exp(cs_last - cs_j) dt_j x_j . G B_j
         + exp(cs_last) <H, G>                                     Z_ij = dM_ij L_ij S_ij dt_j

Layouts: heads are [groups g, heads per group r] and never merge with the batch, so
that the partitioner cuts them without communication. The rest is for XLA's CPU compiler: H is [b, g, n, r, p], so that all
heads of a group are one matmul and no large operand is transposed; einsums give batch dimensions first, else it swaps
the operands; in the backward pass the [q, q] matrices are transposed, [j, i]; sums of products are einsums, since it
vectorises those and not a fused multiply and reduce.

No array is indexed by a flat position: slices go along l in blocks, so sizes beyond 2^31 elements are XLA's business.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmscale.kernels import choice
from lmscale.kernels.ssd import decay

BLOCK_TOKENS = 256  # what is held at a time of [q, q] matrices and states
BLOCK_PAIRS = 4096  # on a CPU: of a head's [q, q] matrices, so that a block stays in the cache; measured
BLOCK_CHUNKS = 8  # their walk is unrolled
SPAN = 16  # tokens: a part of a chunk in `_over_each`


def default_chunk() -> int:
  """Tokens per chunk where the caller names none: measured on a CPU; elsewhere the width of a matrix unit."""
  return 32 if choice.backend() == 'cpu' else 128


def ssd_xla(x, dt, A, B, C, D, state, document, chunk):
  """Shapes and dtypes as in `api`. Differentiable once, in reverse: the backward pass has no derivative itself."""
  b, l, h, p = x.shape
  g, n = B.shape[2:]
  q = min(chunk, l)
  chunks = -(-l // q)
  blocks = -(-chunks // _most_chunks(q))
  blocks = max(blocks, min(chunks, 2))  # without a loop XLA fuses a block with what surrounds it: up to 1.8x slower
  k = -(-chunks // blocks)
  missing = blocks * k * q - l
  x, dt, B, C = (jnp.pad(m, ((0, 0), (0, missing)) + ((0, 0),) * (m.ndim - 2)) for m in (x, dt, B, C))
  if document is not None:
    document = jnp.pad(document, ((0, 0), (0, missing)), mode='edge')
  x, dt, a = (m.reshape(b, -1, q, g, h // g, *m.shape[3:]) for m in (x, dt, decay.log_decay(dt, A)))
  B, C = (m.reshape(b, -1, q, g, n) for m in (B, C))
  if D is not None:
    D = jnp.broadcast_to(D.reshape(h, -1), (h, p)).reshape(g, h // g, p)
  state = jnp.moveaxis(state.reshape(b, g, h // g, p, n), -1, 2)
  y, state = _walk(k, x, dt, a, B, C, D, state, _documents(document, q))
  return y.reshape(b, -1, h, p)[:, :l], jnp.moveaxis(state, 2, -1).reshape(b, h, p, n)


def _most_chunks(q):
  """The chunks of a block."""
  tokens = BLOCK_PAIRS // q if choice.backend() == 'cpu' else BLOCK_TOKENS
  return min(max(tokens // q, 1), BLOCK_CHUNKS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _walk(k, x, dt, a, B, C, D, state, documents):
  """(y as x, state [b, g, n, r, p]), k chunks at a time.

  x [b, c, q, g, r, p]; dt, a [b, c, q, g, r], a from `decay.log_decay`; B, C [b, c, q, g, n]; D [g, r, p].
  """
  y, state, _ = _forward(k, x, _scalars(dt, a, documents), B, C, D, state, documents, save=False)
  return y, state


def _walk_fwd(k, x, dt, a, B, C, D, state, documents):
  scalars = _scalars(dt, a, documents)
  y, state, starts = _forward(k, x, scalars, B, C, D, state, documents, save=True)
  return (y, state), (x, scalars, B, C, D, starts, documents)


class _Scalars(NamedTuple):
  """Numbers per token and head: dt and the two parts of `decay.running`, [b, c, q, g, r], and as copies with tokens
  last, [b, c, g, r, q]: XLA's CPU compiler vectorises no strided read within the loop."""

  dt: jax.Array
  high: jax.Array
  low: jax.Array
  dt_t: jax.Array
  high_t: jax.Array
  low_t: jax.Array


def _scalars(dt, a, documents):
  token_major = dt, *decay.running(a, None if documents is None else documents[0])
  return _Scalars(*token_major, *(jnp.moveaxis(m, 2, -1) for m in token_major))


def _forward(k, x, scalars, B, C, D, state, documents, save):
  blocks = x.shape[1] // k
  tokens = (x, scalars, B, C, documents)

  def body(i, carry):
    y, state, starts = carry
    if save:
      starts = jax.lax.dynamic_update_index_in_dim(starts, state, i, 0)
    y_i, state = _block(_cut(tokens, i, k), D, state)
    return _put(y, y_i, i), state, starts

  starts = jnp.zeros((blocks, *state.shape), state.dtype) if save else None
  return _loop(blocks, body, (jnp.zeros(x.shape, x.dtype), state, starts))


def _walk_bwd(k, saved, cotangents):
  x, scalars, B, C, D, starts, documents = saved
  dy, dstate = cotangents
  blocks = starts.shape[0]
  tokens = (x, scalars, B, C, documents, dy)

  def body(i, carry):
    i = blocks - 1 - i
    gradients, dD, dstate = carry
    start = jax.lax.dynamic_index_in_dim(starts, i, 0, keepdims=False)
    *cut, dy_i = _cut(tokens, i, k)
    parts, dD_i, dstate = _block_vjp(cut, D, start, dy_i, dstate)
    gradients = tuple(_put(whole, part, i) for whole, part in zip(gradients, parts, strict=True))
    return gradients, None if D is None else dD + dD_i, dstate

  s = scalars
  zeros = tuple(jnp.zeros(m.shape, m.dtype) for m in (x, B, C, s.dt, s.dt, s.dt, s.dt_t, s.dt_t))
  gradients, dD, dstate = _loop(blocks, body, (zeros, None if D is None else jnp.zeros_like(D), dstate))
  dx, dB, dC, ddt, arrives, leaves, ddt_t, within = gradients
  ddt += jnp.moveaxis(ddt_t, -1, 2)
  da = jnp.moveaxis(within, -1, 2) + decay.gradient(arrives, leaves)
  return dx, ddt, da, dB, dC, dD, dstate, None


_walk.defvjp(_walk_fwd, _walk_bwd)


def _loop(count, body, carry):
  return body(0, carry) if count == 1 else jax.lax.fori_loop(0, count, body, carry)


def _documents(document, q):
  """(document, that of the token before its chunk), both [b, c, q]."""
  if document is None:
    return None
  document = document.reshape(document.shape[0], -1, q)
  before = jnp.pad(document[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))
  return document, jnp.broadcast_to(before, document.shape)


def _cut(tokens, i, k):
  """Block i, k chunks, of arrays [b, c, ...]."""
  return jax.tree.map(lambda m: jax.lax.dynamic_slice_in_dim(m, i * k, k, 1), tokens)


def _put(whole, part, i):
  """`whole` [b, c, ...] with block i from `part` [b, k, ...]."""
  return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), i * part.shape[1], 1)


class _Masks(NamedTuple):
  """Which decays of a block exist, see the module's docstring; None: all."""

  visible: jax.Array  # [b or 1, k or 1, 1, 1, q, q] as [i, j]
  reached: jax.Array | None  # [b, k, q, 1, 1]: the token is of the entering state's document
  leaves: jax.Array | None  # [b, k, q, 1, 1]: it is of the leaving state's document
  kept: jax.Array | None  # [b, k, 1, 1]: both states are of one document


def _masks(documents, q):
  visible = jnp.tril(jnp.ones((q, q), bool))[None, None]
  if documents is None:
    return _Masks(visible[:, :, None, None], None, None, None)
  document, before = documents
  last = document[:, :, -1:]
  visible &= document[..., :, None] == document[..., None, :]
  reached, leaves = document == before, document == last
  return _Masks(
    visible[:, :, None, None], reached[..., None, None], leaves[..., None, None], (before == last)[:, :, -1:, None]
  )


def _decay(exponent, mask):
  return jnp.exp(exponent if mask is None else jnp.where(mask, exponent, -jnp.inf))


def _differences(high, low):
  """The log decay from token j to i, [..., i, j], see `decay`."""
  if choice.backend() != 'cpu':
    return (high[..., :, None] - high[..., None, :]) + (low[..., :, None] - low[..., None, :])
  # As a matmul of depth 4: what follows is then vectorised, the exponential above all, and takes a third of the time.
  one = jnp.ones_like(high)
  rows, columns = jnp.stack([high, -one, low, -one], axis=-1), jnp.stack([one, high, one, low], axis=-1)
  return jnp.einsum('...id,...jd->...ij', rows, columns, precision=jax.lax.Precision.HIGHEST)


def _to_end(high, low):
  return (high[:, :, -1:] - high) + (low[:, :, -1:] - low)


def _through(kept, update, state):
  """The states that enter each of a block's chunks, [b, k, g, n, r, p], and the one that leaves the last."""
  states = []
  for i in range(update.shape[1]):
    states.append(state)
    state = kept[:, i, :, None, :, None] * state + update[:, i]
  return jnp.stack(states, axis=1), state


def _block(tokens, D, state):
  """(y [b, k, q, g, r, p], the leaving state) of one block."""
  x, (dt, high, low, dt_t, high_t, low_t), B, C, documents = tokens
  q, dtype, acc = x.shape[2], x.dtype, state.dtype
  einsum = functools.partial(jnp.einsum, preferred_element_type=acc)
  masks = _masks(documents, q)
  total = high + low
  weight = _decay(_to_end(high, low), masks.leaves) * dt
  update = einsum('bkjgn,bkjgrp->bkgnrp', B, (weight[..., None] * x).astype(dtype))
  states, state = _through(_decay(total[:, :, -1], masks.kept), update, state)
  S = einsum('bkign,bkjgn->bkgij', C, B)
  L = _decay(_differences(high_t, low_t), masks.visible)
  M = (S[:, :, :, None] * L * dt_t[..., None, :]).astype(dtype)
  y = jnp.moveaxis(einsum('bkgrij,bkjgrp->bkgrip', M, x), 4, 2)
  y += _decay(total, masks.reached)[..., None] * jnp.swapaxes(einsum('bkign,bkgnrp->bkgirp', C, states.astype(dtype)), 2, 3)
  return y if D is None else y + D * x.astype(acc), state


def _over_each(Z):
  """For every token m the sum of Z [..., j, i] over j < m <= i, [..., q]: what reaches over it. No term is taken off."""
  q = Z.shape[-1]
  s = SPAN if q % SPAN == 0 else q
  ones = jnp.ones((q, q), Z.dtype)
  before = jnp.triu(ones, 1).reshape(q, q // s, s)
  total = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  # Over i first: to the end of m's span, then the later spans, whose sums stand at their first token.
  Z = jnp.einsum('...jst,tm->...jsm', Z.reshape(*Z.shape[:-1], q // s, s), jnp.tril(ones[:s, :s]))
  within = total('...jsm,jsm->...sm', Z, before)
  if q > s:
    later = jnp.einsum('...js,st->...jt', Z[..., 0], jnp.tril(ones[: q // s, : q // s], -1))
    within += total('...js,jsm->...sm', later, before)
  return within.reshape(*within.shape[:-2], q)


def _block_vjp(tokens, D, state, dy, dstate):
  """((dx, dB, dC, ddt, arrives, leaves, ddt_t, within), dD, the gradient of the entering state) of one block, in acc."""
  x, (dt, high, low, dt_t, high_t, low_t), B, C, documents = tokens
  q, dtype, acc = x.shape[2], x.dtype, state.dtype
  einsum = functools.partial(jnp.einsum, preferred_element_type=acc)
  total = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  masks = _masks(documents, q)
  reach, leave = _decay(high + low, masks.reached), _decay(_to_end(high, low), masks.leaves)
  kept = _decay((high + low)[:, :, -1], masks.kept)
  x_acc, dy_acc = x.astype(acc), dy.astype(acc)
  x_leave, dy_reach = ((leave * dt)[..., None] * x_acc).astype(dtype), (reach[..., None] * dy_acc).astype(dtype)

  # The states that enter each chunk, H, and the gradients of those that leave it, G.
  H, _ = _through(kept, einsum('bkjgn,bkjgrp->bkgnrp', B, x_leave), state)
  inflow = einsum('bkign,bkigrp->bkgnrp', C, dy_reach)
  G, dstate = _through(kept[:, ::-1], inflow[:, ::-1], dstate)
  G = G[:, ::-1]
  H_x, G_x = H.astype(dtype), G.astype(dtype)
  CH, BG = (jnp.swapaxes(einsum('bkign,bkgnrp->bkgirp', m, state), 2, 3) for m, state in ((C, H_x), (B, G_x)))

  # Within the chunk, [j, i]: K is the map from dt x to y.
  x_t, dy_t = jnp.moveaxis(x, 2, 4), jnp.moveaxis(dy, 2, 4).astype(dtype)  # [b, k, g, r, q, p]
  L = _decay(-_differences(high_t, low_t), jnp.swapaxes(masks.visible, -1, -2))
  K = einsum('bkjgn,bkign->bkgji', B, C)[:, :, :, None] * L
  dM = einsum('bkgrjp,bkgrip->bkgrji', x_t, dy_t)
  dM_dt = dM * dt_t[..., None]
  dS = total('bkgrji,bkgrji->bkgji', dM_dt, L).astype(dtype)

  d_dtx = jnp.moveaxis(einsum('bkgrji,bkgrip->bkgrjp', K.astype(dtype), dy_t), 4, 2) + leave[..., None] * BG
  dx, dD = dt[..., None] * d_dtx, None
  if D is not None:
    dx, dD = dx + D * dy_acc, total('bkigrp,bkigrp->grp', dy_acc, x_acc)
  dB = einsum('bkgji,bkign->bkjgn', dS, C) + einsum('bkjgrp,bkgnrp->bkjgn', x_leave, G_x)
  dC = einsum('bkgji,bkjgn->bkign', dS, B) + einsum('bkigrp,bkgnrp->bkign', dy_reach, H_x)

  ddt_t = total('bkgrji,bkgrji->bkgrj', dM, K)
  within = _over_each(dM_dt * K)
  ddt = leave * total('bkjgrp,bkjgrp->bkjgr', x_acc, BG)
  arrives = reach * total('bkigrp,bkigrp->bkigr', dy_acc, CH)
  arrives = arrives.at[:, :, -1].add(kept * total('bkgnrp,bkgnrp->bkgr', H, G))
  return (dx, dB, dC, ddt, arrives, dt * ddt, ddt_t, within), dD, dstate
