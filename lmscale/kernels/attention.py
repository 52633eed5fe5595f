"""Causal attention with grouped key-value heads, document masks and a key-value cache, in plain XLA."""

import jax
import jax.numpy as jnp


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  q_positions: jax.Array | None = None,
  k_positions: jax.Array | None = None,
  q_segments: jax.Array | None = None,
  k_segments: jax.Array | None = None,
) -> jax.Array:
  """softmax(q k^T / sqrt(d)) v over the visible keys (arXiv 1706.03762, section 3.2; grouped heads: arXiv 2305.13245).

  Key j is visible to query i where k_positions[j] <= q_positions[i] and, with segments, both have the same nonzero
  segment. A query that sees no key outputs zero. Repeated keys and values are never made.

  Args:
    q: [b, t, h, d].
    k, v: [b, s, g, d]; heads (h / g) i .. (h / g) (i + 1) - 1 use group i.
    q_positions: [b, t], k_positions: [b, s]: places in the row (not in the document); arange if None.
    q_segments: [b, t], k_segments: [b, s]: 0 = padding; both or neither.

  Returns:
    [b, t, h, d] in q.dtype; scores and softmax are in promote_types(float32, q.dtype).

  Raises:
    ValueError: shapes that do not fit, or segments of one side only.
  """
  b, t, h, d = q.shape
  s, g = k.shape[1:3]
  if h % g:
    raise ValueError(f'attention: {h} query heads do not divide into {g} key-value heads')
  if k.shape != (b, s, g, d) or v.shape != k.shape:
    raise ValueError(f'attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit')
  if (q_segments is None) != (k_segments is None):
    raise ValueError('attention: give both q_segments and k_segments, or neither')
  acc = jnp.promote_types(jnp.float32, q.dtype)
  q_positions = jnp.arange(t)[None] if q_positions is None else q_positions
  k_positions = jnp.arange(s)[None] if k_positions is None else k_positions
  visible = k_positions[:, None, :] <= q_positions[:, :, None]
  if q_segments is not None:
    visible &= (q_segments[:, :, None] == k_segments[:, None, :]) & (k_segments[:, None, :] != 0)
  visible = visible[:, None, None]  # [b or 1, 1, 1, t, s]
  scores = jnp.einsum('btgrd,bsgd->bgrts', q.reshape(b, t, g, h // g, d), k, preferred_element_type=acc)
  # A finite bound, not -inf: a row without visible keys makes no NaN, which jax_debug_nans would report.
  scores = jnp.where(visible, scores * d**-0.5, jnp.finfo(acc).min / 2)
  weights = jnp.where(jnp.any(visible, axis=-1, keepdims=True), jax.nn.softmax(scores, axis=-1), 0)
  out = jnp.einsum('bgrts,bsgd->btgrd', weights.astype(v.dtype), v, preferred_element_type=acc)
  return out.reshape(b, t, h, d).astype(q.dtype)
