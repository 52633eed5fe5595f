"""The step and the program around it."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lmscale.config import MeshConfig
from lmscale.models import model
from lmscale.parallel.feed import Feed
from lmscale.parallel.gradients import make_gradients
from lmscale.parallel.mesh import make_mesh
from lmscale.train import stored
from lmscale.train.program import Program
from lmscale.train.schedule import Schedule, StepInputs

SMALL = tiny.change(tiny.MODEL, pattern='M-')
MLP = tiny.change(tiny.MODEL, pattern='-')  # where the layers do not matter


def _run(config, steps, devices=None, plans=None):
  program = Program(config, devices)
  state = tiny.state(program)
  schedule = Schedule(config)
  losses = []
  for step in range(steps):
    plan = plans[step] if plans else schedule.inputs(step)
    state, metrics = program.step(state, program.batch(plan, tiny.Rows()))
    losses.append(float(metrics['loss']))
  return program, state, losses


def test_training_lowers_the_loss_on_a_mesh_as_on_one_device():
  optimizer = {'learning_rate': 3e-2, 'min_learning_rate': 1e-2}
  runs = []
  for mesh in (MeshConfig(1, 1, 1, 0), MeshConfig(1, 4, 2, 2)):
    config = tiny.config(mesh, SMALL, microbatch=16 if mesh.size == 1 else 2, steps=8)
    config = tiny.change(config, optimizer=tiny.change(config.optimizer, **optimizer))
    plans = [StepInputs(i, 0, 16, 0, 3e-2) for i in range(8)]
    runs.append(_run(config, 8, jax.devices()[: mesh.size], plans)[2])
  np.testing.assert_allclose(runs[0], runs[1], rtol=2e-3)
  assert runs[0][-1] < runs[0][0] - 0.5


@pytest.mark.parametrize('mesh', [MeshConfig(1, 8, 1, 3), MeshConfig(1, 2, 4, 1), MeshConfig(1, 4, 2, 0)], ids=str)
def test_initial_state_is_the_same_on_every_mesh(mesh):
  many = Program(tiny.config(mesh, SMALL), jax.devices()[: mesh.size])
  jax.tree.map(np.testing.assert_array_equal, many.stored(many.init()), _begun_on_one_device())


@functools.cache
def _begun_on_one_device():
  one = Program(tiny.config(model=SMALL), jax.devices()[:1])
  return one.stored(one.init())


def test_the_stored_form_is_the_state_itself():
  program = Program(tiny.config(MeshConfig(1, 4, 2, 3)))
  state = tiny.state(program)
  tree = program.stored(state)
  assert {id(leaf) for leaf in jax.tree.leaves(tree)} == {id(leaf) for leaf in jax.tree.leaves(state)}
  back = program.from_stored(tree)
  jax.tree.map(lambda a, b: np.testing.assert_equal(a is b, True), back, state)
  abstract = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), program.abstract_stored())
  assert abstract == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def test_the_canonical_view_is_the_same_for_every_stacking():
  views = []
  for mode in ('runs', 'unrolled'):
    program = Program(tiny.config(model=tiny.change(SMALL, pattern='M-M-'), stack=mode), jax.devices()[:1])
    views.append(stored.canonical(program.stored(program.init()), program.index))
  assert set(views[0]['params']['layers']) == {str(i) for i in range(4)}
  jax.tree.map(np.testing.assert_array_equal, *views)


def test_a_step_that_is_not_finite_changes_only_the_counters():
  program, state, _ = _run(tiny.config(MeshConfig(1, 4, 2, 1), MLP), 1)
  state.params['head']['kernel'] = state.params['head']['kernel'].at[0, 0].set(jnp.inf)
  before = jax.tree.map(np.asarray, (state.params, state.opt_state))
  state, metrics = program.step(state, program.batch(Schedule(program.config).inputs(1), tiny.Rows()))
  assert not bool(metrics['ok'])
  jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), before)
  assert (int(state.step), int(state.skipped), int(state.spikes)) == (2, 1, 0)


class NoLabels(tiny.Rows):
  """Every document is one token."""

  def batch(self, first_sample, rows):
    found = super().batch(first_sample, rows)
    return found | {'labels': np.full_like(found['labels'], -1)}


def test_a_step_in_which_no_label_counts_changes_only_the_number_of_steps():
  program, state, _ = _run(tiny.config(MeshConfig(1, 4, 2, 1), MLP), 1)
  before = jax.tree.map(np.asarray, state)
  state, metrics = program.step(state, program.batch(Schedule(program.config).inputs(1), NoLabels()))
  assert (float(metrics['loss']), int(metrics['tokens']), bool(metrics['ok'])) == (0.0, 0, False)
  jax.tree.map(np.testing.assert_array_equal, state, before.replace(step=before.step + 1))


@pytest.mark.parametrize('skip', [0.0, 3.0])
def test_a_spike_changes_only_the_counters_where_it_is_skipped(skip):
  program, state, _ = _run(tiny.config(MeshConfig(1, 4, 2, 1), MLP, spike_skip=skip), 1)
  before = jax.tree.map(np.asarray, (state.params, state.opt_state))
  usual = jnp.full_like(state.norms, 1e-6)
  state, metrics = program.step(
    state.replace(norms=jax.device_put(usual, state.norms.sharding)), program.batch(Schedule(program.config).inputs(1), tiny.Rows())
  )
  after = jax.tree.map(np.asarray, (state.params, state.opt_state))
  same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)]
  assert all(same) if skip else not any(same)
  assert bool(metrics['ok']) is not bool(skip)
  assert (int(state.step), int(state.skipped), int(state.spikes)) == (2, 0, int(bool(skip)))
  assert float(metrics['usual_norm']) == pytest.approx(1e-6) and float(state.norms[-1]) == pytest.approx(float(metrics['grad_norm']))


def test_a_ramp_uses_one_program_for_every_batch_size():
  full = tiny.config(MeshConfig(1, 4, 1, 1), MLP, microbatch=1)
  program, _state, losses = _run(full, 2, jax.devices()[:4], [StepInputs(0, 0, 8, 0, 1e-2), StepInputs(1, 8, 16, 0, 1e-2)])
  assert program._step._cache_size() == 1
  half = tiny.config(MeshConfig(1, 4, 1, 1), MLP, microbatch=1, batch=8)
  _, _, expected = _run(half, 1, jax.devices()[:4], [StepInputs(0, 0, 8, 0, 1e-2)])
  np.testing.assert_allclose(losses[0], expected[0], rtol=1e-6)


def _reduced_dtypes(jaxpr, found):
  for equation in jaxpr.eqns:
    if any(word in equation.primitive.name for word in ('psum', 'reduce_scatter')):
      found.update(str(v.aval.dtype) for v in equation.invars if v.aval.ndim)
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, 'eqns')):
      value = getattr(value, 'jaxpr', value)
      if hasattr(value, 'eqns'):
        _reduced_dtypes(value, found)
  return found


@pytest.mark.parametrize('zero', [0, 1, 2, 3])
@pytest.mark.parametrize('grad_dtype', ['float32', 'bfloat16'])
def test_gradients_are_reduced_in_the_dtype_asked_for(zero, grad_dtype):
  config = tiny.config(MeshConfig(1, 8, 1, zero), SMALL, compute_dtype='bfloat16', grad_dtype=grad_dtype)
  program = Program(config)
  batch = {name: jax.ShapeDtypeStruct((2, 8, 16), jnp.int32) for name in tiny.Rows().arrays}
  batch['microbatches'] = jax.ShapeDtypeStruct((), jnp.int32)
  with jax.set_mesh(program.mesh):
    jaxpr = jax.make_jaxpr(make_gradients(program.setup, model.next_token_loss(config.model, 8)))(program.abstract_state().params, batch)
  found = _reduced_dtypes(getattr(jaxpr, 'jaxpr', jaxpr), collections.Counter())
  assert set(found) == {grad_dtype}


def test_bfloat16_training_keeps_float32_masters():
  _program, state, losses = _run(tiny.config(MeshConfig(1, 4, 2, 2), SMALL, compute_dtype='bfloat16'), 1)
  assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype('float32')}
  _, _, exact = _run(tiny.config(MeshConfig(1, 4, 2, 2), SMALL), 1)
  assert losses[0] != exact[0]
  np.testing.assert_allclose(losses[0], exact[0], rtol=2e-2)


def test_evaluation_is_the_mean_over_counted_tokens_whatever_the_number_of_samples():
  program = Program(tiny.config(MeshConfig(1, 4, 2, 1), SMALL))
  one = Program(tiny.config(model=SMALL, microbatch=16), jax.devices()[:1])
  state, alone = tiny.state(program), tiny.state(one)
  for samples in (1, 6, 11):
    loss, count = program.evaluate(state, tiny.Rows(), samples)
    expected, counted = one.evaluate(alone, tiny.Rows(), samples)
    assert count == counted == (tiny.Rows().batch(0, range(samples))['labels'] >= 0).sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_process_reads_only_the_rows_of_its_devices(monkeypatch):
  config = tiny.config(MeshConfig(1, 4, 1, 1), SMALL, microbatch=2)
  feed = Feed(config, make_mesh(config.mesh, jax.devices()[:4]))
  assert feed._local_rows(16) == [range(16)]
  held = {jax.devices()[1]: (slice(None), slice(2, 4), slice(None)), jax.devices()[2]: (slice(None), slice(4, 6), slice(None))}
  monkeypatch.setattr(feed, 'rows', type('Held', (), {'addressable_devices_indices_map': lambda self, shape: held})())
  assert feed._local_rows(16) == [range(2, 4), range(4, 6), range(10, 12), range(12, 14)]
  assert feed._local_rows(11) == [range(2, 4), range(4, 6), range(10, 11)]
