"""Attention in plain XLA, some queries at a time: scores exist for one chunk of queries and all keys.

The backward pass keeps the inputs only and makes a chunk's softmax again (arXiv 2205.14135, section 3.1, without its
blocks of keys). With p = softmax(scores) and o = p v:

  dv = p^T do      dp = do v^T      dscores = p (dp - sum(p dp))      dq = dscores k      dk = dscores^T q
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

CHUNK = 512  # queries


def attention_xla(q, k, v, q_positions, k_positions, q_segments, k_segments, q_first=None, chunk=CHUNK):
  """Arguments as in `api`, besides chunk: queries whose scores exist at a time."""
  b, t, h, d = q.shape
  s, g = k.shape[1:3]
  q_positions = jnp.arange(t)[None] if q_positions is None else q_positions
  k_positions = jnp.arange(s)[None] if k_positions is None else k_positions
  size = min(chunk, t)

  def split(m, fill=0):
    """[b, t, ...] -> [chunks, b, size, ...]."""
    m = jnp.pad(m, ((0, 0), (0, -t % size)) + ((0, 0),) * (m.ndim - 2), constant_values=fill)
    return jnp.moveaxis(m.reshape(m.shape[0], -1, size, *m.shape[2:]), 1, 0)

  segments, first = (None if m is None else split(m) for m in (q_segments, q_first))
  queries = split(q_positions, -1 << 30), segments, first
  out = _attention(split(q.reshape(b, t, g, h // g, d)), k, v, queries, (k_positions, k_segments))
  return checkpoint_name(jnp.moveaxis(out, 0, 1).reshape(b, -1, h, d)[:, :t], 'attention')


@jax.custom_vjp
def _attention(q, k, v, queries, keys):
  """q [chunks, b, c, g, r, d]; k, v [b, s, g, d]; queries: (positions, segments or None, first positions or
  None) of their tokens; keys: (positions, segments or None)."""

  def body(_, inputs):
    q, queries = inputs
    weights = _weights(q, k, queries, keys)
    return None, _weighted(weights.astype(v.dtype), v).astype(q.dtype)

  return jax.lax.scan(body, None, (q, queries))[1]


def _attention_fwd(*inputs):
  return _attention(*inputs), inputs


def _attention_bwd(inputs, dout):
  q, k, v, queries, keys = inputs

  def body(carry, inputs):
    dk, dv = carry
    q, queries, dout = inputs
    weights = _weights(q, k, queries, keys)
    dv += _einsum('bgrts,btgrd->bsgd', weights.astype(v.dtype), dout)
    dweights = _einsum('btgrd,bsgd->bgrts', dout, v)
    dscores = weights * (dweights - jnp.sum(weights * dweights, axis=-1, keepdims=True)) * q.shape[-1] ** -0.5
    dscores = dscores.astype(q.dtype)
    dk += _einsum('bgrts,btgrd->bsgd', dscores, q)
    return (dk, dv), _einsum('bgrts,bsgd->btgrd', dscores, k).astype(q.dtype)

  acc = jnp.promote_types(jnp.float32, q.dtype)
  zero = jnp.zeros(k.shape, acc)
  (dk, dv), dq = jax.lax.scan(body, (zero, zero), (q, queries, dout))
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _weights(q, k, queries, keys):
  """The softmax of a chunk's scores [b, g, r, c, s] in the accumulator dtype; zeros where a query sees no key."""
  (q_positions, q_segments, q_first), (k_positions, k_segments) = queries, keys
  visible = k_positions[:, None, :] <= q_positions[:, :, None]
  if q_first is not None:
    visible &= k_positions[:, None, :] >= q_first[:, :, None]
  if q_segments is not None:
    visible &= (q_segments[:, :, None] == k_segments[:, None, :]) & (k_segments[:, None, :] != 0)
  visible = visible[:, None, None]  # [b or 1, 1, 1, c, s]
  scores = _einsum('btgrd,bsgd->bgrts', q, k) * q.shape[-1] ** -0.5
  # A finite bound, not -inf: a row without visible keys makes no NaN, which jax_debug_nans would report.
  scores = jnp.where(visible, scores, jnp.finfo(scores.dtype).min / 2)
  return jnp.where(jnp.any(visible, axis=-1, keepdims=True), jax.nn.softmax(scores, axis=-1), 0)


def _weighted(weights, v):
  """bgrts,bsgd->btgrd with v as the right-hand side, whose rows are read as they lie: einsum turns it round, which copies a cache."""
  b, g, r, t, s = weights.shape
  acc = jnp.promote_types(jnp.float32, v.dtype)
  dims = ((3,), (2,)), ((0, 1), (0, 1))
  out = jax.lax.dot_general(weights.reshape(b, g, r * t, s), jnp.swapaxes(v, 1, 2), dims, preferred_element_type=acc)
  return jnp.moveaxis(out.reshape(b, g, r, t, -1), 3, 1)


def _einsum(formula, *operands):
  acc = functools.reduce(jnp.promote_types, (m.dtype for m in operands), jnp.dtype(jnp.float32))
  return jnp.einsum(formula, *operands, preferred_element_type=acc)
