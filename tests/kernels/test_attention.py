"""Attention against a NumPy loop: grouped heads, documents, key-value cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lmscale.kernels.attention import attention

SEGMENTS = np.array([[1, 1, 1, 2, 3, 3, 0], [5, 5, 0, 5, 6, 6, 6]])
SHAPES = {'mha': (4, 4), 'gqa': (4, 2), 'mqa': (3, 1)}


def make(h, g, b=2, t=7, s=7, d=5, dtype=np.float64):
  rng = np.random.default_rng(0)
  shapes = {'q': (b, t, h, d), 'k': (b, s, g, d), 'v': (b, s, g, d)}
  return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def loop(q, k, v, q_positions, k_positions, q_segments, k_segments):
  """The definition in NumPy, one query and head at a time."""
  b, t, h, d = q.shape
  s, g = k.shape[1:3]
  out = np.zeros(q.shape)
  for row, i, head in np.ndindex(b, t, h):
    seen = [j for j in range(s) if k_positions[row, j] <= q_positions[row, i]
            and q_segments[row, i] == k_segments[row, j] != 0]  # fmt: skip
    if seen:
      group = head // (h // g)
      scores = np.array([q[row, i, head] @ k[row, j, group] for j in seen]) / np.sqrt(d)
      weights = np.exp(scores - scores.max())
      out[row, i, head] = weights / weights.sum() @ v[row, seen, group]
  return out


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
def test_matches_numpy_loop(shape, packed, assert_close):
  segments = SEGMENTS if packed else np.ones_like(SEGMENTS)
  options = {'q_segments': segments, 'k_segments': segments} if packed else {}
  row = np.tile(np.arange(7), (2, 1))
  with jax.enable_x64(True):
    arguments = make(*SHAPES[shape])
    want = loop(**jax.tree.map(np.asarray, arguments), q_positions=row, k_positions=row,
                q_segments=segments, k_segments=segments)  # fmt: skip
    got = jax.jit(lambda a: attention(**a, **options))(arguments)
    assert_close(got, want, 1e-13)
    assert np.all(np.asarray(got)[segments == 0] == 0)
  assert_close(attention(**make(*SHAPES[shape], dtype=np.float32), **options), want, 1e-5)


@pytest.mark.parametrize('t', [1, 3])
def test_key_value_cache(t, assert_close):
  """Queries in the middle of a longer, partly unfilled cache whose rows are at different places."""
  q_positions = np.array([[4], [2]]) + np.arange(t)
  k_positions = np.tile(np.arange(9), (2, 1))
  filled = (k_positions < 8).astype(int)
  options = {'q_positions': q_positions, 'k_positions': k_positions,
             'q_segments': np.ones((2, t), int), 'k_segments': filled}  # fmt: skip
  with jax.enable_x64(True):
    arguments = make(4, 2, t=t, s=9)
    want = loop(**jax.tree.map(np.asarray, arguments), **options)
    assert_close(attention(**arguments, **options), want, 1e-13)
    # k_positions default to arange, and without segments all keys up to the query count.
    assert_close(attention(**arguments, q_positions=q_positions), want, 1e-13)


def test_cache_equals_one_pass(assert_close):
  with jax.enable_x64(True):
    a = make(4, 2)
    want = attention(**a)
    got = [attention(a['q'][:, t : t + 1], a['k'], a['v'], q_positions=np.full((2, 1), t)) for t in range(7)]
    assert_close(jnp.concatenate(got, axis=1), want, 1e-13)


def test_gradient_stays_in_its_document_and_is_finite():
  last = SEGMENTS == np.array([[3], [6]])

  @jax.jit
  @jax.grad
  def gradient(arguments):
    out = attention(**arguments, q_segments=SEGMENTS, k_segments=SEGMENTS)
    # The padding's outputs count too: their gradient must be zero, not NaN.
    return jnp.sum(jnp.sin(out) * (last | (SEGMENTS == 0))[..., None, None])

  with jax.debug_nans(True):  # not even inside
    eager = jax.grad(lambda a: jnp.sum(attention(**a, q_segments=SEGMENTS, k_segments=SEGMENTS)))
    eager(make(4, 2, dtype=np.float32))
  for name, grad in gradient(make(4, 2, dtype=np.float32)).items():
    assert np.isfinite(grad).all(), name
    assert np.all(np.asarray(grad)[~last] == 0), name
    assert np.any(np.asarray(grad)[last] != 0), name


def test_gradient_matches_differences():
  with jax.enable_x64(True):
    check_grads(
      lambda q, k, v: attention(q, k, v, q_segments=SEGMENTS, k_segments=SEGMENTS),
      tuple(make(4, 2).values()), order=1, modes=['rev'],
    )  # fmt: skip


def test_bfloat16(assert_close):
  arguments = make(4, 2, dtype=jnp.bfloat16)
  got = attention(**arguments)
  assert got.dtype == jnp.bfloat16
  assert_close(got, attention(**jax.tree.map(lambda a: a.astype(jnp.float32), arguments)), 2e-2)


def test_keys_and_values_are_not_repeated(largest_array):
  arguments = make(16, 1, b=1, t=1, s=64, d=8, dtype=np.float32)
  assert largest_array(lambda a: attention(**a), arguments) < 64 * 16 * 8


def test_errors_are_one_clear_line():
  with pytest.raises(ValueError, match='4 query heads do not divide into 3'):
    attention(**make(4, 3, dtype=np.float32))
  with pytest.raises(ValueError, match='both q_segments and k_segments'):
    attention(**make(4, 2, dtype=np.float32), q_segments=SEGMENTS)
