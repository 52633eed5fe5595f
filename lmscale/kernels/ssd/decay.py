"""The decays within a chunk, for every chunked implementation: exact enough for any chunk, and with their gradient.

The decay from token j to i is exp(s_i - s_j), s the running sum of the log decays a_k = dt_k A. Where strong and weak
decays meet in a chunk s is large, and a difference of two float32 numbers of that size has lost the weak ones. So s is
kept in two parts: `high`, a sum of multiples of a coarse power of two, which float32 holds without rounding whatever the
order of the sum, and `low`, the sum of the small remainders. (high_i - high_j) + (low_i - low_j) then has the error of
the sum of the tokens in between alone, as in a loop over the tokens.

The same holds for the gradient of a_k: it is the sum of what reaches over token k, from before it to it or after. The
difference of all that tokens receive and all that they give is the same number in exact arithmetic only: where a head
forgets at once, both are large and the rest is their rounding.
"""

import math

import jax
import jax.numpy as jnp

LOG2E = 1.4426950408889634


def log_decay(dt: jax.Array, A: jax.Array) -> jax.Array:
  """dt A, [b, l, h], for dt [b, l, h] and A [h]. A decay below the smallest normal number is 0 for every purpose, and
  bounded there: `running` counts on it."""
  return jnp.maximum(dt * A, math.log(jnp.finfo(dt.dtype).tiny))


def running(a: jax.Array, document: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  """(high, low), each like a: the sum of a over the tokens up to and with token i of i's chunk and document.

  Args:
    a: [b, c, q, ...] from `log_decay`, cut into c chunks of q tokens; in base 2 if multiplied by LOG2E.
    document: [b, c, q] from `segments.documents`, or None for one document.
  """
  q = a.shape[2]
  largest = 2 - jnp.finfo(a.dtype).minexp  # above any |a| in base 2, and a power of two
  unit = 2.0 ** (math.ceil(math.log2(largest * q)) - jnp.finfo(a.dtype).nmant - 1)
  high = jnp.round(a / unit) * unit
  earlier = jnp.tril(jnp.ones((q, q), bool))
  if document is None:
    terms, visible = 'ij,bcj...->bci...', earlier
  else:
    terms, visible = 'bcij,bcj...->bci...', earlier & (document[..., :, None] == document[..., None, :])
  return tuple(
    jnp.einsum(terms, visible.astype(a.dtype), part, precision=jax.lax.Precision.HIGHEST) for part in (high, a - high)
  )


def gradient(arrives: jax.Array, leaves: jax.Array) -> jax.Array:
  """The gradient of the log decays from what reaches over the bounds of a chunk; what stays within is added to it.

  Args:
    arrives: [b, c, q, ...], what token i receives from the state that enters its chunk (that of the state which goes
      through the whole chunk: at the last token).
    leaves: like arrives, what token j gives to the state that leaves.

  Returns:
    For token k the sum of arrives_i over i >= k and of leaves_j over j < k, like arrives.
  """
  later = jnp.triu(jnp.ones((arrives.shape[2],) * 2, arrives.dtype))

  def total(mask, m):
    return jnp.einsum('kj,bcj...->bck...', mask, m, precision=jax.lax.Precision.HIGHEST)

  return total(later, arrives) + total(1 - later, leaves)
