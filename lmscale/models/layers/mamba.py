"""Mamba-1 (arXiv 2312.00752): a selective scan with a decay per channel and state."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lmscale.config import ModelConfig
from lmscale.kernels.causal_conv import causal_conv
from lmscale.kernels.linear import linear
from lmscale.kernels.selective_scan import selective_scan
from lmscale.models.context import Context
from lmscale.models.layers.base import HEADS, PROJECTION, TOKENS, Cache, CacheSpec, Layer, entering, named
from lmscale.models.norms import accumulator
from lmscale.models.params import constant, fan_in_uniform, inverse_softplus_dt, s4d_real_a, uniform, weight

STATE = ('batch', 'heads', None)
SCAN_FLOPS = 9  # of the recurrence, per token, channel and state: exp's argument, decay, input, output


class Mamba(Layer):
  """A state per channel; its cache is the state and a window of the convolution's inputs."""

  symbol, title, section = 'm', 'Mamba', 'mamba'

  def mix(self, h_BTD: jax.Array, ctx: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
    config, c = self.config, self.config.mamba
    d = h_BTD.shape[-1]
    acc = accumulator(h_BTD.dtype)
    x_BTE, z_BTE = self.project(h_BTD, ctx, dict.fromkeys('xz', (c.d_inner, 'heads')), fan_in_uniform(d))
    x_BTE, window = causal_conv(
      x_BTE,
      weight(self, 'conv_kernel', (c.conv, c.d_inner), (None, 'heads'), fan_in_uniform(c.conv)),
      weight(self, 'conv_bias', (c.d_inner,), ('heads',), fan_in_uniform(c.conv)),
      initial_window=None if cache is None else entering(cache['window'], ctx),
      segment_ids=ctx.segment_ids,
    )
    width = c.dt_rank + 2 * c.state
    bcdt_kernel = weight(self, 'bcdt_kernel', (c.d_inner, width), ('heads', None), fan_in_uniform(c.d_inner))
    # One reduction over the mesh for dt's low-rank input, B and C together.
    bcdt = checkpoint_name(ctx.constrain(linear(x_BTE, bcdt_kernel), ('batch', 'length', None)), PROJECTION)
    dt_BTR, b_BTN, c_BTN = jnp.split(bcdt, [c.dt_rank, c.dt_rank + c.state], axis=-1)
    dt_kernel = weight(self, 'dt_kernel', (c.dt_rank, c.d_inner), (None, 'heads'), uniform(c.dt_rank**-0.5))
    dt_bias = weight(self, 'dt_bias', (c.d_inner,), ('heads',), inverse_softplus_dt(), full_precision=True)
    a_log = weight(self, 'A_log', (c.d_inner, c.state), ('heads', None), s4d_real_a, full_precision=True)
    skip = weight(self, 'D', (c.d_inner,), ('heads',), constant(1.0), full_precision=True)
    dt_BTE = jax.nn.softplus(linear(dt_BTR, dt_kernel).astype(acc) + dt_bias.astype(acc))
    operands = {
      'x': (ctx.constrain(x_BTE, HEADS), HEADS),
      'dt': (ctx.constrain(dt_BTE, HEADS), HEADS),
      'A': (-jnp.exp(a_log.astype(acc)), ('heads', None)),
      # Every device reads all of B and C; their gradients, sums over its channels, are added over the mesh in acc.
      'B': (b_BTN.astype(acc), ('batch', 'length', None)),
      'C': (c_BTN.astype(acc), ('batch', 'length', None)),
      'D': (skip.astype(acc), ('heads',)),
      'z': (z_BTE, HEADS),
      'initial_state': (None if cache is None else entering(cache['state'], ctx), STATE),
      'segment_ids': (ctx.segment_ids, TOKENS),
    }
    options = {'chunk': c.chunk or None, 'implementation': named(c.implementation)}
    op = functools.partial(selective_scan, **options, deterministic=ctx.deterministic)
    y_BTE, state = ctx.local(op, operands, (HEADS, STATE))
    y_BTE = ctx.constrain(y_BTE, HEADS)
    init = fan_in_uniform(c.d_inner, 1 / math.sqrt(len(config.layers)))
    out = linear(y_BTE, weight(self, 'out_kernel', (c.d_inner, d), ('heads', 'embed'), init))
    return out, None if cache is None else {'window': window, 'state': state}

  @staticmethod
  def cache_specs(config: ModelConfig, batch: int, length: int, dtype: Any) -> dict[str, CacheSpec]:
    c = config.mamba
    return {
      'window': CacheSpec((batch, c.conv - 1, c.d_inner), dtype, ('batch', None, 'heads')),
      'state': CacheSpec((batch, c.d_inner, c.state), accumulator(dtype), STATE),
    }

  @staticmethod
  def flops(config: ModelConfig, seq_len: int, causal: bool) -> int:
    """The scan has no matrix form: SCAN_FLOPS elementwise FLOPs per channel and state."""
    c = config.mamba
    outer = 2 * config.d_model * 3 * c.d_inner
    inner = 2 * c.d_inner * (2 * c.dt_rank + 2 * c.state)  # x to (dt, B, C), and dt up again
    return outer + inner + 2 * c.conv * c.d_inner + SCAN_FLOPS * c.d_inner * c.state
