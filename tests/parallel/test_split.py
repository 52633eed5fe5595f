"""A derivative in two halves is the derivative, and keeps nothing of a weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lmscale.models.context import Context
from lmscale.models.model import init_layers
from lmscale.models.stack import SELECTIVE, apply_layer, layer_specs
from lmscale.parallel.pipeline import split

ROWS = tiny.Rows()
CONFIG = tiny.change(tiny.MODEL, pattern='*-Mm')


def _layer(kind, dtype, policy):
  """(function, parameters in the dtype in which they are used, x, ct)."""
  params = init_layers(CONFIG, 0)['layers'][CONFIG.layers.index(kind)]
  params = {name: leaf if leaf.ndim < 2 else leaf.astype(dtype) for name, leaf in params.items()}
  batch = ROWS.batch(0, range(2))
  ctx = Context(jnp.asarray(batch['positions']), jnp.asarray(batch['segment_ids']))

  def layer(params, x):
    return apply_layer(CONFIG, kind, params, x, ctx, None)[0]

  x, ct = (jax.random.normal(jax.random.key(i), (2, 16, 16), dtype) for i in (1, 2))
  return (layer if policy is None else jax.checkpoint(layer, policy=policy)), params, x, ct


@pytest.mark.parametrize('dtype,policy', [('bfloat16', None), ('float32', SELECTIVE)], ids=['none', 'selective'])
@pytest.mark.parametrize('kind', CONFIG.layers)
def test_two_halves_are_the_derivative(kind, dtype, policy):
  layer, params, x, ct = _layer(kind, dtype, policy)
  keep, shapes = split.kept(layer, params, x)

  @jax.jit
  def halves(params, x, ct):
    y, saved = split.forward(layer, params, x, keep)
    return y, saved, split.backward(layer, params, jnp.zeros_like(x), keep, saved, ct)

  y, saved, gradients = halves(params, x, ct)
  assert [(leaf.shape, leaf.dtype) for leaf in saved] == [(leaf.shape, leaf.dtype) for leaf in shapes]
  weights = {shape for leaf in params.values() if leaf.ndim > 1 for shape in (leaf.shape, leaf.shape[::-1])}
  assert not [leaf.shape for leaf in saved if leaf.shape in weights]
  expected, vjp = jax.jit(lambda params, x: jax.vjp(layer, params, x))(params, x)
  bound = 1e-5 if dtype == 'float32' else 2e-2
  error, leaf = tiny.worst((y, *gradients), (expected, *vjp(ct)))
  assert error <= bound, (leaf, error)


def test_nothing_waits_that_follows_from_parameters():
  """A cast, a transposed weight, what a loop makes of a weight; but a loop's carry into which the input goes does wait."""

  def layer(params, x):
    w = jnp.exp(params['w'])  # the derivative needs exp(w)
    looped = jax.lax.fori_loop(0, 3, lambda _, w: jnp.sin(w), w)
    return jnp.sin(x @ w.T) * jnp.cos(x @ looped)

  params, x = {'w': jnp.ones((4, 4))}, jnp.ones((3, 4))
  keep, shapes = split.kept(layer, params, x)
  assert {leaf.shape for leaf in shapes} == {(3, 4)}
  assert len(keep) > len(shapes)

  def mixing(params, x):
    return jax.lax.scan(lambda carry, _: (jnp.sin(carry @ params['w']), None), x, None, length=3)[0]

  assert (3, 3, 4) in {leaf.shape for leaf in split.kept(mixing, params, x)[1]}


def _flops(function, *arguments):
  return jax.jit(function).lower(*arguments).compile().cost_analysis()['flops']


@pytest.mark.parametrize('policy,times', [(None, 2), (SELECTIVE, 2), ('full', 2 + 2 / 3)], ids=['none', 'selective', 'full'])
def test_what_is_computed_again(policy, times):
  """FLOPs of an MLP's backward half over those of its forward half: the dummy forward pass is gone, and nobody needs `down` again."""
  config = tiny.change(CONFIG, d_model=64, mlp=tiny.change(CONFIG.mlp, d_ff=256))
  params = jax.tree.map(lambda s: s.init(jax.random.key(0), s.shape), layer_specs(config, '-'))
  x = jnp.ones((2, 64, 64))
  ctx = Context(jnp.zeros((2, 64), jnp.int32), jnp.ones((2, 64), jnp.int32))

  def layer(params, x):
    return apply_layer(config, '-', params, x, ctx, None)[0]

  policy = jax.checkpoint_policies.nothing_saveable if policy == 'full' else policy
  layer = layer if policy is None else jax.checkpoint(layer, policy=policy)
  keep, _ = split.kept(layer, params, x)
  forward = _flops(lambda p, x: split.forward(layer, p, x, keep)[0], params, x)
  saved = split.forward(layer, params, x, keep)[1]
  backward = _flops(lambda p, saved, ct: split.backward(layer, p, jnp.zeros_like(x), keep, saved, ct), params, saved, x)
  np.testing.assert_allclose(backward / forward, times, rtol=0.05)




