"""Every `train.compute_dtype` trains, evaluates and samples with every layer kind, or is refused in one line."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lmscale.config import ConfigError, validate
from lmscale.models import model
from lmscale.parallel.gradients import make_gradients
from lmscale.train.program import Program
from lmscale.train.schedule import Schedule

EVERY_KIND = tiny.change(tiny.MODEL, pattern='mM*-')
DTYPES = ('float32', 'float64', 'bfloat16')
MASTER = {'float64': 'float64'}  # else float32
REFUSED = {('float32', 'float64'), ('bfloat16', 'float64'), ('float64', 'bfloat16')}  # (compute, gradients)
NEAR = {'float32': 1e-5, 'bfloat16': 2e-2, 'float64': 0}  # of the loss in float64


@functools.cache
def _program(compute, grad='float32'):
  """(program, its initial state), on one device."""
  with jax.enable_x64(compute == 'float64'):
    config = tiny.config(model=EVERY_KIND, compute_dtype=compute, grad_dtype=grad, batch=2, microbatch=2)
    program = Program(config, jax.devices()[:1])
    return program, tiny.state(program)


def _step(compute, grad='float32'):
  program, state = _program(compute, grad)
  state = jax.tree.map(jnp.copy, state)  # a step consumes its own
  return program.step(state, program.batch(Schedule(program.config).inputs(1), tiny.Rows()))


def _evaluate(compute):
  program, state = _program(compute)
  return program.evaluate(state, tiny.Rows(), 2)[0]


def _sample(compute):
  program, state = _program(compute)
  return program.generate(state, [5, 9, 2], 4, temperature=0.0, seed=0)


@functools.cache
def _exact(feature):
  with jax.enable_x64(True):
    return {'step': lambda: float(_step('float64')[1]['loss']), 'evaluation': lambda: _evaluate('float64')}[feature]()


@pytest.mark.parametrize('compute', DTYPES)
@pytest.mark.parametrize('feature', ['step', 'evaluation', 'sample'])
def test_every_feature_in_every_compute_dtype(feature, compute):
  with jax.enable_x64(compute == 'float64'):
    if feature == 'sample':
      assert all(0 <= token < EVERY_KIND.vocab for token in _sample(compute))
      held, master = _dtypes(_compute_copy(compute)), MASTER.get(compute, 'float32')
      assert held == {compute, master}  # vectors that are never cast stay as the master has them
      return
    if feature == 'step':
      state, metrics = _step(compute)
      loss = metrics['loss']
      assert bool(metrics['ok']) and np.isfinite(metrics['grad_norm']) and metrics['grad_norm'] > 0
      for tree in (state.params, state.opt_state[0]):
        assert _dtypes(tree) - {'int32'} == {MASTER.get(compute, 'float32')}
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
    else:
      loss = _evaluate(compute)
  np.testing.assert_allclose(float(loss), _exact(feature), rtol=NEAR[compute])


def _compute_copy(compute):
  program, state = _program(compute)
  return program._run(program._compute_copy, state.params)


def _dtypes(tree):
  return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize('compute', DTYPES)
@pytest.mark.parametrize('grad', DTYPES)
def test_every_dtype_of_gradients_is_what_is_summed_or_one_line(compute, grad):
  short = tiny.change(EVERY_KIND, pattern='-')
  config = tiny.config(model=short, compute_dtype=compute, grad_dtype=grad, batch=2, microbatch=2)
  if (compute, grad) in REFUSED:
    with pytest.raises(ConfigError) as refused:
      validate(config)
    assert str(refused.value).startswith('train.grad_dtype: ') and '\n' not in str(refused.value)
    return
  validate(config)
  with jax.enable_x64(compute == 'float64'):
    program = Program(config, jax.devices()[:1])
    batch = {name: jax.ShapeDtypeStruct((1, 2, 16), jnp.int32) for name in tiny.Rows().arrays}
    batch['microbatches'] = jax.ShapeDtypeStruct((), jnp.int32)
    gradients = make_gradients(program.setup, model.next_token_loss(config.model, 8))
    with jax.set_mesh(program.mesh):
      summed, _, _ = jax.eval_shape(gradients, program.abstract_state().params, batch)
  assert _dtypes(summed) == {compute if compute == 'float64' else grad}
