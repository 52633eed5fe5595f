"""RMSNorm, LayerNorm, LayerNorm-1p and Mamba-2's grouped gated RMSNorm. Statistics are at least float32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmscale.config import ModelConfig
from lmscale.kernels import gated_norm
from lmscale.models.context import Context
from lmscale.models.params import constant, weight


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
  """The dtype of statistics and sums beside data of `dtype`: float32, or float64 in a float64 run."""
  return jnp.promote_types(jnp.float32, dtype)


def keep_inputs(function: Callable) -> Callable:
  """`function`, of which only the inputs are kept for the backward pass: for what is cheap to compute once more.

  In a loop over layers, that is; of layers outside one the compiler may see that it could keep the results.
  (A jax.checkpoint would do, but not inside another one, whose policy then counts instead.)
  """
  kept = jax.custom_vjp(function)
  kept.defvjp(lambda *inputs: (function(*inputs), inputs), lambda inputs, dy: jax.vjp(function, *inputs)[1](dy))
  return kept


def norm(module: nn.Module, config: ModelConfig, x_BTD: jax.Array) -> jax.Array:
  """Normalises the last dim of x [..., D] with the model's norm; declares norm_scale (and norm_bias) on `module`.

  layernorm1p stores the scale's offset from 1 (as Megatron-LM and Nemotron checkpoints do).
  """
  d = config.d_model
  centred = config.norm != 'rmsnorm'
  offset = config.norm == 'layernorm1p'
  scale = weight(module, 'norm_scale', (d,), ('embed',), constant(0.0 if offset else 1.0), full_precision=True)
  bias = weight(module, 'norm_bias', (d,), ('embed',), constant(0.0), full_precision=True) if centred else 0.0

  def normalise(x_BTD: jax.Array, scale: jax.Array, bias: jax.Array | float) -> jax.Array:
    x, eps = tame(x_BTD.astype(accumulator(x_BTD.dtype)), config.norm_eps)
    if centred:
      x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)
    return (x * (1.0 + scale if offset else scale) + bias).astype(x_BTD.dtype)

  return keep_inputs(normalise)(x_BTD, scale, bias)


def tame(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
  """(x, eps) for a norm over the last dim; rows above 2^48 (2^384 in float64) times a power of two, so that squares fit.

  The factor cancels in the norm, to the bit. Beside such rows eps is nothing; a small one keeps equal numbers from 0 / 0.
  """
  info = jnp.finfo(x.dtype)
  most = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=-1, keepdims=True)
  large = most > 2.0 ** (info.maxexp * 3 // 8)
  power = jax.lax.reduce_precision(most / 16, info.nexp, 0)
  small_eps = 2.0 ** (-5 * info.nmant // 2 - 22)
  return x * jnp.where(large, 1 / power, 1).astype(x.dtype), jnp.where(large, small_eps, eps).astype(x.dtype)


def gated_group_norm(
  y_BTHP: jax.Array, z_BTHP: jax.Array, scale_HP: jax.Array, groups: int, eps: float, ctx: Context
) -> jax.Array:
  """Mamba-2's output norm: y * silu(z), then RMSNorm over each group's heads (arXiv 2405.21060, section 7.2).

  y, z: [b, t, h, p] with h divisible by `groups`; scale: [h, p]. Returns [b, t, h, p] in y's dtype.
  Where the mesh does not cut the heads along group borders, the sums of squares of a group are added over the mesh:
  one reduction of [b, t, groups] in each pass.
  """

  def group_sum(m_BTH: jax.Array, groups: int) -> jax.Array:
    h = m_BTH.shape[2]
    if groups % ctx.tensor == 0:
      sums_BTH = gated_norm.group_sum(m_BTH, groups)
    else:
      member_HG = jnp.repeat(jnp.eye(groups, dtype=m_BTH.dtype), h // groups, axis=0)
      sums_BTG = jnp.einsum('bth,hg->btg', m_BTH, member_HG, precision='highest')
      sums_BTG = ctx.constrain(sums_BTG, ('batch', 'length', None))
      sums_BTH = jnp.einsum('btg,hg->bth', sums_BTG, member_HG, precision='highest')
    return ctx.constrain(sums_BTH, ('batch', 'length', 'heads'))

  return gated_norm.gated_norm(y_BTHP, z_BTHP, scale_HP, groups, eps, group_sum=group_sum)
