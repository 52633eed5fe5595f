"""Attention: choice of implementation and what all implementations share.

An implementation maps (q, k, v, q_positions, k_positions, q_segments, k_segments, q_first) to the output, positions None
where they are the places in the row. What lies at padding is zeros, not to be multiplied by a weight of 0, which NaN survives. `cudnn.unsupported` says what cuDNN cannot do.
"""

import jax
import jax.numpy as jnp

from lmscale.kernels import choice
from lmscale.kernels.attention import cudnn, xla

IMPLEMENTATIONS = {'xla': xla.attention_xla, 'cudnn': cudnn.attention_cudnn}


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  q_positions: jax.Array | None = None,
  k_positions: jax.Array | None = None,
  q_segments: jax.Array | None = None,
  k_segments: jax.Array | None = None,
  q_first: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """softmax(q k^T / sqrt(d)) v over the visible keys (arXiv 1706.03762, section 3.2; grouped heads: arXiv 2305.13245).

  Key j is visible to query i where k_positions[j] <= q_positions[i], with q_first also q_first[i] <= k_positions[j] and,
  with segments, both have the same nonzero segment. A query that sees no key outputs zero. What q, k and v hold at
  padding never matters, NaN included. Repeated keys and values are never made. Differentiable once, in reverse, in q,
  k and v.

  Args:
    q: [b, t, h, d].
    k, v: [b, s, g, d]; heads (h / g) i .. (h / g) (i + 1) - 1 use group i.
    q_positions: [b, t], k_positions: [b, s]: places in the row (not in the document); arange if None.
    q_segments: [b, t], k_segments: [b, s]: 0 = padding; both or neither.
    q_first: [b, t]: the first position that a query sees, where its document begins in a cache; None: no bound.
    implementation: 'xla' (any device and dtype, memory in proportion to s times a few hundred queries) or 'cudnn'
      (NVIDIA, 16 bits, rows without a cache; packed documents by a mask of [b, t, s]). None chooses: 'cudnn' on an
      NVIDIA GPU for rows of one document where it can and has proved itself (`proof`), else 'xla'.

  Returns:
    [b, t, h, d] in q.dtype; scores, softmax and the sums of the gradients are in promote_types(float32, q.dtype).

  Raises:
    ValueError: shapes that do not fit, segments of one side only, an unknown implementation, or a named one that
      cannot do what is asked.
  """
  b, _, h, d = q.shape
  s, g = k.shape[1:3]
  if h % g:
    raise ValueError(f'attention: {h} query heads do not divide into {g} key-value heads')
  if k.shape != (b, s, g, d) or v.shape != k.shape:
    raise ValueError(f'attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit')
  if (q_segments is None) != (k_segments is None):
    raise ValueError('attention: give both q_segments and k_segments, or neither')
  if q_segments is not None:
    q, k, v = _real(q, q_segments), _real(k, k_segments), _real(v, k_segments)
  arguments = (q, k, v, q_positions, k_positions, q_segments, k_segments, q_first)
  preferred = ('cudnn', 'xla') if q_segments is None and choice.nvidia() else ('xla',)
  name = choice.choose(
    'attention', implementation, tuple(IMPLEMENTATIONS), preferred,
    lambda name: cudnn.unsupported(*arguments) if name == 'cudnn' else None, q.dtype,
  )  # fmt: skip
  out = IMPLEMENTATIONS[name](*arguments)
  return out if q_segments is None else _real(out, q_segments)  # the gradient at padding is 0 from here on


def _real(m: jax.Array, segments: jax.Array) -> jax.Array:
  return jnp.where((segments != 0)[..., None, None], m, 0)
