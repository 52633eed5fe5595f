"""The gated grouped RMSNorm (acceptance case A14) against the plain form in float64: values, gradients, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmscale.kernels.gated_norm import gated_norm

EPS = 1e-5


def make(b=2, t=3, h=4, p=8, dtype=np.float64):
  rng = np.random.default_rng(0)
  shapes = {'y': (b, t, h, p), 'z': (b, t, h, p), 'scale': (h, p)}
  return {name: jnp.asarray(rng.normal(size=shape).astype(dtype)) for name, shape in shapes.items()}


def plain(y, z, scale, groups, gate_first):
  u = (y * jax.nn.silu(z) if gate_first else y).reshape(*y.shape[:2], groups, -1)
  u = (u / jnp.sqrt(jnp.mean(u**2, axis=-1, keepdims=True) + EPS)).reshape(y.shape) * scale
  return u if gate_first else u * jax.nn.silu(z)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def differentiate(function, arguments, groups, gate_first):
  """(the output, the gradient of a weighted sum of it with respect to every argument)."""

  def loss(arguments):
    out = function(**arguments, groups=groups, gate_first=gate_first)
    weights = np.random.default_rng(1).normal(size=out.shape).astype(np.float16)  # exact in every dtype here
    return jnp.sum((weights * out).astype(jnp.promote_types(jnp.float32, out.dtype))), out

  return jax.grad(loss, has_aux=True)(arguments)[::-1]


def norm(**arguments):
  return gated_norm(**arguments, eps=EPS)


@pytest.mark.parametrize('gate_first', [True, False])
@pytest.mark.parametrize('groups', [1, 2, 4])
def test_matches_the_plain_form(groups, gate_first, assert_close):
  with jax.enable_x64(True):
    arguments = make()
    want = differentiate(plain, arguments, groups, gate_first)
    assert_close(differentiate(norm, arguments, groups, gate_first), want, 1e-12)
  single = jax.tree.map(lambda a: a.astype(jnp.float32), arguments)
  got = differentiate(norm, single, groups, gate_first)
  assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype(np.float32)}
  assert_close(got, want, 1e-5)


@pytest.mark.parametrize('d', [2048, pytest.param(4096, marks=pytest.mark.slow)])
@pytest.mark.parametrize('gate_first', [True, False])
def test_acceptance_shapes(gate_first, d):
  """Groups of 64 channels, 16 rows (1,024 in the slow case), float16 and float32 by the tolerances of A14."""
  rows = 1024 if d == 4096 else 16
  arguments = make(b=16, t=rows // 16, h=d // 64, p=64, dtype=np.float32)
  for dtype, relative, absolute in ((np.float16, 1e-2, 8e-3), (np.float32, 1e-5, 1e-5)):
    low = jax.tree.map(lambda a, dtype=dtype: a.astype(dtype), arguments)
    got = differentiate(norm, low, d // 64, gate_first)
    with jax.enable_x64(True):
      want = differentiate(plain, jax.tree.map(lambda a: a.astype(np.float64), low), d // 64, gate_first)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      assert a.dtype == dtype
      np.testing.assert_allclose(np.asarray(a, np.float64), b, relative, absolute)


def test_a_row_of_zeros_is_finite():
  arguments = {name: jnp.zeros_like(a) for name, a in make(dtype=np.float32).items()}
  for leaf in jax.tree.leaves(differentiate(norm, arguments, 2, True)):
    assert np.all(np.asarray(leaf) == 0)


def test_only_the_inputs_are_kept(kept_bytes):
  arguments = make(dtype=jnp.bfloat16)
  inputs = sum(a.nbytes for a in arguments.values())
  assert kept_bytes(lambda a: norm(**a, groups=2), arguments) <= inputs
  assert kept_bytes(lambda a: plain(**a, groups=2, gate_first=True), arguments) > inputs  # the check can fail


def test_gradient_of_a_bfloat16_scale_is_summed_in_float32(assert_close):
  arguments = make(b=1, t=3000, h=1, p=2, dtype=jnp.bfloat16)
  arguments['y'], arguments['scale'] = jnp.abs(arguments['y']), jnp.ones((1, 2), jnp.bfloat16)

  def gradient(arguments):
    return jax.jit(jax.grad(lambda a: jnp.sum(jnp.abs(norm(**a, groups=1)).astype(jnp.float32))))(arguments)

  exact = gradient({name: a.astype(jnp.float32) for name, a in arguments.items()})
  assert_close(gradient(arguments)['scale'], exact['scale'], 4e-3)


def test_group_sum_may_come_from_outside(assert_close):
  """Any function equal to the default gives the same: here a matrix product."""

  def by_matrix(m_bth, groups):
    h = m_bth.shape[2]
    return m_bth @ np.kron(np.eye(groups), np.ones((h // groups, h // groups)))

  with jax.enable_x64(True):
    arguments = make()
    other = functools.partial(gated_norm, eps=EPS, group_sum=by_matrix)
    assert_close(differentiate(other, arguments, 2, True), differentiate(norm, arguments, 2, True), 1e-12)


@pytest.mark.parametrize('gate_first', [True, False])
def test_a_group_whose_squares_overflow_is_no_silent_zero(gate_first):
  """It is NaN, so that the step is skipped and told; other groups and tokens do not notice."""
  arguments = make(dtype=np.float32)
  loud = arguments | {'y': arguments['y'].at[0, 1, 0].set(1e25)} | {'z': arguments['z'].at[0, 1, 0].set(3.0)}
  out = norm(**loud, groups=2, gate_first=gate_first)
  assert jnp.isnan(out[0, 1, :2]).all()
  kept = np.ones(out.shape, bool)
  kept[0, 1, :2] = False
  np.testing.assert_array_equal(out[kept], norm(**arguments, groups=2, gate_first=gate_first)[kept])


def test_errors_are_one_clear_line():
  arguments = make(dtype=np.float32)
  with pytest.raises(ValueError, match='4 heads do not divide into 3 groups'):
    norm(**arguments, groups=3)
  with pytest.raises(ValueError, match=r'scale \(4, 7\) do not fit'):
    norm(**arguments | {'scale': arguments['scale'][:, :7]}, groups=2)
