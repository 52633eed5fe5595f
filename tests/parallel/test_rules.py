"""The table of sharding rules, and where parameters land."""

import pytest
import tiny
from jax.sharding import PartitionSpec as P

from lmscale.config import MeshConfig
from lmscale.models.stack import layer_specs
from lmscale.models.stacking import Stack, make_stacking
from lmscale.parallel.layout import leaf_layout, make_layout
from lmscale.parallel.rules import make_rules, partition


def test_unknown_axis_and_collision_are_errors():
  rules = make_rules(tiny.config(MeshConfig(1, 4, 2, 1)))
  with pytest.raises(ValueError, match="no sharding rule for logical axis 'head'"):
    partition(('embed', 'head'), rules)
  with pytest.raises(ValueError, match='twice'):
    partition(('heads', 'ff'), rules)
  assert partition(('batch', 'length', 'heads'), rules, drop=('data',)) == P(None, None, 'tensor')


def test_groups_are_cut_only_where_tensor_divides_them():
  assert make_rules(tiny.config(MeshConfig(1, 1, 2, 0)))['groups'] == 'tensor'
  assert make_rules(tiny.config(MeshConfig(1, 1, 4, 0)))['groups'] is None
  assert make_rules(tiny.config(MeshConfig(1, 1, 4, 0)))['kv_heads'] is None


@pytest.mark.parametrize('zero', [0, 1, 2, 3])
def test_zero_cuts_a_dim_that_tensor_does_not_use(zero):
  config = tiny.config(MeshConfig(1, 4, 2, zero))
  specs = layer_specs(config.model, '-')
  leaf = leaf_layout('up_kernel', specs['up_kernel'], config, make_rules(config), Stack('-', (1, 3)))
  assert leaf.stored == (P(None, 'data', 'tensor') if zero else P(None, None, 'tensor'))
  assert leaf.manual == (P(None, 'data', None) if zero else P(None, None, None))
  assert leaf.kept == P(None, None, 'tensor')


def test_every_parameter_has_a_place_in_every_stacking():
  config = tiny.config(MeshConfig(1, 4, 2, 3))
  for mode in ('runs', 'unrolled'):
    stacking = make_stacking(config.model.layers, mode)
    layout = make_layout(config, stacking, make_rules(config))
    for run, stacks in zip(layout['layers'], stacking, strict=True):
      for leaves, stack in zip(run, stacks, strict=True):
        assert {name: (leaf.spec, leaf.stack) for name, leaf in leaves.items()} == {
          name: (spec, stack) for name, spec in layer_specs(config.model, stack.kind).items()
        }
    assert all(leaf.stack is None for part, leaves in layout.items() if part != 'layers' for leaf in leaves.values())
