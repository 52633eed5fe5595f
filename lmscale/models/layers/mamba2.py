"""Mamba-2 (arXiv 2405.21060) with Megatron's shapes: B and C per group, gate first, then a norm per group."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lmscale.config import Mamba2Config, ModelConfig
from lmscale.kernels.causal_conv import causal_conv
from lmscale.kernels.linear import linear
from lmscale.kernels.ssd import ssd
from lmscale.models.context import Context
from lmscale.models.layers.base import HEADS, PER_HEAD, TOKENS, Cache, CacheSpec, Layer, cut_groups, entering, named
from lmscale.models.norms import accumulator, gated_group_norm
from lmscale.models.params import constant, fan_in_uniform, inverse_softplus_dt, log_uniform_a, normal, weight

STATE = ('batch', 'heads', None, None)
CHUNK = 64  # of the SSD, for the count of FLOPs, where the config leaves it to the kernel


class Mamba2(Layer):
  """A state per head; its cache is the state and a window of the convolution's inputs for each of x, B and C."""

  symbol, title, section = 'M', 'Mamba-2', 'mamba2'

  def mix(self, h_BTD: jax.Array, ctx: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
    config, c = self.config, self.config.mamba2
    b, t, d = h_BTD.shape
    inner, grouped = c.heads * c.head_dim, c.groups * c.state
    acc = accumulator(h_BTD.dtype)
    projected = {'z': (inner, 'heads'), 'x': (inner, 'heads'), 'B': (grouped, 'groups'), 'C': (grouped, 'groups'),
                 'dt': (c.heads, 'heads')}  # fmt: skip
    h = dict(zip(projected, self.project(h_BTD, ctx, projected, normal(config.init_std)), strict=True))
    new_cache = {}
    conv = {}
    for name, size, axis in _convolved(c):
      conv[name], new_cache[f'window_{name}'] = self._conv(name, h[name], size, axis, ctx, cache)
    dt_bias = weight(self, 'dt_bias', (c.heads,), ('heads',), inverse_softplus_dt(), full_precision=True)
    a_log = weight(self, 'A_log', (c.heads,), ('heads',), log_uniform_a(1.0, 16.0), full_precision=True)
    skip = weight(self, 'D', (c.heads,), ('heads',), constant(1.0), full_precision=True)
    x_BTHP = ctx.constrain(conv['x'].reshape(b, t, c.heads, c.head_dim), PER_HEAD)
    dt_BTH = jax.nn.softplus(h['dt'].astype(acc) + dt_bias.astype(acc))
    operands = {
      'x': (x_BTHP, PER_HEAD),
      'dt': (ctx.constrain(clamp(dt_BTH, c.dt_min, c.dt_max), HEADS), HEADS),
      'A': (-jnp.exp(a_log.astype(acc)), ('heads',)),
      'B': (cut_groups(conv['B'].reshape(b, t, c.groups, c.state), ctx), PER_HEAD),
      'C': (cut_groups(conv['C'].reshape(b, t, c.groups, c.state), ctx), PER_HEAD),
      'D': (skip.astype(acc), ('heads',)),
      'initial_state': (None if cache is None else entering(cache['state'], ctx), STATE),
      'segment_ids': (ctx.segment_ids, TOKENS),
    }
    options = {'chunk': c.chunk or None, 'implementation': named(c.implementation)}
    op = functools.partial(ssd, **options, deterministic=ctx.deterministic)
    y_BTHP, new_cache['state'] = ctx.local(op, operands, (PER_HEAD, STATE))
    scale = weight(self, 'gate_norm_scale', (inner,), ('heads',), constant(1.0), full_precision=True)
    z_BTHP = h['z'].reshape(b, t, c.heads, c.head_dim)
    y_BTHP = gated_group_norm(y_BTHP, z_BTHP, scale.reshape(c.heads, c.head_dim), c.groups, config.norm_eps, ctx)
    y = ctx.constrain(y_BTHP, PER_HEAD).reshape(b, t, inner)
    out = linear(y, weight(self, 'out_kernel', (inner, d), ('heads', 'embed'), normal(self.output_std())))
    return out, None if cache is None else new_cache

  def _conv(
    self, name: str, x: jax.Array, size: int, axis: str, ctx: Context, cache: Cache | None
  ) -> tuple[jax.Array, jax.Array]:
    width = self.config.mamba2.conv
    return causal_conv(
      x,
      weight(self, f'conv_{name}_kernel', (width, size), (None, axis), fan_in_uniform(width)),
      weight(self, f'conv_{name}_bias', (size,), (axis,), fan_in_uniform(width)),
      initial_window=None if cache is None else entering(cache[f'window_{name}'], ctx),
      segment_ids=ctx.segment_ids,
    )

  @staticmethod
  def cache_specs(config: ModelConfig, batch: int, length: int, dtype: Any) -> dict[str, CacheSpec]:
    c = config.mamba2
    windows = {
      f'window_{name}': CacheSpec((batch, c.conv - 1, size), dtype, ('batch', None, axis))
      for name, size, axis in _convolved(c)
    }
    return windows | {'state': CacheSpec((batch, c.heads, c.head_dim, c.state), accumulator(dtype), STATE)}

  @staticmethod
  def flops(config: ModelConfig, seq_len: int, causal: bool) -> int:
    """The SSD as its chunked algorithm computes it (arXiv 2405.21060, section 6), so it depends on the chunk q.

    Per token, with h heads of p channels, g groups and state n:
      C B^T within the chunk, once per group     2 q n g
      its masked product with x                  2 q p h    (the whole square: masking saves a matrix unit nothing)
      the chunk's state, and its use by C        2 n p h + 2 n p h
    """
    c = config.mamba2
    inner, grouped, q = c.heads * c.head_dim, c.groups * c.state, min(c.chunk or CHUNK, seq_len)
    projections = 2 * config.d_model * (3 * inner + 2 * grouped + c.heads)
    convolutions = 2 * c.conv * (inner + 2 * grouped)
    return projections + convolutions + 2 * q * grouped + 2 * q * inner + 4 * c.state * inner


def clamp(dt: jax.Array, low: float, high: float) -> jax.Array:
  """dt between `low` and `high`, both 0 for no bound; the gradient is 0 outside them and 1 at them."""
  if low:
    dt = jnp.where(dt < low, low, dt)
  return jnp.where(dt > high, high, dt) if high else dt


def _convolved(c: Mamba2Config) -> tuple[tuple[str, int, str], ...]:
  """(name, channels, logical axis) of each input of the SSD that goes through a convolution."""
  grouped = c.groups * c.state
  return ('x', c.heads * c.head_dim, 'heads'), ('B', grouped, 'groups'), ('C', grouped, 'groups')
