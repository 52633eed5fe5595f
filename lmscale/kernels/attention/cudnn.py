"""Attention by cuDNN's fused kernels, through JAX's public function.

Rows of one document need only the causal flag: nothing of size t x s is made. Packed documents go in as a mask of
[b, 1, t, s], which JAX makes a bias that all heads share: exact, a forbidden weight is exp(-2e38) = 0 in every bit, but
t x s memory traffic. (cuDNN's own packed layout would save that. It wants a static bound on the documents of a row,
sits behind a private function of JAX, and jax 0.10.2 computes its offsets of grouped key-value heads wrongly.)
"""

import jax
import jax.numpy as jnp


def unsupported(q, k, v, q_positions, k_positions, q_segments, k_segments, q_first) -> str | None:
  """Why `attention_cudnn` cannot take these arguments, in words, or None if it can."""
  t, s, d = q.shape[1], k.shape[1], q.shape[3]
  if {q.dtype, k.dtype, v.dtype} not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float16)}):
    return f'q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; cuDNN has bfloat16 and float16'
  if not (q_positions is k_positions is q_first is None):
    return 'positions are given (a key-value cache); cuDNN takes whole rows'
  if t != s:
    return f'{t} queries and {s} keys; cuDNN takes rows of equal length'
  limit = 256 if _hopper() else 128
  if d > limit or d % 8:
    return f'head_dim {d} is not a multiple of 8 up to {limit}'
  if q_segments is not None and t % 2:
    return f'packed documents in rows of an odd length, {t}'
  return None


def attention_cudnn(q, k, v, q_positions, k_positions, q_segments, k_segments, q_first):
  """Arguments as in `api`; a call that `unsupported` refuses is not for this function."""
  del q_positions, k_positions, q_first
  if q_segments is None:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation='cudnn')
  t = q.shape[1]
  same = (q_segments[:, :, None] == k_segments[:, None, :]) & (k_segments[:, None, :] != 0)
  out = jax.nn.dot_product_attention(q, k, v, mask=same[:, None], is_causal=True, implementation='cudnn')
  sees_a_key = jnp.any(same & jnp.tri(t, dtype=bool), axis=-1)
  return jnp.where(sees_a_key[..., None, None], out, 0)


def _hopper():
  """Whether the first device is of compute capability 9.0 or later; True where there is none to ask."""
  capability = getattr(jax.devices()[0], 'compute_capability', None)
  return capability is None or float(capability) >= 9.0
