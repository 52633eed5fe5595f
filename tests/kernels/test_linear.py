"""The layers' matrix product: the plain one, with its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmscale.kernels.linear import linear


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
