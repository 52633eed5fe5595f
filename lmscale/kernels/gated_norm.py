"""RMSNorm over groups of heads with a SiLU gate: Mamba-2's output norm (arXiv 2405.21060, section 7.2).

Between the passes only the inputs are kept, in their own dtypes. The backward pass makes the gate and the statistics
again while it reads the same arrays that it needs anyway.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

GroupSum = Callable[[jax.Array, int], jax.Array]


def group_sum(m_BTH: jax.Array, groups: int) -> jax.Array:
  """Replaces every head's number by the sum over its group's heads. [b, t, h] -> [b, t, h]."""
  b, t, h = m_BTH.shape
  return jnp.repeat(m_BTH.reshape(b, t, groups, h // groups).sum(-1), h // groups, axis=-1)


def gated_norm(
  y: jax.Array,
  z: jax.Array,
  scale: jax.Array,
  groups: int,
  eps: float,
  *,
  gate_first: bool = True,
  group_sum: GroupSum = group_sum,
) -> jax.Array:
  """u / sqrt(mean of u^2 over the group + eps) * scale with u = y * silu(z).

  With gate_first False the gate comes last: y is normalised and scaled, then multiplied by silu(z).
  All inside is in acc = promote_types(float32, y.dtype); the gradients have the dtypes of their arguments.

  Args:
    y, z: [b, t, h, p].
    scale: [h, p].
    groups: heads (h / groups) i .. (h / groups) (i + 1) - 1 are normalised together.
    eps: added to the mean square.
    group_sum: `group_sum` of this module, or a function equal to it that knows how the heads are sharded.

  Returns:
    [b, t, h, p] in y.dtype; NaN in a group whose sum of squares overflows acc.

  Raises:
    ValueError: shapes that do not fit, or heads that do not divide into groups.
  """
  if y.ndim != 4 or z.shape != y.shape or scale.shape != y.shape[2:]:
    raise ValueError(f'gated_norm: y {y.shape}, z {z.shape} and scale {scale.shape} do not fit')
  if groups < 1 or y.shape[2] % groups:
    raise ValueError(f'gated_norm: {y.shape[2]} heads do not divide into {groups} groups')
  return _gated_norm(y, z, scale, groups, eps, gate_first, group_sum)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _gated_norm(y, z, scale, groups, eps, gate_first, group_sum):
  dtype = y.dtype
  y, z, scale = _accumulators(y, z, scale)
  if gate_first:
    u = y * jax.nn.silu(z)
    out = u * _inverse_rms(u, groups, eps, group_sum) * scale
  else:
    out = y * _inverse_rms(y, groups, eps, group_sum) * scale * jax.nn.silu(z)
  return out.astype(dtype)


def _gated_norm_fwd(y, z, scale, *static):
  return _gated_norm(y, z, scale, *static), (y, z, scale)


def _gated_norm_bwd(groups, eps, gate_first, group_sum, inputs, dout):
  y, z, scale = _accumulators(*inputs)
  gate, gate_vjp = jax.vjp(jax.nn.silu, z)
  dout = dout.astype(y.dtype)
  u, du_out = (y * gate, dout) if gate_first else (y, dout * gate)
  # out = u r w with r = rsqrt(S / size + eps), S the group's sum of u^2, so dr/du = -r^3 u / size.
  inverse = _inverse_rms(u, groups, eps, group_sum)
  size = y.shape[2] // groups * y.shape[3]
  along = group_sum(jnp.sum(u * du_out * scale, -1), groups)[..., None] / size
  du = inverse * (du_out * scale - u * (along * jnp.square(inverse)))
  dscale = jnp.sum(du_out * u * inverse, (0, 1))
  if gate_first:
    dy, (dz,) = du * gate, gate_vjp(du * y)
  else:
    dy, (dz,) = du, gate_vjp(dout * u * inverse * scale)
  return tuple(gradient.astype(value.dtype) for gradient, value in zip((dy, dz, dscale), inputs, strict=True))


_gated_norm.defvjp(_gated_norm_fwd, _gated_norm_bwd)


def _accumulators(y, z, scale):
  acc = jnp.promote_types(jnp.float32, y.dtype)
  return y.astype(acc), z.astype(acc), scale.astype(acc)


def _inverse_rms(u, groups, eps, group_sum):
  """[b, t, h, 1]: 1 / sqrt(mean over the group of u^2 + eps); NaN where the sum overflows, which would make 0 of it in silence."""
  size = u.shape[2] // groups * u.shape[3]
  sums = group_sum(jnp.square(u).sum(-1), groups)
  return jnp.where(sums < jnp.inf, jax.lax.rsqrt(sums / size + eps), jnp.nan)[..., None]
