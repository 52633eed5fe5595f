"""Causal softmax attention: MHA, GQA or MQA; RoPE on a fraction of each head, or no positions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lmscale.config import ModelConfig
from lmscale.kernels.attention import attention
from lmscale.models.context import Context
from lmscale.models.layers.base import PER_HEAD, TOKENS, Cache, CacheSpec, Layer, cut_groups, named
from lmscale.models.params import normal
from lmscale.models.positions import rope


class Attention(Layer):
  """Keys and values of earlier tokens are read from the cache, token i of a row's cache in its place i.

  There heads come before places: a head's keys lie together, as the products with one query read them, and nothing is copied.
  """

  symbol, title, section = '*', 'attention', 'attention'

  def mix(self, h_BTD: jax.Array, ctx: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
    config, c = self.config, self.config.attention
    b, t, _ = h_BTD.shape
    keys = c.kv_heads * c.head_dim, 'kv_heads'
    q, k, v = self.project(
      h_BTD, ctx, {'q': (c.heads * c.head_dim, 'heads'), 'k': keys, 'v': keys}, normal(config.init_std), config.bias
    )
    q_BTHP = ctx.constrain(q.reshape(b, t, c.heads, c.head_dim), PER_HEAD)
    k_BTGP = k.reshape(b, t, c.kv_heads, c.head_dim)
    v_BTGP = v.reshape(b, t, c.kv_heads, c.head_dim)
    if config.positions == 'rope':
      q_BTHP, k_BTGP = rope(config, q_BTHP, ctx.positions), rope(config, k_BTGP, ctx.positions)
    where = {'segments': (ctx.segment_ids, TOKENS)}
    if cache is not None:
      places_BT = cache_places(ctx, t, cache['k'].shape[2])
      cache = {'k': _write(cache['k'], k_BTGP, places_BT), 'v': _write(cache['v'], v_BTGP, places_BT)}
      k_BTGP, v_BTGP = (jnp.swapaxes(cache[name], 1, 2) for name in 'kv')
      where = {'places': (places_BT, TOKENS), 'first': (places_BT - ctx.positions, TOKENS)}
    k_BTGP, v_BTGP = cut_groups(k_BTGP, ctx), cut_groups(v_BTGP, ctx)
    operands = {'q': (q_BTHP, PER_HEAD), 'k': (k_BTGP, PER_HEAD), 'v': (v_BTGP, PER_HEAD), **where}
    (y_BTHP,) = ctx.local(functools.partial(_attend, named(c.implementation)), operands, (PER_HEAD,))
    y = ctx.constrain(y_BTHP, PER_HEAD).reshape(b, t, c.heads * c.head_dim)
    return self.linear('out', y, config.d_model, ('heads', 'embed'), normal(self.output_std())), cache

  @staticmethod
  def cache_specs(config: ModelConfig, batch: int, length: int, dtype: Any) -> dict[str, CacheSpec]:
    c = config.attention
    spec = CacheSpec((batch, c.kv_heads, length, c.head_dim), dtype, ('batch', 'kv_heads', 'length', None))
    return {'k': spec, 'v': spec}

  @staticmethod
  def flops(config: ModelConfig, seq_len: int, causal: bool) -> int:
    c = config.attention
    projections = 2 * config.d_model * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    core = 4 * seq_len * c.heads * c.head_dim  # scores, and their product with the values
    return projections + (core // 2 if causal else core)


def cache_places(ctx: Context, t: int, length: int) -> jax.Array:
  """[b, t] int32: the place of each of t tokens in a cache for `length` tokens, a different one for each token of a row.

  Padding, and tokens that a full cache has no room for, get places from `length` on: nothing is written or read there.

  Raises:
    ValueError: no `slots`, or more tokens than the cache can ever hold.
  """
  if ctx.slots is None:
    raise ValueError('attention: a cache needs Context.slots, the number of tokens that each of its rows holds')
  if t > length:
    raise ValueError(f'attention: {t} tokens at a time do not fit in a cache for {length}')
  token = jnp.arange(t, dtype=jnp.int32)
  places_BT = ctx.slots[:, None] + token
  fits = (places_BT >= 0) & (places_BT < length)
  if ctx.segment_ids is not None:
    fits &= ctx.segment_ids != 0
  return jnp.where(fits, places_BT, length + token)


def _write(cache_BGSP: jax.Array, new_BTGP: jax.Array, places_BT: jax.Array) -> jax.Array:
  """Puts t new keys or values in their places, row by row; places outside the cache are left out."""
  new_BGTP = jnp.swapaxes(new_BTGP, 1, 2).astype(cache_BGSP.dtype)
  if places_BT.shape == (1, 1):
    # XLA would make an update of a scatter of one index, put it into each use of the cache, and copy that for it. The second
    # index has no place.
    new_BGTP, places_BT = jnp.tile(new_BGTP, (1, 1, 2, 1)), jnp.pad(places_BT, ((0, 0), (0, 1)), constant_values=cache_BGSP.shape[2] + 1)

  def write(row_GSP, new_GTP, places):
    return row_GSP.at[:, places].set(new_GTP, mode='drop', unique_indices=True)

  return jax.vmap(write)(cache_BGSP, new_BGTP, places_BT)


def _attend(
  implementation: str | None, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None = None,
  places: jax.Array | None = None, first: jax.Array | None = None,
) -> tuple[jax.Array]:  # fmt: skip
  """Attention of tokens to one another, or with `places` [b, t] to a cache from place `first` [b, t] on (always in XLA)."""
  if places is None:
    return (attention(q, k, v, q_segments=segments, k_segments=segments, implementation=implementation),)
  slots = jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.int32), k.shape[:2])
  places = jnp.where(places < k.shape[1], places, -1)  # what was not written sees nothing
  return (attention(q, k, v, q_positions=places, k_positions=slots, q_first=first, implementation='xla'),)
