"""Each layer kind: packing, decoding, dtypes, counts."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lmscale.models import model, stack
from lmscale.models.context import Context, plain_context
from lmscale.models.stacking import make_stacking


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens, positions=None, segments=None):
  ctx = plain_context(tokens) if positions is None else Context(positions, segments)
  hidden, _ = model.forward(config, params, tokens, ctx)
  return model.logits(config, params, hidden)


def _init(config, dtype=jnp.float32):
  return jax.jit(functools.partial(model.init_layers, config, 0, dtype))()


# Positions in the layers are attention's; learned ones are the embedding's, whatever follows.
@pytest.mark.parametrize(('pattern', 'positions'), [*((kind, 'rope') for kind in 'mM*-'), ('*', 'learned')])
def test_packed_documents_equal_documents_alone(pattern, positions):
  config = tiny.change(tiny.MODEL, pattern=pattern, positions=positions, max_positions=16)
  with jax.enable_x64(True):
    params = _init(config, jnp.float64)
    tokens = jax.random.randint(jax.random.key(1), (1, 16), 0, config.vocab)
    cuts = [0, 5, 6, 13, 16]
    segments = np.repeat([1, 2, 3, 0], np.diff(cuts))[None]
    positions = np.concatenate([np.arange(n) for n in np.diff(cuts)])[None]
    packed = _logits(config, params, tokens, positions, segments)
    for start, stop in itertools.pairwise(cuts[:-1]):
      alone = _logits(config, params, tokens[:, start:stop])
      np.testing.assert_allclose(packed[:, start:stop], alone, atol=1e-10)


def test_bfloat16_stays_near_float32():
  config = tiny.change(tiny.MODEL, pattern='M-m*')
  params = _init(config)
  tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 40)
  specs = model.param_specs(config)
  low = jax.tree.map(lambda spec, x: x if spec.full_precision else x.astype(jnp.bfloat16), specs, params)
  exact, rough = _logits(config, params, tokens), _logits(config, low, tokens)
  assert rough.dtype == jnp.float32
  assert 0 < float(jnp.abs(exact - rough).max()) < 0.1 * float(jnp.abs(exact).max())


@pytest.mark.parametrize('table', ['tokens', 'positions'])
def test_gradients_of_embeddings_are_summed_in_float32(table):
  config = tiny.change(tiny.MODEL, positions='learned', max_positions=1)
  tables = {name: jnp.zeros((rows, 16), jnp.bfloat16) for name, rows in (('tokens', 40), ('positions', 1))}
  ids = jnp.zeros((3, 1000), jnp.int32)

  def total(tables):
    return model.embed(config, tables, ids, Context(ids)).astype(jnp.float32).sum()

  np.testing.assert_allclose(np.float32(jax.grad(total)(tables)[table][0]), 3000, rtol=2**-8)


@pytest.mark.parametrize('kind', 'Mm*-')
def test_nothing_is_summed_in_bfloat16_but_by_matrix_products(kind):
  config = tiny.change(tiny.MODEL, bias=True, norm='layernorm1p')
  params = {
    name: jnp.zeros(spec.shape, jnp.float32 if spec.full_precision else jnp.bfloat16)
    for name, spec in stack.layer_specs(config, kind).items()
  }
  x, ids = jnp.zeros((2, 16, 16), jnp.bfloat16), jnp.ones((2, 16), jnp.int32)

  def gradients(params, x):
    return jax.vjp(lambda p, x: stack.apply_layer(config, kind, p, x, Context(ids, ids), None)[0], params, x)[1](x)

  text = str(jax.make_jaxpr(gradients)(params, x))
  assert 'reduce_sum' in text
  assert not re.findall(r'bf16\[[^\]]*\] = (?:reduce_sum|cumsum|scatter-add|reduce_precision)\b.*', text)


@pytest.mark.parametrize('norm', ['rmsnorm', 'layernorm', 'layernorm1p'])
@pytest.mark.parametrize('activation', ['gelu', 'gelu_tanh', 'relu2', 'swiglu', 'geglu'])
def test_norms_and_activations_against_numpy(norm, activation):
  config = tiny.change(tiny.MODEL, pattern='-', norm=norm, bias=True, mlp=tiny.change(tiny.MODEL.mlp, activation=activation))
  with jax.enable_x64(True):
    layer = {
      name: np.asarray(jax.random.normal(jax.random.key(i), spec.shape))
      for i, (name, spec) in enumerate(stack.layer_specs(config, '-').items())
    }
    x = np.asarray(jax.random.normal(jax.random.key(99), (1, 3, 16)))
    y, _ = stack.apply_layer(config, '-', layer, jnp.asarray(x), plain_context(np.zeros((1, 3))), None)
  h = x - x.mean(-1, keepdims=True) if norm != 'rmsnorm' else x
  h = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-5)
  h = h * (layer['norm_scale'] + (norm == 'layernorm1p')) + layer.get('norm_bias', 0)
  erf = np.vectorize(math.erf)
  functions = {
    'gelu': lambda a: a * (1 + erf(a / np.sqrt(2))) / 2,
    'gelu_tanh': lambda a: a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))) / 2,
    'relu2': lambda a: np.maximum(a, 0) ** 2,
    'swiglu': lambda a: a / (1 + np.exp(-a)),
  }
  functions['geglu'] = functions['gelu']
  up = h @ layer['up_kernel'] + layer['up_bias']
  if activation in ('swiglu', 'geglu'):
    up = functions[activation](h @ layer['gate_kernel'] + layer['gate_bias']) * up
  else:
    up = functions[activation](up)
  np.testing.assert_allclose(y, x + up @ layer['down_kernel'] + layer['down_bias'], rtol=1e-9)


def test_initial_values_follow_the_papers():
  config = tiny.change(tiny.MODEL, d_model=64, mamba2=tiny.change(tiny.MODEL.mamba2, heads=512, groups=2))
  layers = model.init_layers(config, 0)['layers']
  mamba2, mamba = layers[0], layers[4]
  a = np.exp(mamba2['A_log'])
  assert a.min() >= 1 and a.max() <= 16 and abs(a.mean() - 8.5) < 1
  dt = np.log1p(np.exp(np.float64(mamba2['dt_bias'])))
  assert dt.min() >= 0.99e-3 and dt.max() <= 0.101
  assert abs(np.log(dt).mean() - np.log(1e-2)) < 0.2
  np.testing.assert_allclose(np.exp(mamba['A_log']), np.tile(np.arange(1, 5), (32, 1)), rtol=1e-6)
  assert np.abs(mamba2['conv_x_kernel']).max() <= 0.5
  assert abs(mamba2['out_kernel'].std() / (0.3 / math.sqrt(6)) - 1) < 0.05
  assert abs(mamba['dt_kernel'].max() - 3**-0.5) < 0.1
  assert (mamba2['D'] == 1).all()


def _a_log_gradients(implementation, chunk, dtype):
  """[layer, head]: d loss / d A_log of two layers whose heads forget at once: steps of about 4, A from -1 to -16."""
  sizes = tiny.change(tiny.MODEL.mamba2, implementation=implementation, chunk=chunk)
  config = tiny.change(tiny.MODEL, pattern='MM', mamba2=sizes)
  tokens = jnp.asarray(np.random.default_rng(1).integers(0, config.vocab, (2, 64)), jnp.int32)
  stacking = make_stacking(config.layers, 'runs')
  with jax.enable_x64(dtype == jnp.float64):
    params = model.init_runs(config, stacking, 0, dtype)
    ((layers,),) = params['layers']
    a_log = jnp.log(jnp.linspace(1, 16, 8)).astype(dtype)
    layers |= {'dt_bias': jnp.full((2, 8), 4, dtype), 'A_log': jnp.stack([a_log, a_log])}

    def loss(params):
      hidden, _ = model.forward(config, params, tokens, plain_context(tokens), None, stacking)
      scores = jax.nn.log_softmax(model.logits(config, params, hidden[:, :-1]))
      return -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1).mean()

    gradient = jax.jit(jax.grad(loss))(params)
    return np.float64(gradient['layers'][0][0]['A_log'])


def test_gradients_of_decays_of_heads_that_forget_at_once_are_no_noise():
  """They are down to 1e-14, far below the numbers of which they must not be made as a difference: what that
  leaves, 1e-6 here, is above Adam's eps by far, and such heads would walk on it at full rate. Each head against
  itself in float64."""
  want = _a_log_gradients('scan', 8, jnp.float64)
  assert np.abs(want).min() < 1e-13 and np.abs(want).max() > 1e-4
  for implementation, chunk in (('scan', 8), ('xla', 32)):
    got = _a_log_gradients(implementation, chunk, jnp.float32)
    error = np.abs(got - want) / np.abs(want)
    assert error.max() < 3e-4, (implementation, chunk, error)


@pytest.mark.parametrize('value', [-5.0, 1e38])
def test_what_is_embedded_at_padding_reaches_no_gradient(value):
  """Rows of the embeddings that only padding reads may hold any finite number: the loss and all gradients keep their
  bits. So what a layer adds at padding is finite, and NaN there takes parameters that are NaN."""
  sizes = {'positions': 'learned', 'max_positions': 32, 'norm': 'layernorm1p', 'bias': True}
  config = tiny.change(tiny.MODEL, pattern='mM*-', **sizes)
  ids = np.random.default_rng(1).integers(0, 39, (2, 16))
  segments = np.array([[1] * 7 + [0] * 2 + [2] * 5 + [0] * 2, [0] * 3 + [1] * 13])
  padding = segments == 0
  tokens, positions = np.where(padding, 39, ids), np.where(padding, 31, np.arange(16))
  params = _init(config)
  loud = {name: m.at[-1].set(value) for name, m in params['embed'].items()}
  want = _loss_and_gradients(config, params, tokens, positions, segments)
  got = _loss_and_gradients(config, params | {'embed': loud}, tokens, positions, segments)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(a, b, jax.tree_util.keystr(path))
    assert np.isfinite(b).all()


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_gradients(config, params, tokens, positions, segments):
  """Of the sum of the squares of the hidden states at real tokens."""

  def loss(params):
    hidden, _ = model.forward(config, params, tokens, Context(positions, segments))
    return jnp.sum(jnp.where(segments[..., None] == 0, 0, hidden) ** 2)

  return jax.value_and_grad(loss)(params)
