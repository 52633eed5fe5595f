"""RMSNorm, LayerNorm, LayerNorm-1p and Mamba-2's grouped gated RMSNorm. Statistics are at least float32."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmscale.config import ModelConfig
from lmscale.models.context import Context
from lmscale.models.params import constant, weight


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
  """The dtype of statistics and sums beside data of `dtype`: float32, or float64 in a float64 run."""
  return jnp.promote_types(jnp.float32, dtype)


def norm(module: nn.Module, config: ModelConfig, x_BTD: jax.Array) -> jax.Array:
  """Normalises the last dim of x [..., D] with the model's norm; declares norm_scale (and norm_bias) on `module`.

  layernorm1p stores the scale's offset from 1 (as Megatron-LM and Nemotron checkpoints do).
  """
  d = config.d_model
  centred = config.norm != 'rmsnorm'
  offset = config.norm == 'layernorm1p'
  scale = weight(module, 'norm_scale', (d,), ('embed',), constant(0.0 if offset else 1.0), full_precision=True)
  x = x_BTD.astype(accumulator(x_BTD.dtype))
  if centred:
    x = x - x.mean(-1, keepdims=True)
  x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + config.norm_eps)
  x = x * (1.0 + scale if offset else scale)
  if centred:
    x = x + weight(module, 'norm_bias', (d,), ('embed',), constant(0.0), full_precision=True)
  return x.astype(x_BTD.dtype)


def gated_group_norm(
  y_BTHP: jax.Array, z_BTHP: jax.Array, scale_HP: jax.Array, groups: int, eps: float, ctx: Context
) -> jax.Array:
  """Mamba-2's output norm: y * silu(z), then RMSNorm over each group's heads (arXiv 2405.21060, section 7.2).

  y, z: [b, t, h, p] with h divisible by `groups`; scale: [h, p]. Returns [b, t, h, p] in y's dtype.
  Where the mesh does not cut the heads along group borders, the sums of squares of a group are added over the mesh:
  one reduction of [b, t, groups].
  """
  dtype = y_BTHP.dtype
  b, t, h, p = y_BTHP.shape
  acc = accumulator(dtype)
  y = y_BTHP.astype(acc) * nn.silu(z_BTHP.astype(acc))
  squares_BTH = jnp.square(y).sum(-1)
  if groups % ctx.tensor == 0:
    squares_BTG = squares_BTH.reshape(b, t, groups, h // groups).sum(-1)
    inverse_BTG = jax.lax.rsqrt(squares_BTG / (h // groups * p) + eps)
    inverse_BTH = jnp.repeat(inverse_BTG, h // groups, axis=-1)
  else:
    member_HG = jnp.repeat(jnp.eye(groups, dtype=acc), h // groups, axis=0)
    squares_BTG = jnp.einsum('bth,hg->btg', squares_BTH, member_HG, precision='highest')
    squares_BTG = ctx.constrain(squares_BTG, ('batch', 'length', None))
    inverse_BTG = jax.lax.rsqrt(squares_BTG / (h // groups * p) + eps)
    inverse_BTH = jnp.einsum('btg,hg->bth', inverse_BTG, member_HG, precision='highest')
  inverse_BTH = ctx.constrain(inverse_BTH, ('batch', 'length', 'heads'))
  return (y * inverse_BTH[..., None] * scale_HP).astype(dtype)
