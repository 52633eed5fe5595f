"""The causal convolution against a NumPy loop: documents, windows, padding, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmscale.kernels.causal_conv import causal_conv

SEGMENTS = np.array([[1] * 5 + [2] + [3] * 4 + [0] * 3, [4, 4, 4, 0, 0, 4, 4, 6, 6, 6, 6, 6, 0]])


def make(b=2, l=13, c=3, k=4, window=True, dtype=np.float64):
  rng = np.random.default_rng(0)
  shapes = {'x': (b, l, c), 'weight': (k, c), 'bias': (c,)}
  if window:
    shapes['initial_window'] = (b, k - 1, c)
  return {name: jnp.asarray(rng.normal(size=shape).astype(dtype)) for name, shape in shapes.items()}


def loop(x, weight, bias, initial_window, segment_ids):
  """The definition in NumPy: a token's taps are the tokens before it in its row that share its document."""
  b, l, c = x.shape
  k = len(weight)
  y, final = np.zeros((b, l, c)), np.zeros((b, k - 1, c))
  for row in range(b):
    ids = segment_ids[row]
    first = next((i for i in ids if i), 0)
    end = max((t + 1 for t in range(l) if ids[t]), default=0)
    current = ids[end - 1] if end else first

    def token(t, document, row=row, ids=ids, first=first):
      if t < 0:
        return initial_window[row, t] if document == first else np.zeros(c)
      return x[row, t] if ids[t] == document else np.zeros(c)

    for t in range(l):
      if ids[t]:
        out = bias + sum(weight[k - 1 - j] * token(t - j, ids[t]) for j in range(k))
        y[row, t] = out / (1 + np.exp(-out))
    for j in range(k - 1):
      final[row, j] = token(end - (k - 1) + j, current)
  return y, final


@jax.jit
def run(arguments, segment_ids=None):
  return causal_conv(**arguments, segment_ids=segment_ids)


@pytest.mark.parametrize('k', [1, 2, 4])
@pytest.mark.parametrize('segments', ['one', 'packed', 'short', 'padding'])
def test_matches_numpy_loop(segments, k, assert_close):
  short = np.array([[7] * 2 + [0] * 11, [7] * 1 + [0] * 12])  # fewer real tokens than the window holds
  ids = {'one': np.ones((2, 13), int), 'packed': SEGMENTS, 'short': short, 'padding': np.zeros((2, 13), int)}[segments]
  with jax.enable_x64(True):
    arguments = make(k=k)
    got = run(arguments, ids)
    assert_close(got, loop(**jax.tree.map(np.asarray, arguments), segment_ids=ids), 1e-14)
    if segments == 'one':
      assert_close(run(arguments), got, 1e-14)


def test_no_window_is_a_window_of_zeros(assert_close):
  arguments = make(window=False, dtype=np.float32)
  assert_close(run(arguments), run(arguments | {'initial_window': jnp.zeros((2, 3, 3))}), 0)
  no_bias = arguments | {'bias': None}
  assert_close(run(no_bias), run(arguments | {'bias': jnp.zeros(3)}), 1e-6)


def test_what_stands_at_padding_does_not_matter():
  """NaN in x and in y's cotangent: results and gradients stay equal to the bit."""
  arguments = make(dtype=np.float32)
  weights = np.random.default_rng(1).normal(size=arguments['x'].shape).astype(np.float32)

  @jax.jit
  def differentiate(arguments, weights):
    out, pull = jax.vjp(lambda arguments: causal_conv(**arguments, segment_ids=SEGMENTS), arguments)
    return out, pull((weights, jnp.ones_like(out[1])))

  padding = (SEGMENTS == 0)[..., None]
  bad = arguments | {'x': jnp.where(padding, np.nan, arguments['x'])}
  got = differentiate(bad, np.where(padding, np.float32(np.nan), weights))
  jax.tree.map(np.testing.assert_array_equal, got, differentiate(arguments, weights))


@pytest.mark.parametrize('segments', [None, SEGMENTS], ids=['one', 'packed'])
def test_two_passes_equal_one(segments, assert_close):
  cut = 9  # within a document of both rows
  with jax.enable_x64(True):
    arguments = make()
    halves = (None, None) if segments is None else (segments[:, :cut], segments[:, cut:])

    def one(arguments):
      return causal_conv(**arguments, segment_ids=segments)

    def twice(arguments):
      first, window = causal_conv(**arguments | {'x': arguments['x'][:, :cut]}, segment_ids=halves[0])
      second = arguments | {'x': arguments['x'][:, cut:], 'initial_window': window}
      y, window = causal_conv(**second, segment_ids=halves[1])
      return jnp.concatenate([first, y], axis=1), window

    def gradient(function):
      return jax.jit(jax.grad(lambda a: sum(jnp.sum(jnp.sin(leaf)) for leaf in function(a))))(arguments)

    assert_close(jax.jit(twice)(arguments), jax.jit(one)(arguments), 1e-14)
    assert_close(gradient(twice), gradient(one), 1e-12)


def test_decode_goes_on_after_a_right_padded_prompt(assert_close):
  arguments = make(dtype=np.float32)
  prompt = np.array([[1] * 9 + [0] * 4, [1] * 2 + [0] * 11])
  _, window = run(arguments, prompt)
  token = jnp.ones((2, 1, 3))
  y, _ = run(arguments | {'x': token, 'initial_window': window})
  for row, length in enumerate((9, 2)):
    x = jnp.concatenate([arguments['x'][row : row + 1, :length], token[:1]], axis=1)
    whole, _ = run(arguments | {'x': x, 'initial_window': arguments['initial_window'][row : row + 1]})
    assert_close(y[row, 0], whole[0, -1], 1e-6)


def test_gradient_stays_in_its_document(assert_close):
  arguments = make(dtype=np.float32)
  last = SEGMENTS == SEGMENTS.max(axis=1, keepdims=True)

  @jax.jit
  @jax.grad
  def gradient(arguments):
    y, window = causal_conv(**arguments, segment_ids=SEGMENTS)
    return jnp.sum(jnp.sin(y) * last[..., None]) + jnp.sum(window)

  grad = gradient(arguments)
  assert np.all(np.asarray(grad['x'])[~last] == 0)
  assert np.all(np.asarray(grad['x'])[last] != 0)
  assert np.all(np.asarray(grad['initial_window']) == 0)


def test_bfloat16_sums_in_float32(assert_close):
  arguments = make(dtype=jnp.bfloat16)
  y, window = run(arguments)
  assert y.dtype == window.dtype == jnp.bfloat16
  want = loop(**jax.tree.map(lambda a: np.asarray(a, np.float64), arguments), segment_ids=np.ones((2, 13), int))
  assert_close((y, window), want, 4e-3)  # half a unit in the last place of bf16: one rounding only


def plain(x, weight, bias, initial_window, segment_ids=None):
  """y by the definition, for automatic differentiation."""
  k, l = len(weight), x.shape[1]
  tokens = jnp.concatenate([initial_window, x], axis=1)
  taps = jnp.stack([tokens[:, i : i + l] for i in range(k)])
  if segment_ids is not None:
    first = np.array([next(i for i in row if i) for row in segment_ids])
    ids = np.concatenate([np.tile(first[:, None], k - 1), segment_ids], axis=1)
    same = np.stack([ids[:, i : i + l] == segment_ids for i in range(k)]) & (segment_ids != 0)
    taps, bias = taps * same[..., None], bias * (segment_ids != 0)[..., None]
  return jax.nn.silu(bias + jnp.einsum('kc,kblc->blc', weight, taps))


@pytest.mark.parametrize('k', [1, 4])
@pytest.mark.parametrize('segments', [None, SEGMENTS], ids=['one', 'packed'])
def test_gradients_equal_those_of_the_plain_form(segments, k, assert_close):
  def gradient(function):
    return jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(function(a)))))

  with jax.enable_x64(True):
    arguments = make(k=k)
    want = gradient(lambda a: plain(**a, segment_ids=segments))(arguments)
    got = gradient(lambda a: causal_conv(**a, segment_ids=segments)[0])(arguments)
    assert_close(got, want, 1e-12)


@pytest.mark.parametrize('segments', [None, SEGMENTS], ids=['one', 'packed'])
def test_only_the_inputs_are_kept(segments, kept_bytes):
  arguments = make(dtype=jnp.bfloat16)
  inputs = sum(a.nbytes for a in arguments.values()) + (0 if segments is None else segments.astype(np.int32).nbytes)

  def run(arguments, segments):
    return causal_conv(**arguments, segment_ids=segments)[0]

  assert kept_bytes(run, arguments, segments) <= inputs
  assert kept_bytes(lambda a, _: plain(**a), arguments, None) > 2 * inputs  # the check can fail


def test_gradients_of_bfloat16_parameters_are_summed_in_float32(assert_close):
  arguments = {name: a.astype(jnp.bfloat16) for name, a in make(b=1, l=2000, c=2, window=False).items()}

  def gradient(arguments):
    return jax.jit(jax.grad(lambda a: jnp.sum(jnp.abs(causal_conv(**a)[0].astype(jnp.float32)))))(arguments)

  exact = gradient({name: a.astype(jnp.float32) for name, a in arguments.items()})
  got = gradient(arguments)
  assert {k: g.dtype for k, g in got.items()} == {k: a.dtype for k, a in arguments.items()}
  assert_close(got, exact, 4e-3)  # one rounding to bf16


def test_shapes_that_do_not_fit_are_one_clear_line():
  arguments = make(dtype=np.float32)
  with pytest.raises(ValueError, match=r'causal_conv: bias has shape \(2,\)'):
    causal_conv(**arguments | {'bias': jnp.zeros(2)})
  with pytest.raises(ValueError, match='initial_window has shape'):
    causal_conv(**arguments | {'initial_window': jnp.zeros((2, 2, 3))})
