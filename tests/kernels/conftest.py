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
def kept_bytes():
  """kept_bytes(function, *arguments): bytes that jax.vjp keeps for the backward pass with respect to the first."""

  def measure(function, first, *rest):
    kept = jax.eval_shape(lambda first, rest: jax.vjp(lambda first: function(first, *rest), first)[1], first, rest)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))

  return measure


@pytest.fixture
def assert_close():
  """The kernel tests' one comparison, see `_assert_close`."""
  return _assert_close


def _assert_close(got, want, relative, absolute=None):
  """Per leaf: rms(got - want) <= relative * rms(want), and max |got - want| <= absolute; both are printed.

  absolute None stands for relative * max |want|. Trees and shapes must agree, and nothing may be NaN or Inf.
  """
  got, want = (jax.tree_util.tree_leaves_with_path(tree) for tree in (got, want))
  assert [path for path, _ in got] == [path for path, _ in want]
  report, failed = [], False
  for (path, a), (_, b) in zip(got, want, strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, f'{jax.tree_util.keystr(path)}: shape {a.shape}, wanted {b.shape}'
    assert np.isfinite(a).all(), f'{jax.tree_util.keystr(path)}: not finite'
    error, scale = np.abs(a - b).max(initial=0), np.abs(b).max(initial=0)
    bound = relative * scale if absolute is None else absolute
    rms_error, rms = (np.sqrt(np.mean(np.square(m))) if m.size else 0.0 for m in (a - b, b))
    ok = rms_error <= relative * rms and error <= bound
    failed |= not ok
    report.append(
      f'{"ok  " if ok else "FAIL"} {jax.tree_util.keystr(path)}: relative RMSE {rms_error / (rms or 1):.2e} '
      f'(bound {relative:.0e}), absolute {error:.2e} (bound {bound:.2e}), largest {scale:.2e}'
    )
  print('\n'.join(report))
  assert not failed, '\n'.join(report)
