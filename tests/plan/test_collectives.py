"""What the compiled step says to whom: counted in its text."""

import collections
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmscale.config import MeshConfig
from lmscale.models import model, stack
from lmscale.models.context import Context
from lmscale.parallel.mesh import make_mesh
from lmscale.parallel.rules import make_constrain, make_local, make_rules, partition
from lmscale.plan.collectives import read_collectives
from lmscale.train.program import Program


def _mesh(data, tensor):
  return Mesh(np.array(jax.devices()[: data * tensor]).reshape(1, data, tensor), ('pipe', 'data', 'tensor'))


@pytest.mark.parametrize(
  'line,axes,elements',
  [
    ('%a = f32[2,3]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}', ('tensor',), 6),
    ('%a = (f32[2]{0}, f32[]) all-reduce-start(%x, %y), replica_groups=[2,4]<=[4,2]T(1,0)', ('data',), 3),
    ('%a = f32[8]{0} all-gather(%x), replica_groups=[1,8]<=[8], dimensions={0}', ('data', 'tensor'), 8),
    ("%a = f32[8]{0} all-gather(%x), replica_groups=mesh['a'=4,'b'=2] {'b'}, x", ('tensor',), 8),
    ("%a = f32[8] all-gather(%x), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ('data',), 8),
    ("%a = f32[8] all-gather(%x), replica_groups=mesh['a'=8] {'a':(1)2}", ('data',), 8),
    ('%a = f32[8] collective-permute(%x), source_target_pairs={{0,1},{1,0}}', ('tensor',), 8),
  ],
)
def test_device_groups_are_read(line, axes, elements):
  found = read_collectives(f'ENTRY %main (x: f32[]) -> f32[] {{\n  {line}\n}}', _mesh(4, 2))
  assert [(c.axes, c.elements, c.in_loop) for c in found] == [(axes, elements, False)]


def test_loops_are_followed_into_called_computations():
  text = """%inner (x: f32[]) -> f32[] {
  %r = f32[4] all-reduce(%x), replica_groups={{0,1}}
}
%body (x: f32[]) -> f32[] {
  %c = f32[] call(%x), to_apply=%inner
}
ENTRY %main (x: f32[]) -> f32[] {
  %w = f32[] while(%x), condition=%cond, body=%body
  %r = f32[4] all-reduce(%x), replica_groups={{0,1}}
}"""
  found = read_collectives(text, _mesh(1, 2), unknown=5)
  assert [(c.in_loop, c.times) for c in found] == [(True, 5), (False, 1)]


def test_how_often_and_how_much():
  """Nested loops, one with its count beside it and one with a constant in its condition; results behind their operands."""
  text = """%row (x: f32[]) -> f32[] {
  %g = (bf16[2,3]{1,0:T(8,128)(2,1)}, bf16[4,3]{1,0}) all-gather-start(%x), replica_groups={{0,1}}, dimensions={0}
  %s = ((f32[4]{0}, f32[8]{0}), (f32[2]{0}, /*index=1*/f32[4]{0})) reduce-scatter-start(%x, %y), replica_groups={{0,1}}
}
%condition.1 (x: s32[]) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(3)
}
%body (x: f32[]) -> f32[] {
  %w = f32[] while(%x), condition=%other, body=%row, backend_config={"known_trip_count":{"n":"4"}}
  %p = (s8[6], s8[6], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
}
ENTRY %main (x: f32[]) -> f32[] {
  %w = f32[] while(%x), condition=%condition.1, body=%body
  %r = (f32[4], pred[]) all-reduce-start(%x, %y), replica_groups={{0,1}}
}"""
  found = read_collectives(text, _mesh(1, 2))
  assert [(c.kind, c.elements, c.bytes, c.times, c.received) for c in found] == [
    ('all-gather', 12, 24, 12, 12 * 12.0),
    ('reduce-scatter', 6, 24, 12, 12 * 24),
    ('collective-permute', 6, 6, 3, 18),
    ('all-reduce', 5, 17, 1, 17.0),
  ]
  assert [(c.axes, c.ranks) for c in found[:2]] == [(('tensor',), 2)] * 2


SHORT = tiny.change(tiny.MODEL, pattern='M-*')


def _step_collectives(mesh, model_config=SHORT):
  program = Program(tiny.config(mesh, model_config))
  text = program.lower_step().compile().as_text()
  return read_collectives(text, program.mesh), program


@pytest.mark.parametrize(
  'data,tensor,zero,sequence_parallel',
  [(8, 1, 0, False), (4, 2, 1, True)]
  + [pytest.param(*layout, marks=pytest.mark.scale) for layout in [(4, 2, 2, False), (4, 2, 0, False), (4, 2, 1, False), (4, 2, 2, True)]],
)
def test_one_data_reduction_per_step_and_none_in_loops(data, tensor, zero, sequence_parallel):
  found, program = _step_collectives(MeshConfig(1, data, tensor, zero, sequence_parallel))
  over_data = [c for c in found if 'data' in c.axes]
  assert not [c for c in over_data if c.in_loop]
  assert not [c for c in found if c.kind in ('all-to-all', 'collective-permute')]
  # Each gradient element is reduced once: what a device receives is its share of them, plus a few scalars.
  reduced = sum(c.elements for c in over_data if c.kind in ('all-reduce', 'reduce-scatter'))
  local, whole, uncut = _elements(program)
  expected = local if zero == 2 else whole
  scalars = 2 * len(jax.tree.leaves(program.abstract_state().params)) + 4
  assert expected <= reduced <= expected + scalars
  assert sum(c.elements for c in over_data if c.kind == 'all-gather') == (whole - uncut if zero else 0)


def _elements(program):
  """Parameters on one device as stored, after a gather over data, and those that ZeRO leaves uncut."""
  local = whole = uncut = 0
  for leaf in jax.tree.leaves(program.abstract_state().params):
    size = math.prod(leaf.sharding.shard_shape(leaf.shape))
    cut = program.mesh.shape['data'] if 'data' in leaf.sharding.spec else 1
    local, whole, uncut = local + size, whole + size * cut, uncut + (size if cut == 1 else 0)
  return local, whole, uncut


def test_zero_3_gathers_and_scatters_where_parameters_are_used():
  found, program = _step_collectives(MeshConfig(1, 4, 2, 3), tiny.change(tiny.MODEL, pattern='M-M-'))
  over_data = [c for c in found if 'data' in c.axes]
  inside = collections.Counter(c.kind for c in over_data if c.in_loop)
  assert set(inside) == {'all-gather', 'reduce-scatter'}
  outside = [c for c in over_data if not c.in_loop]
  assert {c.kind for c in outside} == {'all-reduce'}
  scalars = 2 * len(jax.tree.leaves(program.abstract_state().params)) + 4
  assert sum(c.elements for c in outside) <= _elements(program)[2] + scalars
  # The largest thing ever gathered is one layer's matrix, not a stack of them and not the model.
  layer = max(spec.size for kind in 'M-' for spec in stack.layer_specs(program.config.model, kind).values())
  outer = program.config.model.vocab * program.config.model.d_model
  assert max(c.elements for c in over_data if c.kind == 'all-gather') <= max(layer, outer)
  assert not [c for c in found if c.kind in ('all-to-all', 'collective-permute')]


# Reductions of one mixer's forward pass over tensor, as elements per token (of 2 x 16 tokens).
OUTPUT = 16
PER_MIXER = {
  ('M', 2): [OUTPUT],
  ('M', 4): [OUTPUT, 2],  # two norm groups on four devices: their sums of squares
  ('m', 2): [OUTPUT, 3 + 2 * 4],  # dt_rank + 2 N
  ('*', 2): [OUTPUT],
  ('*', 4): [OUTPUT],
  ('-', 2): [OUTPUT],
}


@pytest.mark.parametrize('kind,tensor', PER_MIXER, ids=lambda value: str(value))
@pytest.mark.parametrize('sequence_parallel', [False, True], ids=['whole', 'sequence-parallel'])
def test_one_reduction_per_mixer(kind, tensor, sequence_parallel):
  config = tiny.config(MeshConfig(1, 1, tensor, 0, sequence_parallel), tiny.change(tiny.MODEL, pattern=kind))
  mesh = make_mesh(config.mesh, jax.devices()[:tensor])
  rules = make_rules(config)
  specs = stack.layer_specs(config.model, kind)
  params = {
    name: jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=NamedSharding(mesh, partition(spec.axes, rules)))
    for name, spec in specs.items()
  }
  residual = NamedSharding(mesh, partition(('batch', 'seq', 'embed'), rules, drop=('data',)))
  x = jax.ShapeDtypeStruct((2, 16, 16), jnp.float32, sharding=residual)
  whole = NamedSharding(mesh, P())
  ids = jax.ShapeDtypeStruct((2, 16), jnp.int32, sharding=whole)

  def layer(params, x, positions, segment_ids):
    ctx = Context(positions, segment_ids, constrain=make_constrain(config, rules), local=make_local(config, rules), tensor=tensor)
    return stack.apply_layer(config.model, kind, params, x, ctx, None)[0]

  mapped = jax.shard_map(layer, mesh=mesh, in_specs=P(), out_specs=P(), axis_names={'pipe', 'data'}, check_vma=False)
  with jax.set_mesh(mesh):
    text = jax.jit(mapped, out_shardings=residual).lower(params, x, ids, ids).compile().as_text()
  found = read_collectives(text, mesh)
  reduced = sorted(c.elements / 32 for c in found if c.kind in ('all-reduce', 'reduce-scatter'))
  expected = sorted(PER_MIXER[kind, tensor])
  others = collections.Counter(c.kind for c in found if c.kind not in ('all-reduce', 'reduce-scatter'))
  assert reduced == expected or (sequence_parallel and reduced == sorted([*expected[:-1], OUTPUT / tensor]))
  assert others == ({'all-gather': 1} if sequence_parallel else {})


def test_the_embedding_stays_cut():
  """Looking tokens up in a vocabulary that is cut over tensor needs one reduction, and no table is gathered."""
  config = tiny.config(MeshConfig(1, 1, 2, 0))
  mesh = make_mesh(config.mesh, jax.devices()[:2])
  table = jax.ShapeDtypeStruct((40, 16), jnp.float32, sharding=NamedSharding(mesh, P('tensor', None)))
  tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32, sharding=NamedSharding(mesh, P()))

  def embed(tokens_table, tokens):
    ctx = Context(tokens, constrain=make_constrain(config, make_rules(config)), tensor=2)
    return model.embed(tiny.change(tiny.MODEL, positions='none'), {'tokens': tokens_table}, tokens, ctx)

  mapped = jax.shard_map(embed, mesh=mesh, in_specs=P(), out_specs=P(), axis_names={'pipe', 'data'}, check_vma=False)
  with jax.set_mesh(mesh):
    found = read_collectives(jax.jit(mapped).lower(table, tokens).compile().as_text(), mesh)
  assert [(c.kind, c.elements) for c in found] == [('all-reduce', 2 * 16 * 16)]


@pytest.mark.parametrize('remat', ['none', pytest.param('selective', marks=pytest.mark.scale)])
def test_zero_3_keeps_no_gathered_layer(remat):
  """Not without recomputation either: the loop over layers carries no stack of whole matrices."""
  model = tiny.change(tiny.MODEL, pattern='---', positions='none', mlp=tiny.change(tiny.MODEL.mlp, d_ff=28))
  text = Program(tiny.config(MeshConfig(1, 4, 2, 3), model, remat=remat)).lower_step().compile().as_text()
  assert 'f32[16,14]' in text
  assert not re.findall(r'f32\[3,(?:16,14|14,16)\]', text)
