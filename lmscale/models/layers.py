"""The four layer kinds, as Linen modules under one contract: (x, ctx, cache) -> (x, cache).

Each layer is a mixer with its own pre-norm and residual. x: [b, t, d_model] in the compute dtype. cache: None in training,
else a dict of arrays that `empty_cache` makes.
Projections are separate matrices, so that heads and groups are cut over the mesh without reshuffling.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmscale.config import Mamba2Config, MambaConfig, ModelConfig
from lmscale.kernels.attention import attention
from lmscale.kernels.causal_conv import causal_conv
from lmscale.kernels.linear import linear
from lmscale.kernels.selective_scan import selective_scan
from lmscale.kernels.ssd import ssd
from lmscale.models.context import Context
from lmscale.models.norms import accumulator, gated_group_norm, keep_inputs, norm
from lmscale.models.params import (
  constant,
  fan_in_uniform,
  inverse_softplus_dt,
  log_uniform_a,
  normal,
  s4d_real_a,
  uniform,
  weight,
)

Cache = dict[str, jax.Array]
RESIDUAL = ('batch', 'seq', 'embed')  # the stream between mixers; `seq` is cut under sequence parallelism
HEADS = ('batch', 'length', 'heads')  # a number per token and head, or the channels of the heads one after another
PER_HEAD = ('batch', 'length', 'heads', None)  # a vector per token and head
TOKENS = ('batch', 'length')
MIXER_INPUT = ('batch', 'length', 'embed')  # inside a mixer every device sees the whole sequence


class Layer(nn.Module):
  """Pre-norm, mixer, residual. Subclasses define `mix`."""

  config: ModelConfig

  def mix(self, h_BTD: jax.Array, ctx: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
    """The mixer: normalised input [b, t, D] -> output [b, t, D] and the new cache."""
    raise TypeError(f'{type(self).__name__} defines no mixer')

  @nn.compact
  def __call__(self, x_BTD: jax.Array, ctx: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
    h_BTD = ctx.constrain(norm(self, self.config, x_BTD), MIXER_INPUT)
    out_BTD, cache = self.mix(h_BTD, ctx, cache)
    return x_BTD + ctx.constrain(out_BTD, RESIDUAL), cache

  def output_std(self) -> float:
    """Initial std of the maps that write to the residual stream: init_std / sqrt(number of layers)."""
    return self.config.init_std / math.sqrt(len(self.config.layers))

  def linear(self, name: str, x: jax.Array, size: int, axes: tuple[str, str], init: Any) -> jax.Array:
    """x @ <name>_kernel (+ <name>_bias where the model has biases). x: [..., in] -> [..., size]."""
    kernel = weight(self, f'{name}_kernel', (x.shape[-1], size), axes, init)
    y = linear(x, kernel)
    if self.config.bias:
      acc = accumulator(y.dtype)  # in which the gradient of the bias is then summed over tokens
      bias = weight(self, f'{name}_bias', (size,), (axes[1],), constant(0.0))
      y = (y.astype(acc) + bias.astype(acc)).astype(y.dtype)
    return y


class Attention(Layer):
  """Causal softmax attention: MHA, GQA or MQA; RoPE on a fraction of each head, or no positions."""

  def mix(self, h_BTD: jax.Array, ctx: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
    config, c = self.config, self.config.attention
    b, t, _ = h_BTD.shape
    init = normal(config.init_std)
    q = self.linear('q', h_BTD, c.heads * c.head_dim, ('embed', 'heads'), init)
    k = self.linear('k', h_BTD, c.kv_heads * c.head_dim, ('embed', 'kv_heads'), init)
    v = self.linear('v', h_BTD, c.kv_heads * c.head_dim, ('embed', 'kv_heads'), init)
    q_BTHP = ctx.constrain(q.reshape(b, t, c.heads, c.head_dim), PER_HEAD)
    k_BTGP = k.reshape(b, t, c.kv_heads, c.head_dim)
    v_BTGP = v.reshape(b, t, c.kv_heads, c.head_dim)
    if config.positions == 'rope':
      q_BTHP = rope(q_BTHP, ctx.positions, config.rope_fraction, config.rope_base)
      k_BTGP = rope(k_BTGP, ctx.positions, config.rope_fraction, config.rope_base)
    where = {'segments': (ctx.segment_ids, TOKENS)}
    if cache is not None:
      k_BTGP, v_BTGP = _write(cache['k'], k_BTGP, ctx.positions), _write(cache['v'], v_BTGP, ctx.positions)
      cache = {'k': k_BTGP, 'v': v_BTGP}
      where = {'positions': (ctx.positions, TOKENS)}
    k_BTGP, v_BTGP = cut_groups(k_BTGP, ctx), cut_groups(v_BTGP, ctx)
    operands = {'q': (q_BTHP, PER_HEAD), 'k': (k_BTGP, PER_HEAD), 'v': (v_BTGP, PER_HEAD), **where}
    (y_BTHP,) = ctx.local(functools.partial(_attend, _named(c.implementation)), operands, (PER_HEAD,))
    y = ctx.constrain(y_BTHP, PER_HEAD).reshape(b, t, c.heads * c.head_dim)
    return self.linear('out', y, config.d_model, ('heads', 'embed'), normal(self.output_std())), cache


class MLP(Layer):
  """Two linear maps around an activation; SwiGLU and GEGLU gate with a third."""

  def mix(self, h_BTD: jax.Array, ctx: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
    config, d_ff = self.config, self.config.mlp.d_ff
    init = normal(config.init_std)
    up_BTF = self.linear('up', h_BTD, d_ff, ('embed', 'ff'), init)
    kind = config.mlp.activation
    if kind in GATED:
      gate_BTF = self.linear('gate', h_BTD, d_ff, ('embed', 'ff'), init)
      a_BTF = keep_inputs(lambda gate, up: GATED[kind](gate) * up)(gate_BTF, up_BTF)
    else:
      a_BTF = keep_inputs(ACTIVATIONS[kind])(up_BTF)
    a_BTF = ctx.constrain(a_BTF, ('batch', 'length', 'ff'))
    return self.linear('down', a_BTF, config.d_model, ('ff', 'embed'), normal(self.output_std())), cache


class Mamba2(Layer):
  """Mamba-2 (arXiv 2405.21060) with Megatron's shapes: B and C per group, gate first, then a norm per group."""

  def mix(self, h_BTD: jax.Array, ctx: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
    config, c = self.config, self.config.mamba2
    b, t, d = h_BTD.shape
    inner, grouped = c.heads * c.head_dim, c.groups * c.state
    acc = accumulator(h_BTD.dtype)
    init = normal(config.init_std)
    kernels = {
      name: weight(self, f'{name}_kernel', (d, size), ('embed', axis), init)
      for name, size, axis in (
        ('z', inner, 'heads'),
        ('x', inner, 'heads'),
        ('B', grouped, 'groups'),
        ('C', grouped, 'groups'),
        ('dt', c.heads, 'heads'),
      )
    }
    new_cache = {}
    conv = {}
    for name, size, axis in (('x', inner, 'heads'), ('B', grouped, 'groups'), ('C', grouped, 'groups')):
      conv[name], new_cache[f'window_{name}'] = self._conv(name, linear(h_BTD, kernels[name]), size, axis, ctx, cache)
    dt_bias = weight(self, 'dt_bias', (c.heads,), ('heads',), inverse_softplus_dt(), full_precision=True)
    a_log = weight(self, 'A_log', (c.heads,), ('heads',), log_uniform_a(1.0, 16.0), full_precision=True)
    skip = weight(self, 'D', (c.heads,), ('heads',), constant(1.0), full_precision=True)
    x_BTHP = ctx.constrain(conv['x'].reshape(b, t, c.heads, c.head_dim), PER_HEAD)
    dt_BTH = jax.nn.softplus(linear(h_BTD, kernels['dt']).astype(acc) + dt_bias.astype(acc))
    operands = {
      'x': (x_BTHP, PER_HEAD),
      'dt': (ctx.constrain(dt_BTH, HEADS), HEADS),
      'A': (-jnp.exp(a_log.astype(acc)), ('heads',)),
      'B': (cut_groups(conv['B'].reshape(b, t, c.groups, c.state), ctx), PER_HEAD),
      'C': (cut_groups(conv['C'].reshape(b, t, c.groups, c.state), ctx), PER_HEAD),
      'D': (skip.astype(acc), ('heads',)),
      'initial_state': (None if cache is None else cache['state'], ('batch', 'heads', None, None)),
      'segment_ids': (ctx.segment_ids, TOKENS),
    }
    op = functools.partial(ssd, **_options(c), deterministic=ctx.deterministic)
    y_BTHP, new_cache['state'] = ctx.local(op, operands, (PER_HEAD, ('batch', 'heads', None, None)))
    scale = weight(self, 'gate_norm_scale', (inner,), ('heads',), constant(1.0), full_precision=True)
    z_BTHP = linear(h_BTD, kernels['z']).reshape(b, t, c.heads, c.head_dim)
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
      initial_window=None if cache is None else cache[f'window_{name}'],
      segment_ids=ctx.segment_ids,
    )


class Mamba(Layer):
  """Mamba-1 (arXiv 2312.00752): a selective scan with a decay per channel and state."""

  def mix(self, h_BTD: jax.Array, ctx: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
    config, c = self.config, self.config.mamba
    d = h_BTD.shape[-1]
    acc = accumulator(h_BTD.dtype)
    x_BTE = linear(h_BTD, weight(self, 'x_kernel', (d, c.d_inner), ('embed', 'heads'), fan_in_uniform(d)))
    z_BTE = linear(h_BTD, weight(self, 'z_kernel', (d, c.d_inner), ('embed', 'heads'), fan_in_uniform(d)))
    x_BTE, window = causal_conv(
      x_BTE,
      weight(self, 'conv_kernel', (c.conv, c.d_inner), (None, 'heads'), fan_in_uniform(c.conv)),
      weight(self, 'conv_bias', (c.d_inner,), ('heads',), fan_in_uniform(c.conv)),
      initial_window=None if cache is None else cache['window'],
      segment_ids=ctx.segment_ids,
    )
    width = c.dt_rank + 2 * c.state
    bcdt_kernel = weight(self, 'bcdt_kernel', (c.d_inner, width), ('heads', None), fan_in_uniform(c.d_inner))
    # One reduction over the mesh for dt's low-rank input, B and C together.
    bcdt = ctx.constrain(linear(x_BTE, bcdt_kernel), ('batch', 'length', None))
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
      'initial_state': (None if cache is None else cache['state'], ('batch', 'heads', None)),
      'segment_ids': (ctx.segment_ids, TOKENS),
    }
    op = functools.partial(selective_scan, **_options(c), deterministic=ctx.deterministic)
    y_BTE, state = ctx.local(op, operands, (HEADS, ('batch', 'heads', None)))
    y_BTE = ctx.constrain(y_BTE, HEADS)
    init = fan_in_uniform(c.d_inner, 1 / math.sqrt(len(config.layers)))
    out = linear(y_BTE, weight(self, 'out_kernel', (c.d_inner, d), ('heads', 'embed'), init))
    return out, None if cache is None else {'window': window, 'state': state}


LAYERS: dict[str, type[Layer]] = {'M': Mamba2, 'm': Mamba, '*': Attention, '-': MLP}
ACTIVATIONS = {
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
  'relu2': lambda x: jnp.square(jax.nn.relu(x)),
}
GATED = {'swiglu': jax.nn.silu, 'geglu': lambda x: jax.nn.gelu(x, approximate=False)}


def empty_cache(config: ModelConfig, kind: str, batch: int, length: int, dtype: Any) -> Cache:
  """The cache of one layer before the first token: KV for `length` tokens, convolution windows, SSM state.

  SSM states are kept in at least float32; keys, values and windows in `dtype`.
  """
  acc = accumulator(dtype)
  if kind == '*':
    shape = (batch, length, config.attention.kv_heads, config.attention.head_dim)
    return {'k': jnp.zeros(shape, dtype), 'v': jnp.zeros(shape, dtype)}
  if kind == 'M':
    c = config.mamba2
    sizes = {'x': c.heads * c.head_dim, 'B': c.groups * c.state, 'C': c.groups * c.state}
    windows = {f'window_{name}': jnp.zeros((batch, c.conv - 1, size), dtype) for name, size in sizes.items()}
    return windows | {'state': jnp.zeros((batch, c.heads, c.head_dim, c.state), acc)}
  if kind == 'm':
    c = config.mamba
    window = jnp.zeros((batch, c.conv - 1, c.d_inner), dtype)
    return {'window': window, 'state': jnp.zeros((batch, c.d_inner, c.state), acc)}
  return {}


def rope(x_BTHP: jax.Array, positions_BT: jax.Array, fraction: float, base: float) -> jax.Array:
  """Rotary positions (arXiv 2104.09864) on the first `fraction` of each head, halves rotated against each other."""
  rotary = int(x_BTHP.shape[-1] * fraction)
  acc = accumulator(x_BTHP.dtype)
  inverse = base ** (-jnp.arange(0, rotary, 2, dtype=acc) / rotary)
  angle = positions_BT[..., None, None].astype(acc) * inverse
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  first, second, rest = jnp.split(x_BTHP.astype(acc), [rotary // 2, rotary], axis=-1)
  rotated = [first * cos - second * sin, second * cos + first * sin, rest]
  return jnp.concatenate(rotated, axis=-1).astype(x_BTHP.dtype)


def cut_groups(x_BTGN: jax.Array, ctx: Context) -> jax.Array:
  """Repeats groups (or KV heads) until the mesh can cut them: to lcm(groups, tensor). [b, t, g, n] -> [b, t, g', n].

  Each device then holds just the groups its heads read. Where `tensor` divides the groups nothing is repeated.
  """
  groups = x_BTGN.shape[2]
  repeats = math.lcm(groups, ctx.tensor) // groups
  if repeats > 1:
    x_BTGN = jnp.repeat(x_BTGN, repeats, axis=2)
  return ctx.constrain(x_BTGN, PER_HEAD)


def _options(c: Mamba2Config | MambaConfig) -> dict[str, Any]:
  """The kernel arguments that a config names; what it leaves open the kernel chooses."""
  return {'chunk': c.chunk or None, 'implementation': _named(c.implementation)}


def _named(implementation: str) -> str | None:
  return None if implementation == 'auto' else implementation


def _attend(
  implementation: str | None, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None = None,
  positions: jax.Array | None = None,
) -> tuple[jax.Array]:  # fmt: skip
  """Attention of tokens to one another, or with `positions` [b, t] to the slots 0..s-1 of a cache (always in XLA)."""
  if positions is None:
    return (attention(q, k, v, q_segments=segments, k_segments=segments, implementation=implementation),)
  slots = jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.int32), k.shape[:2])
  return (attention(q, k, v, q_positions=positions, k_positions=slots, implementation='xla'),)


def _write(cache_BSGP: jax.Array, new_BTGP: jax.Array, positions_BT: jax.Array) -> jax.Array:
  """Puts t new keys or values where their positions say, row by row."""

  def write(row, new, start):
    return jax.lax.dynamic_update_slice(row, new.astype(row.dtype), (start, 0, 0))

  return jax.vmap(write)(cache_BSGP, new_BTGP, positions_BT[:, 0])
