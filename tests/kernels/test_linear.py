"""The layers' matrix product: the plain one, with its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmscale.kernels import choice
from lmscale.kernels.linear import linear, projections, several_rows


def both(function, dtype):
  x = jax.random.normal(jax.random.key(0), (2, 5, 3), dtype)
  kernel = jax.random.normal(jax.random.key(1), (3, 4), dtype)
  dy = jax.random.normal(jax.random.key(2), (2, 5, 4), dtype)
  y, vjp = jax.vjp(function, x, kernel)
  return y, *vjp(dy)


def test_values_and_gradients_are_those_of_the_plain_product():
  with jax.enable_x64(True):
    for ours, plain in zip(both(linear, 'float64'), both(jnp.matmul, 'float64'), strict=True):
      np.testing.assert_allclose(ours, plain, rtol=1e-12)


def test_the_gradient_contracts_tokens_as_one_axis():
  """Two contracted axes are what XLA for CPUs transposes."""
  text = str(jax.make_jaxpr(lambda: both(linear, 'float32'))())
  assert 'dimension_numbers=(([0, 1], [0, 1])' not in text
  assert 'dimension_numbers=(([0, 1], [0, 1])' in str(jax.make_jaxpr(lambda: both(jnp.matmul, 'float32'))())


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_dtypes_are_kept(dtype):
  assert {array.dtype for array in both(linear, dtype)} == {jnp.dtype(dtype)}


def test_one_row_is_padded_on_a_gpu_and_changes_nothing(monkeypatch):
  x, kernel = jax.random.normal(jax.random.key(0), (1, 1, 3)), jax.random.normal(jax.random.key(1), (3, 4))
  plain = str(jax.make_jaxpr(lambda x, kernel: linear(x, kernel))(x, kernel))
  monkeypatch.setattr(choice, 'backend', lambda: 'gpu')
  assert 'pad[' in str(jax.make_jaxpr(lambda x, kernel: linear(x, kernel))(x, kernel)) and 'pad[' not in plain
  np.testing.assert_allclose(linear(x, kernel), x @ kernel, rtol=1e-6)
  for one, want in zip(projections(lambda m: m, x, (kernel, -kernel)), (x @ kernel, x @ -kernel), strict=True):
    np.testing.assert_allclose(one, want, rtol=1e-6)
  assert several_rows(jnp.zeros((2, 1, 3))).shape == (2, 2, 3) and several_rows(jnp.zeros((2, 3, 3))).shape == (2, 3, 3)
