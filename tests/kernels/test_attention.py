"""Attention against a NumPy loop: grouped heads, documents, key-value cache, chunks of queries, cuDNN's adapter."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.test_util import check_grads

from lmscale.kernels import proof
from lmscale.kernels.attention import api, attention, xla

SEGMENTS = np.array([[1, 1, 1, 2, 3, 3, 0], [5, 5, 0, 5, 6, 6, 6]])
SHAPES = {'mha': (4, 4), 'gqa': (4, 2), 'mqa': (3, 1)}


def make(h, g, b=2, t=7, s=7, d=5, dtype=np.float64):
  rng = np.random.default_rng(0)
  shapes = {'q': (b, t, h, d), 'k': (b, s, g, d), 'v': (b, s, g, d)}
  return {name: jnp.asarray(rng.normal(size=shape).astype(dtype)) for name, shape in shapes.items()}


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


def differentiate(arguments, implementation=None, **segments):
  """The output and the gradient of a weighted sum of it with respect to q, k and v."""
  weights = np.random.default_rng(1).normal(size=arguments['q'].shape)

  def loss(arguments):
    out = attention(**arguments, **segments, implementation=implementation)
    return jnp.sum(weights.astype(out.dtype) * out), out

  return jax.jit(jax.grad(loss, has_aux=True))(arguments)[::-1]


@pytest.mark.parametrize('packed', [False, True])
def test_chunks_of_queries_change_nothing(packed, monkeypatch, assert_close):
  """Chunks of three queries, the last one filled up, against all seven at once."""
  segments = {'q_segments': SEGMENTS, 'k_segments': SEGMENTS} if packed else {}
  with jax.enable_x64(True):
    want = differentiate(make(4, 2), **segments)
    monkeypatch.setitem(api.IMPLEMENTATIONS, 'xla', functools.partial(xla.attention_xla, chunk=3))
    assert_close(differentiate(make(4, 2), **segments), want, 1e-12)


DOCUMENTS = np.repeat([[1, 2, 3, 0], [4, 4, 6, 6]], [6, 10, 5, 3], axis=1)  # none begins where a block of 4 does but 16 of row 2


def test_blocks_are_visited_from_the_first_to_the_last_that_is_seen():
  t, size = DOCUMENTS.shape[1], 4
  places = np.arange(t)[None]
  visible = (DOCUMENTS[:, :, None] == DOCUMENTS[:, None, :]) & (DOCUMENTS[:, None, :] != 0) & (places[0] <= places.T)
  by_chunk = visible.any(0).reshape(t // size, size, t // size, size).any((1, 3))
  wanted = [(np.flatnonzero(seen)[0], np.flatnonzero(seen)[-1] + 1) for seen in by_chunk]
  chunks = xla.Queries(*(xla._split(size, jnp.asarray(m)) for m in (places, DOCUMENTS)), None)
  np.testing.assert_array_equal(xla._seen(chunks, xla.Keys(jnp.asarray(places), jnp.asarray(DOCUMENTS)), size), wanted)


def test_what_no_query_of_a_chunk_sees_is_not_read(monkeypatch):
  """A weight of 0 times NaN would be NaN."""
  monkeypatch.setitem(api.IMPLEMENTATIONS, 'xla', functools.partial(xla.attention_xla, chunk=4))
  arguments = make(4, 2, t=16, s=16, dtype=np.float32)
  segments = np.tile(np.repeat([1, 2], 8), (2, 1))
  arguments |= {name: arguments[name].at[:, :8].set(np.nan) for name in 'kv'}
  out, grads = differentiate(arguments, q_segments=segments, k_segments=segments)
  assert np.isfinite(out[:, 8:]).all() and np.isnan(out[:, :8]).all()
  assert all(np.isfinite(grad[:, 8:]).all() for grad in grads.values())


def test_memory_grows_with_a_chunk_of_queries_not_with_all(largest_array, kept_bytes, monkeypatch):
  arguments = make(2, 2, b=1, t=64, s=64, d=4, dtype=np.float32)

  def gradient_size():
    return largest_array(jax.grad(lambda a: jnp.sum(attention(**a))), arguments)

  per_token = 64 * 16  # bytes, for positions and the like
  assert kept_bytes(lambda a: attention(**a), arguments) <= sum(a.nbytes for a in arguments.values()) + per_token
  assert gradient_size() >= 2 * 64 * 64
  monkeypatch.setitem(api.IMPLEMENTATIONS, 'xla', functools.partial(xla.attention_xla, chunk=8))
  assert gradient_size() <= 2 * 64 * 8


def test_gradients_of_keys_are_summed_in_float32(monkeypatch, assert_close):
  """One key-value head under many chunks of queries: a sum in bfloat16 would lose them."""
  monkeypatch.setitem(api.IMPLEMENTATIONS, 'xla', functools.partial(xla.attention_xla, chunk=2))
  rng = np.random.default_rng(0)
  arguments = {name: jnp.asarray(rng.uniform(size=(1, t, heads, 4)), jnp.bfloat16)
               for name, t, heads in (('q', 512, 2), ('k', 4, 1), ('v', 4, 1))}  # fmt: skip

  def gradient(arguments):
    return jax.jit(jax.grad(lambda a: jnp.sum(attention(**a).astype(jnp.float32))))(arguments)

  exact = gradient({name: a.astype(jnp.float32) for name, a in arguments.items()})
  assert_close(gradient(arguments)['v'], exact['v'], 4e-3)


# cuDNN --------------------------------------------------------------------------------------------------------------

PACKED = np.array([[1, 1, 1, 2, 3, 3, 0, 0], [5, 5, 0, 5, 6, 6, 6, 6]])


@pytest.fixture
def cudnn_by_xla(monkeypatch):
  """jax.nn.dot_product_attention with its XLA implementation in place of cuDNN: the adapter's arguments, executed."""
  calls, real = [], jax.nn.dot_product_attention

  def stand_in(*args, implementation, **options):
    calls.append((implementation, sorted(options)))
    in_float32 = real(*(a.astype(jnp.float32) for a in args), implementation='xla', **options)
    return in_float32.astype(args[0].dtype)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', stand_in)
  return calls


@pytest.mark.parametrize('packed', [False, True])
def test_the_cudnn_adapter_maps_its_arguments(packed, cudnn_by_xla, assert_close):
  arguments = make(4, 2, t=8, s=8, d=8, dtype=np.float16)
  segments = {'q_segments': PACKED, 'k_segments': PACKED} if packed else {}
  got = differentiate(arguments, 'cudnn', **segments)
  assert cudnn_by_xla == [('cudnn', ['is_causal', 'mask'] if packed else ['is_causal'])]
  assert_close(got, differentiate(arguments, 'xla', **segments), 5e-3)
  if packed:
    assert np.all(np.asarray(got[0])[PACKED == 0] == 0)


def check_no_leak(implementation):
  """Another first document, and another padding, leave every bit of the other documents' outputs and gradients."""
  arguments = make(4, 2, t=8, s=8, d=8, dtype=np.float16)
  first = PACKED == PACKED[:, :1]
  other = {name: jnp.where((first | (PACKED == 0))[..., None, None], 7 - 3 * a, a) for name, a in arguments.items()}
  segments = {'q_segments': PACKED, 'k_segments': PACKED}
  before, after = (jax.tree.map(np.asarray, differentiate(a, implementation, **segments)) for a in (arguments, other))
  rest = ~first & (PACKED != 0)
  assert np.any(before[0][first] != after[0][first])
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    np.testing.assert_array_equal(a[rest], b[rest])
    assert np.all(b[PACKED == 0] == 0)


@pytest.mark.parametrize('garbage', [np.nan, np.inf])
@pytest.mark.parametrize('name', 'qkv')
def test_what_lies_at_padding_never_matters(name, garbage):
  arguments = make(4, 2, t=8, s=8, d=8, dtype=np.float32)
  padded = (PACKED == 0)[..., None, None]
  clean = arguments | {name: jnp.where(padded, 0, arguments[name])}
  dirty = arguments | {name: jnp.where(padded, garbage, arguments[name])}
  segments = {'q_segments': PACKED, 'k_segments': PACKED}
  want, got = (differentiate(a, 'xla', **segments) for a in (clean, dirty))
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))


def test_a_query_sees_a_cache_from_its_first_position_on(assert_close):
  with jax.enable_x64(True):
    a = make(4, 2, t=3, s=9)
    q_positions, first = np.array([[4, 5, 6], [2, 3, 8]]), np.array([[2, 2, 6], [0, -3, 8]])
    got = attention(**a, q_positions=q_positions, q_first=first)
    for row, i in np.ndindex(2, 3):
      low, high = max(first[row, i], 0), q_positions[row, i] + 1
      keys = {name: a[name][row : row + 1, low:high] for name in 'kv'}
      want = attention(a['q'][row : row + 1, i : i + 1], **keys, q_positions=np.full((1, 1), high - low))
      assert_close(got[row, i], want[0, 0], 1e-13)


def test_no_document_sees_another():
  check_no_leak('xla')


def test_no_document_sees_another_through_the_cudnn_adapter(cudnn_by_xla):
  check_no_leak('cudnn')
  assert cudnn_by_xla


@pytest.mark.gpu
def test_no_document_sees_another_in_cudnn():
  check_no_leak('cudnn')


@pytest.mark.gpu
@pytest.mark.parametrize('packed', [False, True])
def test_cudnn_equals_xla_on_a_gpu(packed, assert_close):
  arguments = make(8, 2, t=1024, s=1024, d=64, dtype=jnp.bfloat16)
  ids = np.sort(np.random.default_rng(2).integers(0, 5, (2, 1024)))[:, ::-1]
  segments = {'q_segments': ids, 'k_segments': ids} if packed else {}
  assert_close(differentiate(arguments, 'cudnn', **segments), differentiate(arguments, 'xla', **segments), 2e-2)


def test_cudnn_lowers_for_cuda(monkeypatch):
  """The custom calls of both passes, for a cuDNN and a GPU that JAX is told are there."""
  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000)
  monkeypatch.setattr(fused_attention_stablehlo, 'check_compute_capability', lambda capability: True)
  arguments = {name: jax.ShapeDtypeStruct((2, 1024, heads, 64), jnp.bfloat16)
               for name, heads in (('q', 8), ('k', 2), ('v', 2))}  # fmt: skip
  ids = jax.ShapeDtypeStruct((2, 1024), jnp.int32)

  def gradient(arguments, ids):
    loss = lambda a: jnp.sum(attention(**a, q_segments=ids, k_segments=ids, implementation='cudnn'))
    return jax.grad(loss)(arguments)

  for segments, kind in ((None, 'Softmax'), (ids, 'ScaleBiasSoftmax')):
    text = jax.jit(gradient).trace(arguments, segments).lower(lowering_platforms=('cuda',)).as_text()
    assert f'__cudnn$fmha{kind}' in text and f'__cudnn$fmha{kind}Backward' in text, kind


def test_the_choice(monkeypatch, cudnn_by_xla):
  def calls(arguments, **options):
    """How often cuDNN was called so far, this call included."""
    jax.eval_shape(lambda a: attention(**a, **options), arguments)
    return len(cudnn_by_xla)

  arguments = make(4, 2, t=8, s=8, d=8, dtype=np.float16)
  assert calls(arguments) == 0
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(proof, 'verdict', lambda op, name, dtype: proof.Verdict(''))
  gpu = types.SimpleNamespace(device_kind='NVIDIA H200', compute_capability='9.0')
  monkeypatch.setattr(jax, 'devices', lambda: [gpu])
  assert calls(arguments) == 1
  assert calls(arguments, q_segments=PACKED, k_segments=PACKED) == 1
  assert calls(make(4, 2, t=8, s=8, d=8, dtype=np.float32)) == 1
  assert calls(arguments, q_positions=np.arange(8)[None]) == 1
  assert calls(make(1, 1, t=8, s=8, d=136, dtype=np.float16)) == 2
  gpu.compute_capability = '8.0'
  assert calls(make(1, 1, t=8, s=8, d=136, dtype=np.float16)) == 2


CUDNN_REFUSES = {
  'float32': (make(4, 2, d=8, dtype=np.float32), {}, 'cuDNN has bfloat16 and float16'),
  'cache': (make(4, 2, d=8, dtype=np.float16), {'q_positions': np.arange(7)[None]}, 'key-value cache'),
  'lengths': (make(4, 2, t=3, d=8, dtype=np.float16), {}, '3 queries and 7 keys'),
  'head_dim': (make(4, 2, d=5, dtype=np.float16), {}, 'head_dim 5 is not a multiple of 8'),
  'odd': (make(4, 2, d=8, dtype=np.float16), {'q_segments': SEGMENTS, 'k_segments': SEGMENTS}, 'an odd length, 7'),
}


@pytest.mark.parametrize('case', CUDNN_REFUSES)
def test_a_named_implementation_is_strict(case):
  arguments, options, message = CUDNN_REFUSES[case]
  with pytest.raises(ValueError, match=f"'cudnn' cannot do this: .*{message}.*; 'xla' can"):
    attention(**arguments, **options, implementation='cudnn')
  with pytest.raises(ValueError, match="implementation 'triton' is unknown; choose one of xla, cudnn"):
    attention(**arguments, implementation='triton')
