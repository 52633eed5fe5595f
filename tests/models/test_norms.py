"""Norms of numbers of any size: values and gradients against float64, and ordinary rows unchanged in every bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from lmscale.models.norms import norm

SIZES = [1e-30, 1.0, 1e10, 3e14, 1e19, 3e19, 1e30, 3.3e38]
NORMS = ['rmsnorm', 'layernorm', 'layernorm1p']


class _Norm(nn.Module):
  config: object

  @nn.compact
  def __call__(self, x):
    return norm(self, self.config, x)


@functools.partial(jax.jit, static_argnums=0)
def _differentiate(name, x, weights):
  """(output, gradients of a weighted sum of it by parameters and input)."""
  module = _Norm(tiny.change(tiny.MODEL, norm=name))
  params = {'norm_scale': jnp.linspace(0.5, 2, 16), 'norm_bias': jnp.linspace(-1, 1, 16)}
  params = {k: v.astype(jnp.promote_types(jnp.float32, x.dtype)) for k, v in params.items()}
  params = params if name != 'rmsnorm' else {'norm_scale': params['norm_scale']}

  def loss(params, x):
    y = module.apply({'params': params}, x)
    return jnp.sum(weights * y.astype(weights.dtype)), y

  (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
  return y, grads


def assert_rows_close(got, want, rows, relative):
  """Row by row, or leaf by leaf where a leaf is a sum over rows: each against its own largest number."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    a, b = (m.reshape(rows, -1) if m.shape[:1] == (rows,) else m.reshape(1, -1) for m in (a, b))
    bound = relative * np.abs(b).max(1, keepdims=True) + 3e-38  # what is smaller, XLA on CPUs makes zero
    assert (np.abs(a - b) <= bound).all(), (np.abs(a - b) / bound).max(1)


@pytest.mark.parametrize('name', NORMS)
def test_norms_are_exact_for_all_finite_inputs(name):
  rows = np.random.default_rng(0).normal(size=(len(SIZES), 16))
  rows = rows / np.abs(rows).max(1, keepdims=True) * np.array(SIZES)[:, None]
  weights = np.random.default_rng(1).normal(size=rows.shape)
  for dtype, relative in ((jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)):
    x = jnp.asarray(rows, dtype)
    got = _differentiate(name, x, jnp.asarray(weights, jnp.float32))
    with jax.enable_x64(True):
      want = _differentiate(name, jnp.asarray(np.asarray(x, np.float64)), jnp.asarray(weights, jnp.float64))
    assert_rows_close(got, want, len(SIZES), relative)
  equal = _differentiate(name, jnp.full((1, 16), 2.0**100), jnp.asarray(weights[:1], jnp.float32))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(equal))
