"""AdamW against NumPy in float64 and against closed forms; the decay rule by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmscale.config import OptimizerConfig
from lmscale.train.optimizer import apply_update, decays, global_norm, make_optimizer

CONFIG = OptimizerConfig(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


def numpy_adamw(params, grads_per_step, rates, mask, clip):
  """AdamW written out from arXiv 1711.05101, algorithm 2, with a global-norm clip before it."""
  mu = {k: np.zeros_like(v) for k, v in params.items()}
  nu = {k: np.zeros_like(v) for k, v in params.items()}
  for t, (grads, rate) in enumerate(zip(grads_per_step, rates, strict=True), start=1):
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    scale = clip / norm if clip and norm > clip else 1.0
    for k in params:
      g = grads[k] * scale
      mu[k] = 0.9 * mu[k] + 0.1 * g
      nu[k] = 0.95 * nu[k] + 0.05 * g * g
      direction = mu[k] / (1 - 0.9**t) / (np.sqrt(nu[k] / (1 - 0.95**t)) + 1e-8)
      params[k] = params[k] - rate * (direction + 0.1 * mask[k] * params[k])
  return params


@pytest.mark.parametrize('clip', [0.0, 0.7])
def test_several_steps_equal_numpy(clip):
  rng = np.random.default_rng(0)
  params = {'kernel': rng.normal(size=(3, 5)), 'scale': rng.normal(size=(5,))}
  grads = [{k: rng.normal(size=v.shape) * s for k, v in params.items()} for s in (1.0, 0.01, 3.0, 0.1, 1.0)]
  rates = [0.01, 0.02, 0.03, 0.02, 0.01]
  mask = {'kernel': True, 'scale': False}
  want = numpy_adamw(dict(params), grads, rates, mask, clip)
  with jax.enable_x64(True):
    tx = make_optimizer(CONFIG, mask)
    got = jax.tree.map(jnp.asarray, params)
    state = tx.init(got)
    step = jax.jit(lambda g, s, p, rate: apply_update(tx, g, s, p, rate, global_norm(g), clip))
    for g, rate in zip(grads, rates, strict=True):
      got, state = step(jax.tree.map(jnp.asarray, g), state, got, rate)
    for k in params:
      assert got[k].dtype == jnp.float64
      np.testing.assert_allclose(got[k], want[k], rtol=1e-12, atol=1e-12)


def test_first_step_is_the_sign_of_the_gradient():
  """Bias correction makes the first direction g / (|g| + eps): closed form, whatever the gradient's size."""
  params = {'w': jnp.array([[1.0, -2.0, 3.0]])}
  tx = make_optimizer(OptimizerConfig(weight_decay=0.0), {'w': True})
  grads = {'w': jnp.array([[1e-3, -40.0, 0.5]])}
  got, _ = apply_update(tx, grads, tx.init(params), params, 0.1, global_norm(grads), 0.0)
  np.testing.assert_allclose(got['w'], [[0.9, -1.9, 2.9]], rtol=1e-4)


def test_zero_gradient_leaves_pure_decay():
  params = {'w': jnp.full((2, 2), 4.0), 'scale': jnp.full((2,), 4.0)}
  tx = make_optimizer(OptimizerConfig(weight_decay=0.5), {'w': True, 'scale': False})
  grads = jax.tree.map(jnp.zeros_like, params)
  state = tx.init(params)
  for _ in range(3):
    params, state = apply_update(tx, grads, state, params, 0.1, global_norm(grads), 1.0)
  np.testing.assert_allclose(params['w'], 4.0 * (1 - 0.1 * 0.5) ** 3, rtol=1e-6)
  np.testing.assert_array_equal(params['scale'], 4.0)


def test_low_precision_gradients_update_full_precision_masters():
  params = {'w': jnp.ones((2, 2), jnp.float32)}
  tx = make_optimizer(CONFIG, {'w': True})
  grads = {'w': jnp.full((2, 2), 0.5, jnp.bfloat16)}
  norm = global_norm(grads)
  got, state = apply_update(tx, grads, tx.init(params), params, jnp.float32(0.1), norm, 1.0)
  assert norm.dtype == got['w'].dtype == state[0].mu['w'].dtype == jnp.float32
  np.testing.assert_allclose(norm, 1.0)


def test_decay_rule_by_name_and_shape():
  decayed = {'out_kernel': (8, 4), 'tokens': (264, 8), 'positions': (16, 8), 'conv_x_kernel': (4, 8)}
  exempt = {'norm_scale': (8,), 'dt_bias': (4,), 'D': (4,), 'conv_x_bias': (8,), 'odd_bias': (2, 3)}
  exempt['A_log'] = (8, 16)
  assert [name for name, shape in (decayed | exempt).items() if decays(name, shape)] == list(decayed)
  assert not decays('A_log', (4,))
