"""Cumulative log decays within a chunk, computed once for every chunked implementation."""

import jax
import jax.numpy as jnp


def chunk_decay(dt: jax.Array, A: jax.Array, document: jax.Array | None, q: int) -> jax.Array:
  """cs_i = sum of dt_j A over the tokens j <= i of i's chunk and document.

  The matmul is a cumulative sum that restarts with every document, so that no gradient of dt, not even a rounding
  error, crosses a boundary. A decay below the smallest normal number is 0 for every purpose; without this bound one
  huge dt would cost the later differences of cs their digits.

  Args:
    dt: [b, l, h], l a multiple of q. A: [h]. document: [b, l] from `segments.documents`, or None for one document.
    q: tokens per chunk.

  Returns:
    [b, l, h] in dt's dtype, at most 0.
  """
  b, l, h = dt.shape
  log_decay = jnp.maximum(dt * A, jnp.log(jnp.finfo(dt.dtype).tiny)).reshape(b, l // q, q, h)
  earlier = jnp.tril(jnp.ones((q, q), bool))
  if document is None:
    cs = jnp.einsum('ij,bcjh->bcih', earlier.astype(dt.dtype), log_decay, precision=jax.lax.Precision.HIGHEST)
  else:
    doc = document.reshape(b, l // q, q)
    visible = (earlier & (doc[..., :, None] == doc[..., None, :])).astype(dt.dtype)
    cs = jnp.einsum('bcij,bcjh->bcih', visible, log_decay, precision=jax.lax.Precision.HIGHEST)
  return cs.reshape(b, l, h)
