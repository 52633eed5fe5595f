"""The Pallas Triton SSD: interpreted on the CPU against 'scan' in float64, and lowered for CUDA."""

import functools
import re
import warnings

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from kernels.heads import assert_heads_close

from lmscale.kernels import segments as segments_lib
from lmscale.kernels.ssd import scan, ssd
from lmscale.kernels.ssd.triton import backward, entry
from lmscale.models.layers.mamba2 import clamp

H200 = AbstractMesh((1,), ('device',), axis_types=(jax.sharding.AxisType.Auto,),
                    abstract_device=AbstractDevice('NVIDIA H200', 132, 'gpu'))  # fmt: skip
# One row ends a document inside a chunk of 16 and at the end of another; the other has all kinds of padding.
SEGMENTS = np.array([
  [1] * 9 + [2] * 7 + [3] * 34 + [0] * 1,
  [0] * 3 + [4] * 20 + [0] * 2 + [4] * 2 + [6] * 1 + [7] * 22 + [0] * 1,
])  # fmt: skip
TOKENS = ('x', 'dt', 'B', 'C')


def make(seed=0, b=2, l=51, h=4, p=5, g=2, n=6, dtype=np.float32):
  """A dict of all arguments but the segments; dt, A, D and the state are float32, or float64 if dtype is."""
  rng = np.random.default_rng(seed)
  shapes = {'x': (b, l, h, p), 'B': (b, l, g, n), 'C': (b, l, g, n), 'D': (h,), 'initial_state': (b, h, p, n)}
  arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}
  arrays |= {'dt': np.exp(rng.normal(-1, 1, (b, l, h))), 'A': -np.exp(rng.normal(0, 1, h))}
  wide = np.float64 if dtype == np.float64 else np.float32
  return {k: jnp.asarray(v, dtype if k in ('x', 'B', 'C') else wide) for k, v in arrays.items()}


def double(tree):
  return jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), tree)


def random_weights(arguments, seed=1):
  rng = np.random.default_rng(seed)
  return tuple(jnp.asarray(rng.normal(size=arguments[k].shape), arguments['A'].dtype) for k in ('x', 'initial_state'))


@functools.partial(jax.jit, static_argnames=('function', 'options'))
def differentiate(arguments, weights, segment_ids=None, function='api', options=()):
  """((y, state), gradients of a weighted sum of both) of 'api', of 'kernel' itself, which has more options and takes
  float64, or of 'scan'."""
  options = {'chunk': 16} | dict(options)

  def run(initial_state, segment_ids, D=None, **rest):
    if function == 'api':
      return ssd(**rest, D=D, initial_state=initial_state, segment_ids=segment_ids, interpret=True,
                 implementation='pallas_triton', **options)  # fmt: skip
    document = None
    if segment_ids is not None:
      document, real = segments_lib.documents(segment_ids)
      rest['dt'] = jnp.where(real[..., None], rest['dt'], 0)
    if function == 'scan':
      y, state = scan.ssd_scan(**rest, D=D, state=initial_state, document=document, chunk=1)
    else:
      y, state = entry.ssd_pallas_triton(**rest, D=D, state=initial_state, document=document, interpret=True, **options)
    return (y if document is None else jnp.where(real[..., None, None], y, 0)), state

  def loss(arguments):
    y, state = run(**arguments, segment_ids=segment_ids)
    return jnp.sum(weights[0] * y) + jnp.sum(weights[1] * state), (y, state)

  gradients, results = jax.grad(loss, has_aux=True)(arguments)
  return results, gradients


def reference(arguments, weights, segment_ids=None):
  with jax.enable_x64(True):
    return differentiate(double(arguments), double(weights), segment_ids, 'scan')


@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
def test_matches_scan(dtype, assert_close):
  """Odd sizes, two groups, documents that end anywhere, padding, a final state with a cotangent."""
  arguments = make(dtype=dtype)
  weights = random_weights(arguments)
  got, got_gradients = differentiate(arguments, weights, SEGMENTS)
  assert got[0].dtype == dtype
  assert {k: a.dtype for k, a in got_gradients.items()} == {k: a.dtype for k, a in arguments.items()}
  want, want_gradients = reference(arguments, weights, SEGMENTS)
  assert_close(got, want, {np.float32: 1e-5, jnp.bfloat16: 5e-3}[dtype])
  assert_close(got_gradients, want_gradients, {np.float32: 1e-4, jnp.bfloat16: 1e-2}[dtype])
  for name in TOKENS:
    assert np.all(np.asarray(got_gradients[name])[SEGMENTS == 0] == 0), name


# In float64 a wrong formula cannot hide behind rounding. Sizes are the least that have every part of the layout.
PLANS = {
  'three segments, packed, states saved at every second chunk': ({}, SEGMENTS, {'segments': 3, 'save_every': 2}),
  'two segments, one group, chunk 32, no D, no documents':
    ({'g': 1, 'l': 150, 'b': 1, 'D': False}, None, {'segments': 2, 'save_every': 1, 'chunk': 32}),
  'groups = heads, full blocks, D per channel, not deterministic':
    ({'g': 2, 'h': 2, 'p': 16, 'n': 16, 'l': 48, 'D': 'channel'}, None, {'deterministic': False}),
}  # fmt: skip


@pytest.mark.parametrize('plan', PLANS)
def test_every_plan_is_exact(plan, assert_close):
  shapes, segments, options = PLANS[plan]
  D = shapes.get('D')
  with jax.enable_x64(True):
    arguments = make(**{k: v for k, v in shapes.items() if k != 'D'}, dtype=np.float64)
    if D is not None:
      del arguments['D']
    if D == 'channel':
      arguments['D'] = jnp.asarray(np.random.default_rng(5).normal(size=arguments['x'].shape[2:]))
    weights = random_weights(arguments)
    got = differentiate(arguments, weights, segments, 'kernel', tuple(options.items()))
    if D == 'channel':  # 'scan' has D per head
      D, arguments['D'] = arguments['D'], jnp.zeros(2)
      want, gradients = differentiate(arguments, weights, segments, 'scan')
      want = want[0] + D * arguments['x'], want[1]
      gradients |= {'x': gradients['x'] + D * weights[0], 'D': jnp.sum(weights[0] * arguments['x'], axis=(0, 1))}
      assert_close(got, (want, gradients), 1e-10)
    else:
      assert_close(got, differentiate(arguments, weights, segments, 'scan'), 1e-10)


@pytest.mark.parametrize('deterministic', [True, False])
def test_parts_are_exact(deterministic, assert_close, monkeypatch):
  """A head cut in two for its state's size, and the heads of a group shared out over programs."""
  monkeypatch.setattr(entry, 'STATE_ELEMENTS', 256)
  monkeypatch.setattr(backward, 'PROGRAMS', 10**9)
  with jax.enable_x64(True):
    arguments = make(p=20, n=16, b=1, dtype=np.float64)
    weights = random_weights(arguments)
    options = (('save_every', 1), ('deterministic', deterministic), ('segments', 1))
    got = differentiate(arguments, weights, SEGMENTS[:1], 'kernel', options)
    assert_close(got, differentiate(arguments, weights, SEGMENTS[:1], 'scan'), 1e-10)
  assert entry._parts(20, 16) == 2
  assert backward._parts(4, 6) == 4


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_segments(data):
  """One compiled shape; boundaries and padding anywhere, ids that rise."""
  b, l = 2, 40
  ends = st.lists(st.sampled_from([0] * 9 + [1]), min_size=l, max_size=l)
  real = st.lists(st.sampled_from([0, 1, 1, 1]), min_size=l, max_size=l)
  segments = (np.cumsum([data.draw(ends) for _ in range(b)], axis=1) + 1) * [data.draw(real) for _ in range(b)]
  with jax.enable_x64(True):
    arguments = make(seed=data.draw(st.integers(0, 99)), b=b, l=l, h=2, g=1, p=2, n=3, dtype=np.float64)
    weights = random_weights(arguments)
    got = differentiate(arguments, weights, segments, 'kernel', (('segments', 2), ('save_every', 1)))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(differentiate(arguments, weights, segments, 'scan')),
                    strict=True):  # fmt: skip
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * max(1, np.abs(b).max()))


@pytest.mark.slow
@hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_shape(data):
  def draw(low, high):
    return data.draw(st.integers(low, high))

  g, l, b, chunk = draw(1, 3), draw(1, 70), draw(1, 2), data.draw(st.sampled_from([16, 32, 64]))
  shapes = {'seed': draw(0, 99), 'b': b, 'l': l, 'h': g * draw(1, 3), 'p': draw(1, 20), 'g': g, 'n': draw(1, 20)}
  segments = np.cumsum(np.random.default_rng(draw(0, 99)).random((b, l)) < 0.1, axis=1) + 1
  options = (('chunk', chunk), ('segments', draw(1, 3)), ('save_every', draw(1, 3)))
  with jax.enable_x64(True):
    arguments = make(**shapes, dtype=np.float64)
    weights = random_weights(arguments)
    got = differentiate(arguments, weights, segments, 'kernel', options)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(differentiate(arguments, weights, segments, 'scan')),
                    strict=True):  # fmt: skip
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * max(1, np.abs(b).max()))


def test_no_gradient_crosses_a_boundary_and_runs_are_bit_equal():
  arguments = make()
  weights = random_weights(arguments)
  last = SEGMENTS == SEGMENTS.max(axis=1, keepdims=True)
  weights = weights[0] * last[..., None, None], weights[1]
  results = differentiate(arguments, weights, SEGMENTS)  # the shapes of test_matches_scan: compiled already
  gradients = results[1]
  for name in TOKENS:
    assert np.all(np.asarray(gradients[name])[~last] == 0), name
    assert np.any(np.asarray(gradients[name])[last] != 0), name
  assert np.all(np.asarray(gradients['initial_state']) == 0)
  again = differentiate(arguments, weights, SEGMENTS)
  assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(again), strict=True))


@pytest.mark.parametrize('dt', ['huge', 'tiny', 'mixed', 'one huge'])
def test_extreme_decays_stay_finite_and_right(dt, assert_close):
  arguments = make()
  shape = arguments['dt'].shape
  values = {
    'huge': np.full(shape, 1e5), 'tiny': np.full(shape, 1e-20),
    'mixed': 10.0 ** np.random.default_rng(3).uniform(-12, 5, shape),
    'one huge': np.where(np.arange(shape[1]) == 9, 1e7, 1e-2)[:, None] * np.ones(shape),
  }[dt]  # fmt: skip
  arguments['dt'] = jnp.asarray(values, jnp.float32)
  weights = random_weights(arguments)
  assert_close(differentiate(arguments, weights, SEGMENTS), reference(arguments, weights, SEGMENTS), 1e-4)


@pytest.mark.parametrize(('low', 'high'), [(0.2, 0.6), (0.2, 0.0), (0.0, 0.6)])
def test_step_sizes_that_went_through_the_clamp(low, high):
  """Mamba-2's dt_min and dt_max before the kernel, 0 for no bound: results and the gradients of the sizes before the clamp,
  head by head against float64."""
  arguments = make()
  weights, raw = random_weights(arguments), arguments['dt'].at[0, 3].set(low or high)  # at a bound the gradient passes
  dt, pull = jax.vjp(lambda dt: clamp(dt, low, high), raw)
  results, gradients = differentiate(arguments | {'dt': dt}, weights, SEGMENTS)  # compiled for test_matches_scan
  exact = np.clip(np.asarray(raw), np.float32(low), np.float32(high or np.inf))
  wanted, want = reference(arguments | {'dt': exact}, weights, SEGMENTS)
  want, inside = jax.tree.map(np.asarray, want), np.asarray(raw) == exact
  assert 0.1 < inside.mean() < 0.9
  gradients, want = gradients | {'dt': pull(gradients['dt'])[0]}, want | {'dt': want['dt'] * inside}
  assert_heads_close((results, gradients), (wanted, want), dict.fromkeys(('y', 'state', *arguments), 1e-4))


# Lowering for CUDA ------------------------------------------------------------------------------------------------


def lower(shape, dtype=jnp.bfloat16, gradient=True, packed=True):
  """The text of ssd lowered for CUDA with no GPU; JAX 0.11 needs to be told of a device."""
  b, l, h, p, g, n = shape
  shapes = [((b, l, h, p), dtype), ((b, l, h), jnp.float32), ((h,), jnp.float32), ((b, l, g, n), dtype),
            ((b, l, g, n), dtype), ((h,), jnp.float32), ((b, l), jnp.int32)]  # fmt: skip
  arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

  def forward(x, dt, A, B, C, D, ids):
    return ssd(x, dt, A, B, C, D=D, segment_ids=ids if packed else None, implementation='pallas_triton')

  def backward(x, dt, A, B, C, D, ids):
    out, vjp = jax.vjp(lambda *args: forward(*args, ids), x, dt, A, B, C, D)
    return vjp(jax.tree.map(jnp.ones_like, out))

  with use_abstract_mesh(H200), warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'The Pallas Triton backend is deprecated', DeprecationWarning)
    function = jax.jit(backward if gradient else forward)
    return function.trace(*arguments).lower(lowering_platforms=('cuda',)).as_text()


def kernels(text):
  return re.findall(r'name = "(ssd_\w+)", num_stages', text)


LAYERS = {
  'the 8B layer': ((1, 4096, 128, 64, 8, 128), jnp.bfloat16),
  'no power of two': ((1, 100, 3, 36, 3, 20), jnp.float32),
  'the largest head and state, few programs': ((1, 1024, 2, 128, 1, 256), jnp.float16),
}


@pytest.mark.parametrize('layer', LAYERS)
def test_lowers_for_cuda(layer):
  shape, dtype = LAYERS[layer]
  found = kernels(lower(shape, dtype))
  split = layer.endswith('few programs')
  # Forward, the states in between again, the walk back, the chunks; where the sequence is split, each walk twice.
  assert found == ['ssd_forward'] * (2 + split) + ['ssd_backward_walk'] * (1 + split) + ['ssd_backward_chunk']


def test_offsets_are_64_bits_wide_where_32_would_wrap(monkeypatch):
  """x has more than 2^31 elements. The kernel's IR is bytecode in the text, so the lowering is watched instead."""
  from jax._src.pallas.triton import lowering

  types, original = {}, lowering._compute_offsets_from_indices

  def watched(block_info, indexer):
    offsets = original(block_info, indexer)
    types.setdefault(block_info.full_shape_dtype.size, set()).add(str(offsets.type))
    return offsets

  monkeypatch.setattr(lowering, '_compute_offsets_from_indices', watched)
  lower((65, 4096, 128, 64, 8, 128))
  wide = {size for size in types if size >= 2**31}
  assert 65 * 4096 * 128 * 64 in wide
  assert all('i64' in offsets for size in wide for offsets in types[size])
  assert any('i32' in offsets for size in types.keys() - wide for offsets in types[size])
