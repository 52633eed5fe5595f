"""SSD: 'scan' against a NumPy loop, 'xla' against 'scan', and the rules on documents, states and memory."""

import functools
import re
import types

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmscale.kernels import choice, proof
from lmscale.kernels.ssd import api, ssd, xla

# Two rows: padding at the end, and leading, inner and trailing padding with skipped ids.
SEGMENTS = np.array([[1] * 9 + [2] + [3] * 6 + [0] * 3, [0, 0, 4, 4, 4, 0, 0, 4, 4, 6, 6, 6, 6, 6, 6, 6, 6, 6, 0]])


def make(seed=0, b=2, l=19, h=4, p=3, g=2, n=5, state=True, channels=False, dtype=np.float64):
  """A dict of all arguments but the segments."""
  rng = np.random.default_rng(seed)
  shapes = {'x': (b, l, h, p), 'B': (b, l, g, n), 'C': (b, l, g, n), 'z': (b, l, h, p),
            'D': (h, p) if channels else (h,)}  # fmt: skip
  if state:
    shapes['initial_state'] = (b, h, p, n)
  arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}
  arrays |= {'dt': np.exp(rng.normal(-1, 1, (b, l, h))), 'A': -np.exp(rng.normal(0, 1, h))}
  return {name: jnp.asarray(array, dtype) for name, array in arrays.items()}


def loop(x, dt, A, B, C, D, z, initial_state=None, segment_ids=None):
  """The definition in NumPy, float64, one token and head at a time."""
  b, l, h, p = x.shape
  g, n = B.shape[2:]
  segment_ids = np.ones((b, l), int) if segment_ids is None else segment_ids
  y = np.zeros((b, l, h, p))
  state = np.zeros((b, h, p, n)) if initial_state is None else np.array(initial_state, np.float64)
  for row in range(b):
    current = 0
    for t in range(l):
      if segment_ids[row, t] == 0:
        continue
      if current not in (0, segment_ids[row, t]):
        state[row] = 0
      current = segment_ids[row, t]
      for i in range(h):
        group = i // (h // g)
        state[row, i] *= np.exp(dt[row, t, i] * A[i])
        state[row, i] += dt[row, t, i] * np.outer(x[row, t, i], B[row, t, group])
        out = state[row, i] @ C[row, t, group] + D[i] * x[row, t, i]
        y[row, t, i] = out * z[row, t, i] / (1 + np.exp(-z[row, t, i]))
  return y, state


@functools.partial(jax.jit, static_argnames=('implementation', 'chunk'))
def run(arguments, segment_ids=None, implementation='xla', chunk=8):
  return ssd(**arguments, segment_ids=segment_ids, implementation=implementation, chunk=chunk)


@functools.partial(jax.jit, static_argnames=('implementation', 'chunk'))
def differentiate(arguments, weights, segment_ids=None, implementation='xla', chunk=8):
  """((y, state), the gradient of a weighted sum of both with respect to every argument)."""

  def loss(arguments):
    y, state = ssd(**arguments, segment_ids=segment_ids, implementation=implementation, chunk=chunk)
    return jnp.sum(weights[0] * y) + jnp.sum(weights[1] * state), (y, state)

  gradients, results = jax.grad(loss, has_aux=True)(arguments)
  return results, gradients


def single(tree):
  return jax.tree.map(lambda a: np.asarray(a, np.float32), tree)


def random_weights(arguments, seed=1):
  b, l, h, p = arguments['x'].shape
  rng = np.random.default_rng(seed)
  return rng.normal(size=(b, l, h, p)), rng.normal(size=(b, h, p, arguments['B'].shape[-1]))


@pytest.mark.parametrize('segments', [None, SEGMENTS], ids=['one', 'packed'])
@pytest.mark.parametrize('implementation', ['scan', 'xla'])
def test_matches_numpy_loop(implementation, segments, assert_close):
  with jax.enable_x64(True):
    arguments = make()
    want = loop(**jax.tree.map(np.asarray, arguments), segment_ids=segments)
    assert_close(run(arguments, segments, implementation), want, 1e-12)
    if segments is not None:
      y = run(arguments, segments, implementation)[0]
      assert np.all(np.asarray(y)[segments == 0] == 0)


CASES = {
  'several chunks in several blocks, packed': ({}, SEGMENTS, 2),
  'groups = heads, one chunk, packed': ({'g': 4}, SEGMENTS, 32),
  'one group, no state, chunk 1, packed': ({'g': 1, 'state': False, 'channels': True}, SEGMENTS, 1),
  'no segments': ({'l': 21, 'h': 2}, None, 4),
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


@hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_shape(data):
  def draw(low, high):
    return data.draw(st.integers(low, high))

  g, l, b = draw(1, 3), draw(1, 17), draw(1, 2)
  shapes = {'seed': draw(0, 99), 'b': b, 'l': l, 'h': g * draw(1, 3), 'p': draw(1, 3), 'g': g, 'n': draw(1, 3)}
  chunk = draw(1, 20)
  # Any pattern of padding; ids rise, as they do within a row of packed documents.
  step = st.lists(st.sampled_from([0, 0, 0, 1]), min_size=l, max_size=l)
  segments = np.cumsum([data.draw(step) for _ in range(b)], axis=1) + 1
  segments *= np.array([data.draw(st.lists(st.sampled_from([0, 1, 1, 1]), min_size=l, max_size=l)) for _ in range(b)])
  with jax.enable_x64(True):
    arguments = make(**shapes)
    want = loop(**jax.tree.map(np.asarray, arguments), segment_ids=segments)
    got = run(arguments, segments, 'xla', chunk)
    for a, b in zip(got, want, strict=True):
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * max(1, np.abs(b).max()))


def test_packed_documents_equal_separate_runs(assert_close):
  spans = [(0, 5), (6, 15), (15, 20)]  # padding after the first and the last
  segments = np.zeros((1, 21), int)
  for number, (first, last) in enumerate(spans):
    segments[0, first:last] = number + 1
  with jax.enable_x64(True):
    packed = make(b=1, l=21, state=False)
    weights = random_weights(packed)
    (y, state), grad = differentiate(packed, weights, segments)
    per_token = ('x', 'dt', 'B', 'C', 'z')
    total = {'A': 0, 'D': 0}
    for number, (first, last) in enumerate(spans):
      one = {name: a[:, first:last] if name in per_token else a for name, a in packed.items()}
      final = number == len(spans) - 1
      one_weights = weights[0][:, first:last], weights[1] * final
      (one_y, one_state), one_grad = differentiate(one, one_weights)
      assert_close(y[:, first:last], one_y, 1e-12)
      assert_close({k: grad[k][:, first:last] for k in per_token}, {k: one_grad[k] for k in per_token}, 1e-10)
      total = {k: total[k] + one_grad[k] for k in total}
    assert_close(state, one_state, 1e-12)
    assert_close({k: grad[k] for k in total}, total, 1e-10)
    for name in per_token:
      assert np.all(np.asarray(grad[name])[segments == 0] == 0), name


@pytest.mark.parametrize('implementation', ['scan', 'xla'])
def test_no_gradient_crosses_a_boundary(implementation):
  arguments = make(dtype=np.float32)
  weights = random_weights(arguments)
  last = SEGMENTS == SEGMENTS.max(axis=1, keepdims=True)
  weights = single((weights[0] * last[..., None, None], weights[1]))
  _, grad = differentiate(arguments, weights, SEGMENTS, implementation)
  for name in ('x', 'dt', 'B', 'C', 'z'):
    assert np.all(np.asarray(grad[name])[~last] == 0), name
    assert np.any(np.asarray(grad[name])[last] != 0), name
  assert np.all(np.asarray(grad['initial_state']) == 0)


@pytest.mark.parametrize('segments', [None, SEGMENTS], ids=['one', 'packed'])
def test_two_passes_equal_one(segments, assert_close):
  cut = 12  # within a document of both rows of SEGMENTS
  with jax.enable_x64(True):
    arguments = make()
    weights = random_weights(arguments)
    halves = ((None, None) if segments is None else (segments[:, :cut], segments[:, cut:]))

    def twice(arguments):
      first, second = ({k: a[:, part] if k in ('x', 'dt', 'B', 'C', 'z') else a for k, a in arguments.items()}
                       for part in (slice(None, cut), slice(cut, None)))  # fmt: skip
      y0, state = run(first, halves[0])
      y1, state = run(second | {'initial_state': state}, halves[1])
      return jnp.concatenate([y0, y1], axis=1), state

    @jax.jit
    def gradients(arguments):
      def loss(arguments):
        y, state = twice(arguments)
        return jnp.sum(weights[0] * y) + jnp.sum(weights[1] * state), (y, state)

      return jax.grad(loss, has_aux=True)(arguments)[::-1]

    assert_close(gradients(arguments), differentiate(arguments, weights, segments), 1e-10)


def test_token_by_token_equals_one_pass(assert_close):
  arguments = make(l=5, dtype=np.float32)
  one = jax.jit(lambda token: ssd(**token))  # l == 1: ssd_update
  y, state = [], arguments['initial_state']
  for t in range(5):
    token = {k: a[:, t : t + 1] if k in ('x', 'dt', 'B', 'C', 'z') else a for k, a in arguments.items()}
    y_t, state = one(token | {'initial_state': state})
    y.append(y_t)
  assert_close((jnp.concatenate(y, axis=1), state), run(arguments), 1e-5)


@pytest.mark.parametrize('dt', ['huge', 'tiny', 'mixed', 'one huge'])
def test_extreme_decays_stay_finite_and_right(dt, assert_close):
  arguments = make(dtype=np.float32)
  shape = arguments['dt'].shape
  values = {
    'huge': np.full(shape, 1e5), 'tiny': np.full(shape, 1e-20),
    'mixed': 10.0 ** np.random.default_rng(3).uniform(-12, 5, shape),
    'one huge': np.where(np.arange(shape[1]) == 9, 1e7, 1e-2)[:, None] * np.ones(shape),
  }[dt]  # fmt: skip
  arguments['dt'] = jnp.asarray(values, jnp.float32)
  weights = random_weights(arguments)
  got = differentiate(arguments, single(weights), SEGMENTS)
  with jax.enable_x64(True):
    double = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), arguments)
    want = differentiate(double, weights, SEGMENTS, 'scan')
  assert_close(got, want, 1e-4)


def test_bfloat16(assert_close):
  arguments = make(l=40, dtype=jnp.bfloat16)
  for name in ('dt', 'A', 'D', 'initial_state'):
    arguments[name] = arguments[name].astype(jnp.float32)
  weights = random_weights(arguments)
  (y, state), grad = differentiate(arguments, single(weights))
  assert y.dtype == jnp.bfloat16
  assert state.dtype == jnp.float32
  assert {k: g.dtype for k, g in grad.items()} == {k: a.dtype for k, a in arguments.items()}
  with jax.enable_x64(True):
    double = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), arguments)
    want = differentiate(double, weights, implementation='scan')
  assert_close(((y, state), grad), want, 2e-2)


def test_no_state_per_token(largest_array):
  l = 512
  arguments = make(b=1, l=l, h=4, p=4, g=2, n=4, dtype=np.float32)
  weights = random_weights(arguments)
  limit = l * 4 * 16  # b l h (p n), and b l h q with q = 16
  segments = np.ones((1, l), int)

  def size(implementation):
    function = functools.partial(differentiate, implementation=implementation, chunk=16)
    return largest_array(function, arguments, weights, segments)

  assert size('xla') < limit
  assert size('scan') >= limit  # the check can fail


@pytest.mark.parametrize('tensor', [2, 4])
def test_heads_shard_without_communication(tensor, assert_close):
  """Also where `tensor` does not divide the groups: then B and C are replicated."""
  mesh = jax.make_mesh((8 // tensor, tensor), ('data', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  arguments = make(b=4, h=8, g=2, dtype=np.float32)
  segments = np.concatenate([SEGMENTS, SEGMENTS])
  group = 'tensor' if 2 % tensor == 0 else None
  specs = {'x': P('data', None, 'tensor'), 'dt': P('data', None, 'tensor'), 'A': P('tensor'), 'D': P('tensor'),
           'B': P('data', None, group), 'C': P('data', None, group), 'z': P('data', None, 'tensor'),
           'initial_state': P('data', 'tensor')}  # fmt: skip
  placed = {name: jax.device_put(a, NamedSharding(mesh, specs[name])) for name, a in arguments.items()}
  compiled = run.lower(placed, jax.device_put(segments, NamedSharding(mesh, P('data'))), chunk=8).compile()
  text = compiled.as_text()
  for collective in ('all-gather', 'all-to-all', 'all-reduce', 'collective-permute', 'reduce-scatter'):
    assert collective not in text, collective
  assert_close(run(placed, segments), run(arguments, segments), 1e-5)


def test_memory_of_a_layer_is_near_its_inputs_and_outputs():
  """From the compiled analysis: forward and backward hold a few blocks of 128 tokens, and no state per chunk."""
  l, h, p, g, n = 4096, 8, 64, 2, 64
  shapes = {'x': (1, l, h, p), 'dt': (1, l, h), 'A': (h,), 'B': (1, l, g, n), 'C': (1, l, g, n), 'D': (h,)}
  arguments = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
  weights = arguments['x'], jax.ShapeDtypeStruct((1, h, p, n), np.float32)
  size = 4 * sum(np.prod(shape) for shape in shapes.values())
  for function, bound in (
    (lambda a, w: ssd(**a, implementation='xla', chunk=64), 0.25),
    (lambda a, w: differentiate(a, w, implementation='xla', chunk=64), 1),
  ):
    analysis = jax.jit(function).lower(arguments, weights).compile().memory_analysis()
    outside = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    print(f'temporaries {analysis.temp_size_in_bytes / 2**20:.1f} MB beside {outside / 2**20:.1f} MB in and out')
    assert analysis.temp_size_in_bytes < bound * size


def test_sizes_beyond_2_to_31_elements_lower():
  """The 8B layer at batch 64, gradients included: x and y have 2^31 elements, and nothing is indexed by one number."""
  b, l, h, p, g, n = 64, 4096, 128, 64, 8, 128
  shapes = {'x': (b, l, h, p), 'dt': (b, l, h), 'A': (h,), 'B': (b, l, g, n), 'C': (b, l, g, n), 'D': (h,)}
  arguments = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
  weights = jax.ShapeDtypeStruct((b, l, h, p), np.float32), jax.ShapeDtypeStruct((b, h, p, n), np.float32)
  text = differentiate.lower(arguments, weights, jax.ShapeDtypeStruct((b, l), np.int32), chunk=None).as_text()
  assert 'tensor<64x128x32x8x16x64xbf16>' in text
  flat = [size for size in re.findall(r'tensor<([0-9x]+)x[a-z]', text) if max(map(int, size.split('x'))) >= 2**31]
  assert not flat


def test_named_implementations_are_strict():
  arguments = make(l=16, p=8, n=16, dtype=np.float32)
  with pytest.raises(ValueError, match="implementation 'cuda' is unknown; choose one of scan, xla, pallas_triton"):
    ssd(**arguments, implementation='cuda')
  with pytest.raises(ValueError, match="'pallas_mosaic' cannot do this: x is float32"):
    ssd(**arguments, implementation='pallas_mosaic')
  with pytest.raises(ValueError, match="interpret=True is for implementation 'pallas_triton', not 'xla'"):
    ssd(**arguments, implementation='xla', interpret=True)
  with pytest.raises(ValueError, match="interpret=True is for implementation 'pallas_triton', not None"):
    ssd(**arguments, interpret=True)
  with pytest.raises(ValueError, match="'pallas_triton' cannot do this: head_dim 130"):
    ssd(**make(l=16, p=130, n=16, dtype=np.float32), implementation='pallas_triton', interpret=True)
  with pytest.raises(ValueError, match='Only interpret mode is supported on CPU'):
    ssd(**arguments, implementation='pallas_triton')


def test_none_picks_the_gpu_kernel_where_it_can(monkeypatch):
  """None reads the platform; what the kernel cannot do goes to 'xla'."""
  arguments = make(l=16, p=8, n=16, dtype=np.float32)
  x, B = arguments['x'], arguments['B']

  def chosen(x, chunk=None):
    run, chunk = api._choose(x, B, chunk, None, True, False)
    return getattr(run, 'func', run).__name__, chunk

  assert chosen(x) == ('ssd_xla', xla.default_chunk())
  monkeypatch.setattr(choice, 'nvidia', lambda: True)
  monkeypatch.setattr(proof, 'verdict', lambda op, name, dtype: proof.Verdict(''))
  half = x.astype(jnp.bfloat16)
  assert chosen(half) == ('ssd_pallas_triton', api.PALLAS_CHUNK)
  assert chosen(x) == ('ssd_xla', xla.default_chunk())  # float32 means float32
  assert chosen(half, 48) == ('ssd_xla', 48)  # not a size of the kernel's
  assert chosen(jnp.zeros((2, 16, 4, 130), jnp.bfloat16)) == ('ssd_xla', xla.default_chunk())


def test_errors_are_one_clear_line():
  arguments = make(dtype=np.float32)
  with pytest.raises(ValueError, match=r'4 heads \(x.shape\[2\]\) do not divide into 3 groups'):
    ssd(**make(g=3, dtype=np.float32))
  with pytest.raises(ValueError, match='dt has shape'):
    ssd(**arguments | {'dt': arguments['dt'][:, :-1]})
  with pytest.raises(ValueError, match='chunk 0'):
    ssd(**arguments, chunk=0)


def test_blocks_are_those_of_the_device_that_is_compiled_for():
  assert xla._most_chunks(64) == 1
  with choice.tracing_for(types.SimpleNamespace(platform='gpu')):
    assert xla._most_chunks(64) == 4 and xla.default_chunk() == 128
