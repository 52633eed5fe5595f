"""The selective scan: 'scan' against a NumPy loop, 'xla' against 'scan', documents, states and memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmscale.kernels.selective_scan import selective_scan

# Two rows: padding at the end, and leading, inner and trailing padding with skipped ids.
SEGMENTS = np.array([[1] * 9 + [2] + [3] * 6 + [0] * 3, [0, 0, 4, 4, 4, 0, 0, 4, 4, 6, 6, 6, 6, 6, 6, 6, 6, 6, 0]])
PER_TOKEN = ('x', 'dt', 'B', 'C', 'z')


def make(seed=0, b=2, l=19, d=6, n=5, state=True, dtype=np.float64):
  """A dict of all arguments but the segments."""
  rng = np.random.default_rng(seed)
  shapes = {'x': (b, l, d), 'B': (b, l, n), 'C': (b, l, n), 'D': (d,), 'z': (b, l, d)}
  if state:
    shapes['initial_state'] = (b, d, n)
  arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}
  arrays |= {'dt': np.exp(rng.normal(-1, 1, (b, l, d))), 'A': -np.exp(rng.normal(0, 1, (d, n)))}
  return {name: jnp.asarray(array, dtype) for name, array in arrays.items()}


def loop(x, dt, A, B, C, D, z, initial_state, segment_ids):
  """The definition in NumPy, float64, one token and channel at a time."""
  b, l, d = x.shape
  y = np.zeros((b, l, d))
  state = np.array(initial_state, np.float64)
  for row in range(b):
    current = 0
    for t in range(l):
      if segment_ids[row, t] == 0:
        continue
      if current not in (0, segment_ids[row, t]):
        state[row] = 0
      current = segment_ids[row, t]
      for i in range(d):
        state[row, i] = np.exp(dt[row, t, i] * A[i]) * state[row, i] + dt[row, t, i] * x[row, t, i] * B[row, t]
        out = state[row, i] @ C[row, t] + D[i] * x[row, t, i]
        y[row, t, i] = out * z[row, t, i] / (1 + np.exp(-z[row, t, i]))
  return y, state


@functools.partial(jax.jit, static_argnames=('implementation', 'chunk'))
def differentiate(arguments, weights, segment_ids=None, implementation='xla', chunk=8):
  """((y, state), the gradient of a weighted sum of both with respect to every argument)."""

  def loss(arguments):
    y, state = selective_scan(**arguments, segment_ids=segment_ids, implementation=implementation, chunk=chunk)
    return jnp.sum(weights[0] * y) + jnp.sum(weights[1] * state), (y, state)

  gradients, results = jax.grad(loss, has_aux=True)(arguments)
  return results, gradients


def single(tree):
  return jax.tree.map(lambda a: np.asarray(a, np.float32), tree)


def random_weights(arguments, seed=1):
  rng = np.random.default_rng(seed)
  return rng.normal(size=arguments['x'].shape), rng.normal(size=(len(arguments['x']), *arguments['A'].shape))


def part(arguments, span):
  """The arguments of the tokens of a slice."""
  return {name: a[:, span] if name in PER_TOKEN else a for name, a in arguments.items()}


@pytest.mark.parametrize('segments', [np.ones_like(SEGMENTS), SEGMENTS], ids=['one', 'packed'])
@pytest.mark.parametrize('implementation', ['scan', 'xla'])
def test_matches_numpy_loop(implementation, segments, assert_close):
  with jax.enable_x64(True):
    arguments = make()
    want = loop(**jax.tree.map(np.asarray, arguments), segment_ids=segments)
    got, _ = differentiate(arguments, random_weights(arguments), segments, implementation)
    assert_close(got, want, 1e-12)
    assert np.all(np.asarray(got[0])[segments == 0] == 0)


CASES = {
  'packed': ({}, SEGMENTS, 8),
  'no state, packed': ({'state': False}, SEGMENTS, 5),
  'no segments': ({'l': 21, 'n': 3}, None, 4),
  'one chunk': ({'l': 7}, None, 32),
}


@pytest.mark.parametrize('case', CASES)
def test_xla_matches_scan(case, assert_close):
  shapes, segments, chunk = CASES[case]
  with jax.enable_x64(True):
    arguments = make(**shapes)
    weights = random_weights(arguments)
    want = differentiate(arguments, weights, segments, 'scan')
    assert_close(differentiate(arguments, weights, segments, 'xla', chunk), want, 1e-10)
  got = differentiate(make(**shapes, dtype=np.float32), single(weights), segments, 'xla', chunk)
  assert {g.dtype for g in jax.tree.leaves(got)} == {np.dtype(np.float32)}
  assert_close(got, want, 1e-5)


def test_packed_documents_equal_separate_runs(assert_close):
  spans = [(0, 5), (6, 15), (15, 20)]  # padding after the first and the last
  segments = np.zeros((1, 21), int)
  for number, (first, last) in enumerate(spans):
    segments[0, first:last] = number + 1
  with jax.enable_x64(True):
    packed = make(b=1, l=21, state=False)
    weights = random_weights(packed)
    (y, state), grad = differentiate(packed, weights, segments)
    total = {'A': 0, 'D': 0}
    for number, (first, last) in enumerate(spans):
      one_weights = weights[0][:, first:last], weights[1] * (number == len(spans) - 1)
      (one_y, one_state), one_grad = differentiate(part(packed, slice(first, last)), one_weights)
      assert_close(y[:, first:last], one_y, 1e-12)
      assert_close({k: grad[k][:, first:last] for k in PER_TOKEN}, {k: one_grad[k] for k in PER_TOKEN}, 1e-10)
      total = {k: total[k] + one_grad[k] for k in total}
    assert_close(state, one_state, 1e-12)
    assert_close({k: grad[k] for k in total}, total, 1e-10)
    for name in PER_TOKEN:
      assert np.all(np.asarray(grad[name])[segments == 0] == 0), name


@pytest.mark.parametrize('implementation', ['scan', 'xla'])
def test_no_gradient_crosses_a_boundary(implementation):
  arguments = make(dtype=np.float32)
  weights = random_weights(arguments)
  last = SEGMENTS == SEGMENTS.max(axis=1, keepdims=True)
  weights = single((weights[0] * last[..., None], weights[1]))
  _, grad = differentiate(arguments, weights, SEGMENTS, implementation)
  for name in PER_TOKEN:
    assert np.all(np.asarray(grad[name])[~last] == 0), name
    assert np.any(np.asarray(grad[name])[last] != 0), name
  assert np.all(np.asarray(grad['initial_state']) == 0)


def test_two_passes_equal_one(assert_close):
  cut = 12  # within a document of both rows
  with jax.enable_x64(True):
    arguments = make()
    weights = random_weights(arguments)

    @jax.jit
    def twice(arguments):
      def loss(arguments):
        y0, state = selective_scan(**part(arguments, slice(cut)), segment_ids=SEGMENTS[:, :cut], chunk=8)
        second = part(arguments, slice(cut, None)) | {'initial_state': state}
        y1, state = selective_scan(**second, segment_ids=SEGMENTS[:, cut:], chunk=8)
        y = jnp.concatenate([y0, y1], axis=1)
        return jnp.sum(weights[0] * y) + jnp.sum(weights[1] * state), (y, state)

      return jax.grad(loss, has_aux=True)(arguments)[::-1]

    assert_close(twice(arguments), differentiate(arguments, weights, SEGMENTS), 1e-10)


def test_token_by_token_equals_one_pass(assert_close):
  arguments = make(dtype=np.float32)
  one = jax.jit(lambda token: selective_scan(**token))  # l == 1: the default is 'scan'
  y, state = [], arguments['initial_state']
  for t in range(19):
    y_t, state = one(part(arguments, slice(t, t + 1)) | {'initial_state': state})
    y.append(y_t)
  want, _ = differentiate(arguments, single(random_weights(arguments)), np.ones((2, 19), int))
  assert_close((jnp.concatenate(y, axis=1), state), want, 1e-5)


@pytest.mark.parametrize('dt', ['huge', 'tiny', 'mixed'])
def test_extreme_decays_stay_finite_and_right(dt, assert_close):
  arguments = make(dtype=np.float32)
  shape = arguments['dt'].shape
  values = {
    'huge': np.full(shape, 1e5), 'tiny': np.full(shape, 1e-20),
    'mixed': 10.0 ** np.random.default_rng(3).uniform(-12, 5, shape),
  }[dt]  # fmt: skip
  arguments['dt'] = jnp.asarray(values, jnp.float32)
  weights = random_weights(arguments)
  got = differentiate(arguments, single(weights), SEGMENTS)
  with jax.enable_x64(True):
    double = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), arguments)
    want = differentiate(double, weights, SEGMENTS, 'scan')
  assert_close(got, want, 1e-4)


def test_bfloat16(assert_close):
  arguments = make(dtype=jnp.bfloat16)
  for name in ('dt', 'A', 'D', 'initial_state'):
    arguments[name] = arguments[name].astype(jnp.float32)
  weights = random_weights(arguments)
  (y, state), grad = differentiate(arguments, single(weights), SEGMENTS)
  assert y.dtype == jnp.bfloat16
  assert state.dtype == jnp.float32
  assert {k: g.dtype for k, g in grad.items()} == {k: a.dtype for k, a in arguments.items()}
  with jax.enable_x64(True):
    double = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), arguments)
    want = differentiate(double, weights, SEGMENTS, 'scan')
  assert_close(((y, state), grad), want, 2e-2)


def test_no_state_per_token(largest_array):
  arguments = make(b=1, l=64, d=8, n=8, dtype=np.float32)
  weights = single(random_weights(arguments))

  def size(implementation):
    function = functools.partial(differentiate, implementation=implementation, chunk=8)
    return largest_array(function, arguments, weights, np.ones((1, 64), int))

  assert size('xla') < 64 * 8 * 8
  assert size('scan') >= 64 * 8 * 8  # the check can fail


def test_channels_shard_with_one_sum_for_b_and_c(assert_close):
  """Forward without communication: B and C are replicated, channels are on `tensor`."""
  mesh = jax.make_mesh((2, 4), ('data', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  arguments = make(d=8, dtype=np.float32)
  specs = {'x': P('data', None, 'tensor'), 'dt': P('data', None, 'tensor'), 'z': P('data', None, 'tensor'),
           'A': P('tensor'), 'D': P('tensor'), 'B': P('data'), 'C': P('data'),
           'initial_state': P('data', 'tensor')}  # fmt: skip
  placed = {name: jax.device_put(a, NamedSharding(mesh, specs[name])) for name, a in arguments.items()}
  run = jax.jit(lambda arguments: selective_scan(**arguments, chunk=8))
  compiled = run.lower(placed).compile()
  for collective in ('all-gather', 'all-to-all', 'all-reduce', 'collective-permute', 'reduce-scatter'):
    assert collective not in compiled.as_text(), collective
  assert_close(compiled(placed), run(arguments), 1e-5)


def test_errors_are_one_clear_line():
  arguments = make(dtype=np.float32)
  with pytest.raises(ValueError, match="implementation 'cuda' is unknown; choose one of scan, xla"):
    selective_scan(**arguments, implementation='cuda')
  with pytest.raises(ValueError, match='dt has shape'):
    selective_scan(**arguments | {'dt': arguments['dt'][:, :-1]})
  with pytest.raises(ValueError, match='chunk 0'):
    selective_scan(**arguments, chunk=0)
