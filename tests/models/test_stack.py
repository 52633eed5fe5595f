"""Runs, their inverse, and equal results in every way of executing a stack."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.config import hybrid_pattern
from lmscale.models import model
from lmscale.models import stacking as lib
from lmscale.models.context import Context


def spelled(stacking):
  """(unit, repeats) of each run."""
  return [(''.join(stack.kind for stack in run), len(run[0].layers)) for run in stacking]


HYBRID = 'M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-'


@given(st.text('Mm*-', min_size=1, max_size=24))
@settings(max_examples=60, deadline=None)
def test_runs_spell_the_pattern(layers):
  stacking = lib.find_runs(layers)
  assert ''.join(unit * repeats for unit, repeats in spelled(stacking)) == layers
  assert sum(len(run) for run in stacking) <= len(layers)
  rows = sorted((index, stack.kind) for run in stacking for stack in run for index in stack.layers)
  assert rows == list(enumerate(layers))


def test_runs_of_the_published_patterns():
  assert spelled(lib.find_runs('*-' * 32)) == [('*-', 32)]
  assert spelled(lib.find_runs('M' * 56)) == [('M', 56)]
  assert sum(map(len, lib.find_runs(HYBRID))) == 22


def slowest_runs(layers):
  """The same rule, by trying every last run: of the cheapest the one that begins first."""
  best = [(0, 0, [])]
  for end in range(1, len(layers) + 1):
    options = []
    for start in range(end):
      for length in (n for n in range(1, end - start + 1) if (end - start) % n == 0):
        if layers[start:end] == layers[start : start + length] * ((end - start) // length):
          run = (layers[start : start + length], (end - start) // length)
          options.append((best[start][0] + length, best[start][1] + 1, [*best[start][2], run]))
    best.append(min(options, key=lambda option: option[:2]))
  return best[-1][2]


@given(st.lists(st.text('M*-', min_size=1, max_size=4), min_size=1, max_size=3), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_runs_are_the_cheapest(parts, times):
  layers = ''.join(part * times for part in parts)
  assert spelled(lib.find_runs(layers)) == slowest_runs(layers)


def test_runs_of_the_deepest_pattern_take_a_moment():
  start = time.process_time()
  lib.find_runs.__wrapped__(hybrid_pattern(4096, 0.08, 0.5))
  assert time.process_time() - start < 10  # the cube of the depth took 7 s at a quarter of it


@pytest.mark.parametrize('mode', ['runs', 'unrolled'])
def test_to_layers_inverts_from_layers(mode):
  params = model.init_layers(tiny.MODEL, seed=3)['layers']
  stacking = lib.make_stacking(tiny.MODEL.layers, mode)
  back = lib.to_layers(lib.from_layers(params, stacking), stacking)
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_initial_values_do_not_depend_on_stacking():
  stacking = lib.make_stacking(tiny.MODEL.layers, 'runs')
  stacked = model.init_runs(tiny.MODEL, stacking, seed=5)
  canonical = model.init_layers(tiny.MODEL, seed=5)
  jax.tree.map(np.testing.assert_array_equal, lib.to_layers(stacked['layers'], stacking), canonical['layers'])
  same_kind = canonical['layers'][0]['x_kernel'], canonical['layers'][2]['x_kernel']
  assert not np.array_equal(*same_kind)
  other = model.init_layers(tiny.MODEL, seed=6)
  assert not np.array_equal(other['embed']['tokens'], canonical['embed']['tokens'])


SHORT = tiny.change(tiny.MODEL, pattern='M-M-')


def _loss(mode, remat):
  stacking = lib.make_stacking(SHORT.layers, mode)
  rows = tiny.Rows().batch(0, range(2))

  def loss(layers, outer):
    params = {**outer, 'layers': lib.from_layers(layers, stacking)}
    ctx = Context(rows['positions'], rows['segment_ids'])
    hidden, _ = model.forward(SHORT, params, rows['tokens'], ctx, stacking=stacking, remat=remat)
    return jnp.square(model.logits(SHORT, params, hidden)).sum()

  params = jax.jit(lambda: model.init_layers(SHORT, seed=1, dtype=jnp.float64))()
  outer = {name: value for name, value in params.items() if name != 'layers'}
  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params['layers'], outer)


def test_runs_unrolled_and_every_remat_are_equal():
  with jax.enable_x64(True):
    reference = _loss('unrolled', 'none')
    for mode, remat in [('runs', 'none'), ('runs', 'selective'), ('runs', 'full'), ('unrolled', 'full')]:
      error, leaf = tiny.worst(_loss(mode, remat), reference)
      assert error < 1e-10, (mode, remat, leaf)
