"""Runs, their inverse, and equal results in every way of executing a stack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.models import model, stack
from lmscale.models.context import Context

HYBRID = 'M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-'


@given(st.text('Mm*-', min_size=1, max_size=24))
@settings(max_examples=60, deadline=None)
def test_runs_spell_the_pattern(layers):
  plan = stack.find_runs(layers)
  assert ''.join(unit * repeats for unit, repeats in plan) == layers
  assert sum(len(unit) for unit, _ in plan) <= len(layers)
  indices = sorted(i for units in stack.run_indices(plan) for positions in units for i in positions)
  assert indices == list(range(len(layers)))


def test_runs_of_the_published_patterns():
  assert stack.find_runs('*-' * 32) == (('*-', 32),)
  assert stack.find_runs('M' * 56) == (('M', 56),)
  assert sum(len(unit) for unit, _ in stack.find_runs(HYBRID)) == 22


@pytest.mark.parametrize('mode', ['runs', 'unrolled'])
def test_to_layers_inverts_from_layers(mode):
  params = model.init_layers(tiny.MODEL, seed=3)['layers']
  plan = stack.make_plan(tiny.MODEL.layers, mode)
  back = stack.to_layers(stack.from_layers(params, plan), plan)
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_initial_values_do_not_depend_on_stacking():
  plan = stack.make_plan(tiny.MODEL.layers, 'runs')
  stacked = model.init_runs(tiny.MODEL, plan, seed=5)
  canonical = model.init_layers(tiny.MODEL, seed=5)
  jax.tree.map(np.testing.assert_array_equal, stack.to_layers(stacked['layers'], plan), canonical['layers'])
  same_kind = canonical['layers'][0]['x_kernel'], canonical['layers'][2]['x_kernel']
  assert not np.array_equal(*same_kind)
  other = model.init_layers(tiny.MODEL, seed=6)
  assert not np.array_equal(other['embed']['tokens'], canonical['embed']['tokens'])


def _loss(mode, remat):
  plan = stack.make_plan(tiny.MODEL.layers, mode)
  rows = tiny.Rows().batch(0, range(2))

  def loss(layers, outer):
    params = {**outer, 'layers': stack.from_layers(layers, plan)}
    ctx = Context(rows['positions'], rows['segment_ids'])
    hidden, _ = model.forward(tiny.MODEL, params, rows['tokens'], ctx, plan=plan, remat=remat)
    return jnp.square(model.logits(tiny.MODEL, params, hidden)).sum()

  params = model.init_layers(tiny.MODEL, seed=1, dtype=jnp.float64)
  outer = {name: value for name, value in params.items() if name != 'layers'}
  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params['layers'], outer)


def test_runs_unrolled_and_every_remat_are_equal():
  with jax.enable_x64(True):
    reference = _loss('unrolled', 'none')
    for mode, remat in [('runs', 'none'), ('runs', 'selective'), ('runs', 'full'), ('unrolled', 'full')]:
      error, leaf = tiny.worst(_loss(mode, remat), reference)
      assert error < 1e-10, (mode, remat, leaf)
