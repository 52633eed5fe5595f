"""Elementwise functions of the layers: in at least float32 and rounded once; the clamp of Mamba-2's step sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lmscale.models import stack
from lmscale.models.context import Context
from lmscale.models.layers import empty_cache
from lmscale.models.layers.mamba2 import clamp
from lmscale.models.layers.mlp import activate


@pytest.mark.parametrize('name', ['gelu', 'gelu_tanh', 'relu2', 'swiglu', 'geglu'])
def test_bfloat16_activations_are_the_rounded_float32_ones(name):
  up = jnp.asarray(np.random.default_rng(0).normal(0, 3, 4096), jnp.bfloat16)
  inputs = (up, up[::-1]) if name in ('swiglu', 'geglu') else (up,)
  low = activate(name, *inputs)
  exact = activate(name, *(m.astype(jnp.float32) for m in inputs))
  assert low.dtype == jnp.bfloat16 and exact.dtype == jnp.float32
  np.testing.assert_array_equal(np.float32(low), np.float32(exact.astype(jnp.bfloat16)))


def test_the_clamp_is_a_clip_with_its_gradient():
  """At a bound the gradient is 1, as in PyTorch's clamp."""
  dt = jnp.array([0.01, 0.1, 0.2, 0.5, 0.7])
  for (low, high), inside in (
    ((0.1, 0.5), [0, 1, 1, 1, 0]), ((0.1, 0.0), [0, 1, 1, 1, 1]), ((0.0, 0.5), [1, 1, 1, 1, 0]),
  ):  # fmt: skip
    got, pull = jax.vjp(lambda dt, low=low, high=high: clamp(dt, low, high), dt)
    np.testing.assert_array_equal(got, np.clip(dt, low, high or np.inf))
    np.testing.assert_array_equal(pull(jnp.ones(5))[0], inside)
  assert clamp(dt, 0.0, 0.0) is dt


def _mamba2(config, params, x, ctx, weights):
  """(output, gradients) of one layer for a weighted sum of its output."""

  def loss(params, x):
    y, _ = stack.apply_layer(config, 'M', params, x, ctx, None)
    return jnp.sum(weights * y), y

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)


@pytest.mark.parametrize('implementation', ['scan', 'xla'])
def test_a_clamped_layer_equals_the_recurrence_in_float64(implementation):
  """Against the definition with jnp.clip, written out; one bound cuts some step sizes off, the other one too."""
  sizes = tiny.change(tiny.MODEL.mamba2, dt_min=0.3, dt_max=0.8, implementation=implementation)
  config = tiny.change(tiny.MODEL, pattern='M', mamba2=sizes)
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    params = {name: jnp.asarray(rng.normal(0, 0.4, s.shape)) for name, s in stack.layer_specs(config, 'M').items()}
    x, weights = jnp.asarray(rng.normal(size=(2, 1, 6, 16)))
    positions = jnp.arange(6)[None]
    (_, y), grads = _mamba2(config, params, x, Context(positions), weights)
    want, want_grads = _plain(config, params, x, weights)
    np.testing.assert_allclose(y, want, rtol=1e-9, atol=1e-10)
    error, leaf = tiny.worst(grads, want_grads)
    assert error < 1e-8, leaf
    dt = _step_sizes(config, params, x)
    assert (dt < 0.3).any() and (dt > 0.8).any() and ((dt > 0.3) & (dt < 0.8)).any()
    slots = jnp.zeros(1, jnp.int32)
    cache, outputs = empty_cache(config, 'M', 1, 12, jnp.float64), []
    step = jax.jit(functools.partial(stack.apply_layer, config, 'M'))
    for i in range(3):  # the decode path
      out, cache = step(params, x[:, i : i + 1], Context(positions[:, i : i + 1], slots=slots + i), cache)
      outputs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), want[:, :3], rtol=1e-9, atol=1e-10)


def _normed(config, params, x):
  return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + config.norm_eps) * params['norm_scale']


def _step_sizes(config, params, x):
  return jax.nn.softplus(_normed(config, params, x) @ params['dt_kernel'] + params['dt_bias'])


def _plain(config, params, x, weights):
  """The layer as transformers clamps it: clip(softplus(dt + bias), low, high), and a loop over tokens."""
  c = config.mamba2

  def layer(params, x):
    h = _normed(config, params, x)

    def conv(name):
      m = jnp.pad(h @ params[f'{name}_kernel'], ((0, 0), (c.conv - 1, 0), (0, 0)))
      taps = sum(m[:, i : i + x.shape[1]] * params[f'conv_{name}_kernel'][i] for i in range(c.conv))
      return jax.nn.silu(taps + params[f'conv_{name}_bias'])

    u = conv('x').reshape(1, -1, c.heads, c.head_dim)
    b, n = (jnp.repeat(conv(name).reshape(1, -1, c.groups, c.state), c.heads // c.groups, 2) for name in 'BC')
    dt = jnp.clip(_step_sizes(config, params, x), c.dt_min, c.dt_max)
    state, ys = jnp.zeros((1, c.heads, c.head_dim, c.state)), []
    for i in range(x.shape[1]):
      decay = jnp.exp(-jnp.exp(params['A_log']) * dt[:, i])[..., None, None]
      state = decay * state + (dt[:, i, :, None] * u[:, i])[..., None] * b[:, i, :, None]
      ys.append(jnp.einsum('bhpn,bhn->bhp', state, n[:, i]) + params['D'][:, None] * u[:, i])
    gated = jnp.stack(ys, 1).reshape(1, -1, c.groups, c.heads // c.groups * c.head_dim)
    gated = gated * jax.nn.silu(h @ params['z_kernel']).reshape(gated.shape)
    normed = gated / jnp.sqrt(jnp.mean(gated**2, -1, keepdims=True) + config.norm_eps)
    return x + (normed.reshape(1, x.shape[1], -1) * params['gate_norm_scale']) @ params['out_kernel']

  loss = lambda params, x: (jnp.sum(weights * layer(params, x)), layer(params, x))
  (_, y), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)
  return y, grads
