"""The table of sharding rules, and where parameters land."""

import pytest
import tiny
from jax.sharding import PartitionSpec as P

from lmscale.config import MeshConfig
from lmscale.models import stack
from lmscale.parallel.layout import LeafLayout, leaf_layout, make_layout, map_layout
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
  specs = stack.layer_specs(config.model, '-')
  leaf = leaf_layout('up_kernel', specs['up_kernel'], config, make_rules(config), stacked=True)
  assert leaf.stored == (P(None, 'data', 'tensor') if zero else P(None, None, 'tensor'))
  assert leaf.manual == (P(None, 'data', None) if zero else P(None, None, None))
  assert leaf.kept == P(None, None, 'tensor')


def test_every_parameter_has_a_place_in_both_forms():
  config = tiny.config(MeshConfig(1, 4, 2, 3))
  plan = stack.make_plan(config.model.layers, 'runs')
  stacked = make_layout(config, plan, make_rules(config))
  canonical = make_layout(config, None, make_rules(config))
  rows = stack.to_layers(map_layout(lambda leaf: _Rows(leaf), stacked)['layers'], plan)
  for index, layer in enumerate(rows):
    assert {name: row.leaf.spec.axes for name, row in layer.items()} == {
      name: leaf.spec.axes for name, leaf in canonical['layers'][str(index)].items()
    }


class _Rows:
  def __init__(self, leaf: LeafLayout):
    self.leaf = leaf

  def __getitem__(self, row: int) -> '_Rows':
    return self
