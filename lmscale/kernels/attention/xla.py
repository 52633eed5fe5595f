"""Attention in plain XLA: scores exist for one chunk of queries and one block of keys, and blocks that nobody sees are left out.

The softmax is put together from blocks (arXiv 2205.14135, section 3.1). The backward pass keeps the inputs only: for a chunk it
makes the output o and the logarithm of each query's sum again, then with p = exp(scores - that):

  dv = p^T do      dp = do v^T      dscores = p (dp - sum(o do))      dq = dscores k      dk = dscores^T q

Between the first and the last block that a query of a chunk may see, all are visited: of t tokens in one causal row half of
t^2, and less where documents are shorter than the row.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lmscale.kernels import choice
from lmscale.kernels.linear import several_rows

BEFORE, BEHIND = -1 << 30, 1 << 30  # places that no key and no query has


class Queries(NamedTuple):
  """Of each query [b or 1, t]: its place, its segment or None, the first place it sees or None."""

  positions: jax.Array
  segments: jax.Array | None
  first: jax.Array | None


class Keys(NamedTuple):
  """Of each key [b or 1, s]: its place, its segment or None."""

  positions: jax.Array
  segments: jax.Array | None


def attention_xla(q, k, v, q_positions, k_positions, q_segments, k_segments, q_first=None, chunk=None, block=None):
  """Arguments as in `api`, besides chunk and block: queries and keys whose scores exist at a time; None chooses."""
  chunk = chunk or default_chunk()
  # One query reads a cache in one pass.
  block = min(block or (k.shape[1] if q.shape[1] == 1 else chunk), k.shape[1])
  q_positions = jnp.arange(q.shape[1])[None] if q_positions is None else q_positions
  k_positions = jnp.arange(k.shape[1])[None] if k_positions is None else k_positions
  out = _attention(chunk, block, q, k, v, Queries(q_positions, q_segments, q_first), Keys(k_positions, k_segments))
  return checkpoint_name(out, 'attention')


def default_chunk() -> int:
  """What was fastest on CPUs; on a GPU a turn of a loop costs more."""
  return 128 if choice.backend() == 'cpu' else 512


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(chunk: int, size: int, q: jax.Array, k: jax.Array, v: jax.Array, queries: Queries, keys: Keys) -> jax.Array:
  def one_chunk(_, inputs):
    return None, _forward(size, *inputs, k, v, keys)[0].astype(q.dtype)

  return _joined(jax.lax.scan(one_chunk, None, _split_queries(chunk, size, q, k, queries, keys))[1], q.shape)


def _attention_fwd(chunk, size, *inputs):
  return _attention(chunk, size, *inputs), inputs


def _attention_bwd(chunk, size, inputs, dout):
  q, k, v, queries, keys = inputs
  acc, scale = _acc(q, k), q.shape[-1] ** -0.5

  def one_chunk(carry, inputs):
    (q, queries, seen), dout = inputs
    out, logsum = _forward(size, q, queries, seen, k, v, keys)
    inner = jnp.moveaxis(jnp.sum(out * dout.astype(acc), axis=-1), 1, 3)

    def one_block(block, carry):
      dk, dv, dq = carry
      p = jnp.exp(_scores(q, queries, block) - logsum[..., None])
      dp = _einsum('btgrd,bsgd->bgrts', dout, block.v)
      dscores = (p * (dp - inner[..., None]) * scale).astype(q.dtype)
      dv = block.add(dv, _einsum('bgrts,btgrd->bsgd', p.astype(v.dtype), dout))
      dk = block.add(dk, _einsum('bgrts,btgrd->bsgd', dscores, q))
      return dk, dv, dq + _einsum('bgrts,bsgd->btgrd', dscores, block.k)

    dk, dv, dq = _over_blocks(size, seen, k, v, keys, one_block, (*carry, jnp.zeros(q.shape, acc)))
    return (dk, dv), dq.astype(q.dtype)

  dout = _split(chunk, dout.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3]))
  zeros = jnp.zeros(k.shape, acc), jnp.zeros(v.shape, acc)
  (dk, dv), dq = jax.lax.scan(one_chunk, zeros, (_split_queries(chunk, size, q, k, queries, keys), dout))
  return _joined(dq, q.shape), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _forward(
  size: int, q: jax.Array, queries: Queries, seen: jax.Array, k: jax.Array, v: jax.Array, keys: Keys
) -> tuple[jax.Array, jax.Array]:
  """The output [b, c, g, r, d] of a chunk of queries, and the logarithm of each one's sum [b, g, r, c], in the accumulator dtype."""
  acc = _acc(q, k)

  def one_block(block, carry):
    most, total, out = carry
    scores = _scores(q, queries, block)
    new = jnp.maximum(most, jnp.max(scores, axis=-1))
    p, kept = jnp.exp(scores - new[..., None]), jnp.exp(most - new)
    out = kept[..., None] * out + _weighted(p.astype(v.dtype), block.v)
    return new, kept * total + jnp.sum(p, axis=-1), out

  # A finite bound, not -inf: a query without a visible key makes no NaN, which jax_debug_nans would report. What is summed
  # before the first visible key is multiplied by 0 there.
  b, c, g, r, d = q.shape
  none = jnp.full((b, g, r, c), _least(acc), acc)
  most, total, out = _over_blocks(size, seen, k, v, keys, one_block, (none, jnp.zeros_like(none), jnp.zeros((*none.shape, d), acc)))
  sees = most != _least(acc)  # NaN stays NaN
  total = jnp.where(sees, total, 1)
  out = jnp.where(sees[..., None], out / total[..., None], 0)
  return jnp.moveaxis(out, 3, 1), jnp.where(sees, most + jnp.log(total), -_least(acc))  # of one that sees nothing p is 0


class Block(NamedTuple):
  """Some keys [b, c, g, d] with their values. The last block of a row lies over the one before it: own [c] says which are its own."""

  k: jax.Array
  v: jax.Array
  keys: Keys
  own: jax.Array | None
  start: jax.Array | int

  def add(self, whole: jax.Array, part: jax.Array) -> jax.Array:
    """whole [b, s, g, d] with part added at this block."""
    if part.shape == whole.shape:
      return whole + part
    old = jax.lax.dynamic_slice_in_dim(whole, self.start, part.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(whole, old + part, self.start, axis=1)


def _over_blocks(size: int, seen: jax.Array, k: jax.Array, v: jax.Array, keys: Keys, body: Callable, carry: Any) -> Any:
  """body(block, carry) for the blocks of `size` keys from seen[0] to before seen[1], or without a loop for all keys."""
  s = k.shape[1]
  if size == s:
    return body(Block(k, v, keys, None, 0), carry)

  def turn(number, carry):
    start = jnp.minimum(number * size, s - size)
    part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=1)
    own = start + jnp.arange(size) >= number * size
    return body(Block(part(k), part(v), jax.tree.map(part, keys), own, start), carry)

  return jax.lax.fori_loop(seen[0], seen[1], turn, carry)


def _split_queries(chunk: int, size: int, q: jax.Array, k: jax.Array, queries: Queries, keys: Keys) -> tuple:
  """For each chunk: q [b, c, g, r, d], what is known of its queries, and the first and behind the last block that they see."""
  b, t, _, d = q.shape
  fill = Queries(BEFORE, 0, BEHIND)
  parts = Queries(*(None if m is None else _split(chunk, m, fill) for m, fill in zip(queries, fill, strict=True)))
  return _split(chunk, q.reshape(b, t, k.shape[2], -1, d)), parts, _seen(parts, keys, size)


def _seen(chunks: Queries, keys: Keys, size: int) -> jax.Array:
  """[chunks, 2] int32: the blocks from [0] to before [1] hold every key that some query of the chunk sees."""

  least, most = functools.partial(jnp.min, axis=-1), functools.partial(jnp.max, axis=-1)

  def meet(low, high):
    """Of the least numbers [m, b or 1] and the largest [n, b or 1]: which are not above which, [m, n, b]."""
    return low[:, None] <= high[None]

  sees = meet(least(_split(size, keys.positions, BEHIND)), most(chunks.positions)).swapaxes(0, 1)
  if chunks.first is not None:
    sees &= meet(least(chunks.first), most(_split(size, keys.positions, BEFORE)))
  if chunks.segments is not None:
    (asked_low, asked_high), (low, high) = (
      (least(jnp.where(m == 0, BEHIND, m)), most(jnp.where(m == 0, BEFORE, m))) for m in (chunks.segments, _split(size, keys.segments))
    )
    sees &= meet(asked_low, high) & meet(low, asked_high).swapaxes(0, 1)
  sees = jnp.any(sees, axis=-1)  # [chunks, blocks]
  behind = sees.shape[1] - jnp.argmax(sees[:, ::-1], axis=1)
  return jnp.stack([jnp.argmax(sees, axis=1), jnp.where(jnp.any(sees, axis=1), behind, 0)], axis=1).astype(jnp.int32)


def _scores(q: jax.Array, queries: Queries, block: Block) -> jax.Array:
  """[b, g, r, c, s] in the accumulator dtype; the least value where a query does not see a key."""
  places = block.keys.positions[:, None, :]
  visible = places <= queries.positions[:, :, None]
  if block.own is not None:
    visible &= block.own
  if queries.first is not None:
    visible &= places >= queries.first[:, :, None]
  if queries.segments is not None:
    segments = block.keys.segments[:, None, :]
    visible &= (queries.segments[:, :, None] == segments) & (segments != 0)
  scores = _einsum('btgrd,bsgd->bgrts', q, block.k) * q.shape[-1] ** -0.5
  return jnp.where(visible[:, None, None], scores, _least(scores.dtype))


def _split(size: int, m: jax.Array, fill: int = 0) -> jax.Array:
  """[b, t, ...] -> [chunks, b, size or t, ...], the last chunk filled up."""
  size = min(size, m.shape[1])
  m = jnp.pad(m, ((0, 0), (0, -m.shape[1] % size)) + ((0, 0),) * (m.ndim - 2), constant_values=fill)
  return jnp.moveaxis(m.reshape(m.shape[0], -1, size, *m.shape[2:]), 1, 0)


def _joined(chunks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """[chunks, b, size, ...] -> shape [b, t, h, d]"""
  b, t, h, d = shape
  return jnp.moveaxis(chunks, 0, 1).reshape(b, -1, h, d)[:, :t]


def _weighted(weights: jax.Array, v: jax.Array) -> jax.Array:
  """bgrts,bsgd->bgrtd with v as the right-hand side, whose rows are read as they lie: einsum turns it round, which copies a cache."""
  b, g, r, t, s = weights.shape
  dims = ((3,), (2,)), ((0, 1), (0, 1))
  weights = several_rows(weights.reshape(b, g, r * t, s))
  out = jax.lax.dot_general(weights, jnp.swapaxes(v, 1, 2), dims, preferred_element_type=_acc(v))
  return out[:, :, : r * t].reshape(b, g, r, t, -1)


def _least(dtype: Any) -> float:
  return float(jnp.finfo(dtype).min) / 2


def _acc(*operands: jax.Array) -> Any:
  return functools.reduce(jnp.promote_types, (m.dtype for m in operands), jnp.dtype(jnp.float32))


def _einsum(formula, *operands):
  return jnp.einsum(formula, *operands, preferred_element_type=_acc(*operands))
