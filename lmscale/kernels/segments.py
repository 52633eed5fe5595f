"""What segment ids mean to the recurrent operations, in one place.

A row of `segment_ids` holds documents one after another; 0 is padding, which may stand anywhere. State flows within
a document, passes padding unchanged and is cut where the next real token has another id.
"""

import jax
import jax.numpy as jnp


def documents(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Numbers the documents of each row by order of appearance.

  Args:
    segment_ids: [b, l] integers, 0 = padding.

  Returns:
    document: [b, l] int32, 0 for the first document, one more at every change of id between real tokens. Padding
      has the number of the document before it, leading padding that of the first document. A state that enters the
      row belongs to document 0.
    real: [b, l] bool, False at padding.
  """
  filled = jax.lax.associative_scan(lambda left, right: jnp.where(right == 0, left, right), segment_ids, axis=1)
  before = jnp.pad(filled[:, :-1], ((0, 0), (1, 0)))
  document = jnp.cumsum((filled != before) & (before != 0), axis=1, dtype=jnp.int32)
  return document, segment_ids != 0


def clear(real: jax.Array, *arrays: jax.Array | None) -> tuple[jax.Array | None, ...]:
  """The arrays [b, l, ...] with zeros at padding, where NaN and infinity stand for nothing either: times zero they would
  be NaN, and reach real tokens through sums. real: [b, l] from `documents`. None stays None."""
  return tuple(None if m is None else jnp.where(real.reshape(*real.shape, *[1] * (m.ndim - 2)), m, 0) for m in arrays)


def starts(document: jax.Array) -> jax.Array:
  """[b, l] bool: True at the first token of every document but document 0, which goes on from the entering state."""
  return document != jnp.pad(document[:, :-1], ((0, 0), (1, 0)))
