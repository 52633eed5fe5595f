"""A step, an evaluation and a sample on a pipelined mesh are those of one device, to the rounding of float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lmscale.config import MeshConfig
from lmscale.models.stacking import FILLER
from lmscale.train.program import Program
from lmscale.train.schedule import Schedule
from lmscale.train.stored import canonical, named

# On none of these meshes have all stages equally many layers of each kind.
MODEL = tiny.change(tiny.MODEL, pattern='*-*---*-')
# (mesh, sequences of a microbatch). Of one batch they make 1, 8, 4, 8, 2, 16 and 4 microbatches of each data rank.
ONE = tiny.ONE, 16
TWO = MeshConfig(2, 2, 2, 1), 1
INTERLEAVED = MeshConfig(2, 2, 2, 2, schedule='interleaved', virtual=2, vocab_on_pipe=True), 2
OTHERS = [
  (MeshConfig(4, 2, 1, 3, vocab_on_pipe=True), 1),
  (MeshConfig(2, 2, 1, 0, schedule='gpipe'), 4),
  (MeshConfig(4, 1, 2, 0, True, '1f1b_strict'), 1),
  (MeshConfig(2, 1, 4, 0, True, 'interleaved', 3), 4),
]


def scale(*splits):
  return [pytest.param(split, marks=pytest.mark.scale) for split in splits]


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


@functools.cache
def program(split, **train):
  mesh, microbatch = split
  config = tiny.config(mesh, MODEL, compute_dtype='float64', microbatch=microbatch, spike_skip=100.0, **train)
  config = tiny.change(config, optimizer=tiny.change(config.optimizer, learning_rate=1e-2))
  return Program(config, jax.devices()[: mesh.size])


def train(on, steps=3):
  """(state, [(loss, gradient norm, tokens) of each step])."""
  state, found, schedule = tiny.state(on), [], Schedule(on.config)
  for step in range(steps):
    state, metrics = on.step(state, on.batch(schedule.inputs(step), tiny.Rows()))
    found.append([float(metrics[name]) for name in ('loss', 'grad_norm', 'tokens')])
  return state, found


@functools.cache
def expected(**fields):
  """Of one device: (canonical view of the state after three steps, its losses, norms and tokens)."""
  on = program(ONE, **fields)
  state, found = train(on)
  return jax.tree.map(np.asarray, canonical(on.stored(state), on.index)), found


def fillers(on, state):
  """The rows of its stacks that hold no layer."""
  leaves = named(on.stored(state))
  return [leaf[row] for parent, stack in on.index.items() for path, leaf in leaves.items() if path.rpartition('/')[0] == parent
          for row, layer in enumerate(stack.layers) if layer == FILLER]  # fmt: skip


@pytest.mark.parametrize('split', [TWO, INTERLEAVED, *scale(*OTHERS)], ids=str)
def test_any_split_of_one_batch_trains_as_one_device(split):
  on, (want, numbers) = program(split), expected()
  state, found = train(on)
  np.testing.assert_allclose(found, numbers, rtol=1e-10)
  assert found[2][0] < found[0][0] - 0.05
  for path, got in named(canonical(on.stored(state), on.index)['params']).items():
    reference = named(want['params'])[path]
    assert np.abs(got - reference).max() <= 1e-8 * np.abs(reference).max(), path  # Adam divides by small numbers
  assert len(fillers(on, state)) > 8 and not any(np.any(row) for row in fillers(on, state))


@pytest.mark.parametrize('split', [INTERLEAVED, *scale(TWO)], ids=str)
def test_a_ramp_uses_one_program(split):
  """4, 6 and 8 microbatches; interleaved 2, 4 and 4, as it needs multiples of the pipeline's length."""
  increment, tokens = {TWO: (4, 256), INTERLEAVED: (8, 128)}[split]
  ramp = {'ramp_start': 8, 'ramp_increment': increment, 'ramp_tokens': tokens}
  on = program(split, **ramp)
  inputs = [Schedule(on.config).inputs(i) for i in range(3)]
  assert [i.batch for i in inputs] == [8, min(16, 8 + increment), 16]
  ticks = [int(on.batch(i, tiny.Rows())['ticks']) for i in inputs]
  assert ticks[0] < ticks[1] and ticks == sorted(ticks)  # fewer microbatches take less time
  _, found = train(on)
  assert on._step._cache_size() == 1
  np.testing.assert_allclose(found, expected(**ramp)[1], rtol=1e-10)


@pytest.mark.parametrize('split', [INTERLEAVED, *scale(TWO, *OTHERS)], ids=str)
def test_an_evaluation_of_any_number_of_samples(split):
  on, one = program(split), program(ONE)
  state, alone = tiny.state(on), tiny.state(one)
  for samples in (1, 6, 11):
    loss, count = on.evaluate(state, tiny.Rows(), samples)
    want, counted = one.evaluate(alone, tiny.Rows(), samples)
    assert count == counted == (tiny.Rows().batch(0, range(samples))['labels'] >= 0).sum()
    assert loss == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize('split', [INTERLEAVED, *scale(TWO, *OTHERS)], ids=str)
def test_a_greedy_sample(split):
  on, one = program(split), program(ONE)
  want = one.generate(tiny.state(one), [5, 9, 2], 12, temperature=0.0, seed=0)
  assert len(set(want)) > 3
  assert on.generate(tiny.state(on), [5, 9, 2], 12, temperature=0.0, seed=0) == want


class Rare(tiny.Rows):
  """Token 39 is in one sample alone."""

  def __init__(self):
    super().__init__()
    tokens = self.arrays['tokens']
    tokens[tokens == 39] = 38
    tokens[5, 3] = 39


@pytest.mark.parametrize('split', [TWO, INTERLEAVED, *scale(ONE, *OTHERS)], ids=str)
def test_a_microbatch_that_is_not_finite_changes_only_the_counters(split):
  """And the run goes on: the next steps are those of one device that has skipped nothing."""
  on = program(split)
  state, inputs = tiny.state(on), Schedule(on.config).inputs
  state, _ = on.step(state, on.batch(inputs(0), tiny.Rows()))
  tokens = state.params['embed']['tokens']
  whole = np.asarray(tokens[39])
  state.params['embed']['tokens'] = jax.device_put(tokens.at[39].set(jnp.inf), tokens.sharding)
  before = jax.tree.map(np.asarray, (state.params, state.opt_state))
  state, metrics = on.step(state, on.batch(inputs(0), Rare()))
  assert not bool(metrics['ok'])
  jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), before)
  assert (int(state.step), int(state.skipped), int(state.spikes)) == (2, 1, 0)
  tokens = state.params['embed']['tokens']
  state.params['embed']['tokens'] = jax.device_put(tokens.at[39].set(whole), tokens.sharding)
  state, metrics = on.step(state, on.batch(inputs(1), tiny.Rows()))
  assert bool(metrics['ok'])
  np.testing.assert_allclose(float(metrics['loss']), expected()[1][1][0], rtol=1e-10)
  _check_spike(on, state, on.batch(inputs(2), tiny.Rows()))
  assert on._step._cache_size() == 1


def _check_spike(on, state, batch):
  """A step whose norm is far above those of the last ones is skipped, and counted."""
  state = state.replace(norms=jax.device_put(jnp.full_like(state.norms, 1e-6), state.norms.sharding))
  before = jax.tree.map(np.asarray, (state.params, state.opt_state))
  state, metrics = on.step(state, batch)
  assert np.isfinite(float(metrics['loss'])) and not bool(metrics['ok'])
  jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), before)
  assert (int(state.skipped), int(state.spikes)) == (1, 1)
