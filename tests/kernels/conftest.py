"""Helpers of the kernel tests, as fixtures."""

import jax
import numpy as np
import pytest


def _sizes(jaxpr):
  """The element count of every array a jaxpr makes, in all its inner jaxprs too."""
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      yield int(np.prod(getattr(variable.aval, 'shape', ())))
    for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        yield from _sizes(inner)


@pytest.fixture
def largest_array():
  """largest_array(function, *arguments): elements of the largest array that tracing the function shows."""
  return lambda function, *arguments: max(_sizes(jax.make_jaxpr(function)(*arguments).jaxpr))


@pytest.fixture
def assert_close():
  """assert_close(got, want, tolerance): per leaf, max |got - want| <= tolerance * max |want|."""

  def check(got, want, tolerance):
    got, want = (jax.tree_util.tree_leaves_with_path(tree) for tree in (got, want))
    assert [path for path, _ in got] == [path for path, _ in want]
    for (path, a), (_, b) in zip(got, want, strict=True):
      a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
      assert a.shape == b.shape, path
      assert np.isfinite(a).all(), path
      error, scale = np.abs(a - b).max(initial=0), np.abs(b).max(initial=0)
      assert error <= tolerance * scale, f'{jax.tree_util.keystr(path)}: error {error:.3g}, scale {scale:.3g}'

  return check
