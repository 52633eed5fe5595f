"""Chunked SSD: matmuls within a chunk, a scan that carries the state from chunk to chunk (arXiv 2405.21060, section 6).

With cs the cumulative sum of dt A within a chunk and document, and H the state that enters it:

  M_ij = (C_i . B_j) exp(cs_i - cs_j) dt_j     for i >= j in one document, else 0
  y_i  = sum_j M_ij x_j + exp(cs_i) H C_i      the second term for tokens of the entering state's document
  H   <- exp(cs_last) H + sum_j exp(cs_last - cs_j) dt_j x_j B_j^T    of the last token's document

Masks are applied before exp, so every exponent is at most 0. The body is rematerialised: what the backward pass keeps
of a chunk is its inputs and the state at its start.
"""

import functools

import jax
import jax.numpy as jnp


def default_chunk() -> int:
  """Tokens per chunk where the caller names none."""
  return 64


def ssd_xla(x, dt, A, B, C, D, state, document, chunk):
  """Shapes and dtypes as in `api`. Heads are [groups, heads per group] inside and never merge with the batch."""
  b, l, h, p = x.shape
  g, n = B.shape[2:]
  q = min(chunk, l)
  split = functools.partial(_split, q=q)
  heads = (g, h // g)
  if document is None:
    docs = None
  else:
    docs = split(jnp.pad(document, ((0, 0), (0, -l % q)), mode='edge'))
    docs = (docs, jnp.pad(docs[:-1, :, -1], ((1, 0), (0, 0))))
  chunks = (split(x.reshape(b, l, *heads, p)), split(dt.reshape(b, l, *heads)), split(B), split(C), docs)
  body = jax.checkpoint(functools.partial(_chunk, A.reshape(heads)), prevent_cse=False)
  state, y = jax.lax.scan(body, state.reshape(b, *heads, p, n), chunks)
  y = jnp.moveaxis(y, 0, 1).reshape(b, -1, h, p)[:, :l]
  if D is not None:
    y += D.reshape(h, -1) * x.astype(y.dtype)
  return y, state.reshape(b, h, p, n)


def _split(m, q):
  """[b, l, ...] -> [chunks, b, q, ...], padded with zeros: dt = 0 leaves the state as it is."""
  m = jnp.pad(m, ((0, 0), (0, -m.shape[1] % q)) + ((0, 0),) * (m.ndim - 2))
  return jnp.moveaxis(m.reshape(m.shape[0], -1, q, *m.shape[2:]), 1, 0)


def _chunk(A, state, inputs):
  """One chunk. state [b, g, r, p, n]; x [b, q, g, r, p]; dt [b, q, g, r]; B, C [b, q, g, n]; y as x, in acc."""
  x, dt, B, C, docs = inputs
  acc, q = state.dtype, x.shape[1]
  einsum = functools.partial(jnp.einsum, preferred_element_type=acc)
  visible = jnp.broadcast_to(jnp.tril(jnp.ones((q, q), bool)), (x.shape[0], q, q))
  from_state = to_end = kept = None
  if docs is not None:
    doc, entering = docs
    visible &= doc[:, :, None] == doc[:, None, :]
    from_state = (doc == entering[:, None])[..., None, None]
    to_end = (doc == doc[:, -1:])[..., None, None]
    kept = (entering == doc[:, -1])[:, None, None]
  # A decay below the smallest normal number is 0 for every purpose; without this bound one huge dt would cost the
  # later differences of cs their digits. The matmul is a cumulative sum that restarts with every document, so that
  # no gradient of dt, not even a rounding error, crosses a boundary.
  log_decay = jnp.maximum(dt * A, jnp.log(jnp.finfo(acc).tiny))
  cs_t = einsum('bij,bjgr->bgri', visible.astype(acc), log_decay, precision=jax.lax.Precision.HIGHEST)
  cs = jnp.moveaxis(cs_t, -1, 1)
  decay = _masked_exp(cs_t[..., :, None] - cs_t[..., None, :], visible[:, None, None])
  scores = einsum('bign,bjgn->bgij', C, B)
  mix = scores[:, :, None] * decay * jnp.moveaxis(dt, 1, -1)[..., None, :]
  y = einsum('bgrij,bjgrp->bigrp', mix.astype(x.dtype), x)
  y += _masked_exp(cs, from_state)[..., None] * einsum('bign,bgrpn->bigrp', C, state.astype(x.dtype))
  weight = _masked_exp(cs[:, -1:] - cs, to_end) * dt
  update = einsum('bjgrp,bjgn->bgrpn', (weight[..., None] * x).astype(x.dtype), B)
  state = _masked_exp(cs[:, -1], kept)[..., None, None] * state + update
  return state, y


def _masked_exp(exponent, mask):
  return jnp.exp(exponent if mask is None else jnp.where(mask, exponent, -jnp.inf))
