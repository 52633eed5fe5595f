"""The matrix products of a layer, with a gradient of the matrix that contracts tokens along one axis.

Differentiating x @ W contracts batch and time, two axes, which XLA for CPUs does by transposing what the layer after it
hands back, computed a second time for that, which takes longer than the product.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lmscale.kernels import choice


def several_rows(m: jax.Array) -> jax.Array:
  """[..., 1, in] with a row of zeros below it where that helps: XLA for GPUs makes of a matrix and one row a sum of products, which
  it writes down in float32 and reads again, two to three times the bytes of the matrix."""
  if m.shape[-2] > 1 or choice.backend() != 'gpu':
    return m
  return jnp.pad(m, ((0, 0),) * (m.ndim - 2) + ((0, 1), (0, 0)))


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x @ kernel: [..., in], [in, out] -> [..., out], both of one dtype. Differentiable once, in reverse."""
  if x.size == x.shape[-1]:
    return (several_rows(x.reshape(1, -1)) @ kernel)[:1].reshape(*x.shape[:-1], -1)
  return x @ kernel


def _forward(x, kernel):
  return x @ kernel, (x, kernel)


def _backward(saved, dy):
  x, kernel = saved
  # One flat dy for both uses: of a dy and a reshaped one the partitioner would gather each.
  dy = dy.reshape(-1, dy.shape[-1])
  return (dy @ kernel.T).reshape(x.shape), x.reshape(-1, x.shape[-1]).T @ dy


linear.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def projections(whole: Callable[[jax.Array], jax.Array], x: jax.Array, kernels: tuple[jax.Array, ...]) -> list[jax.Array]:
  """whole(x) @ kernel for each kernel: [b, t, in], [in, out] -> [b, t, out], all of one dtype. Differentiable once, in reverse.

  whole: places an array like x whole on every device of `tensor` (the identity without a mesh). Kept for the backward pass
  is x as it lies, not what `whole` brings together: where x is cut along t that is done once more, as Megatron-LM does
  (arXiv 2205.05198, section 4.2.2).
  """
  x = whole(x)
  return [linear(x, kernel) for kernel in kernels]


def _projections_forward(whole, x, kernels):
  return projections(whole, x, kernels), (x, kernels)


def _projections_backward(whole, saved, dys):
  x, kernels = saved
  x = whole(x)
  dxs, dkernels = zip(*(_backward((x, kernel), dy) for kernel, dy in zip(kernels, dys, strict=True)), strict=True)
  return whole(functools.reduce(jnp.add, reversed(dxs))), dkernels


projections.defvjp(_projections_forward, _projections_backward)
