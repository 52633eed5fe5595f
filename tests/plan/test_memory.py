"""Bytes per device: ZeRO's table, real shards, and the activation formulas of the papers."""

import dataclasses
import math

import jax
import pytest
from jax.sharding import NamedSharding

from lmscale.config import Config, ConfigError, check_mesh, from_dict, resolve_mesh
from lmscale.models.stacking import make_stacking
from lmscale.parallel.layout import LeafLayout, make_layout
from lmscale.parallel.mesh import make_mesh
from lmscale.parallel.pipeline.layout import stage_layers, step_table
from lmscale.parallel.rules import make_rules
from lmscale.plan.memory import activations_held, bytes_per_device, zero_bytes
from lmscale.plan.parameters import parameter_count
from lmscale.train.program import Program

H, SEQ = 512, 256


def build(mesh: dict, train: dict | None = None, model: dict | None = None) -> Config:
  model = {'pattern': 'Mm*-', 'vocab': 264, 'attention': {'heads': 8, 'kv_heads': 4}} | (model or {})
  return from_dict({'mesh': mesh, 'train': {'batch': 64} | (train or {}), 'model': model})


def gpt(mesh: dict, remat: str = 'none', dtype: str = 'bfloat16') -> Config:
  attention = {'heads': 8, 'kv_heads': 8, 'head_dim': H // 8}
  model = {'pattern': '*-' * 4, 'd_model': H, 'attention': attention, 'mlp': {'d_ff': 4 * H}}
  return build({'data': 1} | mesh, {'compute_dtype': dtype, 'remat': remat}, model)


def test_zero_table():
  """arXiv 1910.02054, figure 1: 7.5B parameters on 64 ranks."""
  gigabytes = [zero_bytes(7.5e9, 64, stage) / 1e9 for stage in range(4)]
  assert gigabytes == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)


@pytest.mark.parametrize('zero', [0, 1, 2, 3])
@pytest.mark.parametrize('tensor', [1, 2, 8])
def test_stored_bytes_are_those_of_the_real_shards(zero, tensor):
  """Master and moments, from the shardings that the program places its arrays with."""
  config = resolve_mesh(build({'tensor': tensor, 'zero': zero}), 8)
  mesh = make_mesh(config.mesh)
  layout = make_layout(config, make_stacking(config.model.layers, 'unrolled'), make_rules(config))
  leaves = jax.tree.leaves(layout, is_leaf=lambda leaf: isinstance(leaf, LeafLayout))
  shards = [NamedSharding(mesh, leaf.stored).shard_shape(((1,) if leaf.stack else ()) + leaf.spec.shape) for leaf in leaves]
  stored = 4 * sum(math.prod(shape) for shape in shards)
  plan = bytes_per_device(config)
  assert plan['optimizer'] == 2 * stored
  whole = sum(
    4 * math.prod(NamedSharding(mesh, leaf.tensor).shard_shape(leaf.spec.shape))
    for leaf in leaves
    if leaf.data_dim is not None
  )
  assert plan['parameters'] == stored + (whole if zero in (1, 2) else 0)


def test_groups_follow_the_zero_table():
  plans = [bytes_per_device(resolve_mesh(build({'zero': zero}), 8)) for zero in range(4)]
  total = parameter_count(build({}).model)
  assert plans[0]['parameters'] == plans[0]['gradients'] == 4 * total
  assert plans[0]['optimizer'] == 8 * total
  assert plans[1]['gradients'] == 4 * total
  assert plans[1]['optimizer'] == pytest.approx(total, rel=0.06)  # what only `tensor` can cut stays whole
  assert plans[2]['gradients'] == pytest.approx(total / 2, rel=0.06)
  assert plans[3]['parameters'] == pytest.approx(total / 2, rel=0.06)
  assert plans[3]['gradients'] == plans[2]['gradients']
  for plan in plans:
    assert plan['total'] == sum(n for group, n in plan.items() if group != 'total')


def test_dtypes():
  single = {'data': 1, 'zero': 0}
  total = parameter_count(build({}).model)
  bf16 = bytes_per_device(build(single, {'compute_dtype': 'bfloat16'}))
  assert 5.9 * total < bf16['parameters'] < 6 * total  # 4 + 2, but norms and decays have no copy
  assert bytes_per_device(build(single, {'grad_dtype': 'bfloat16'}))['gradients'] == 2 * total
  double = bytes_per_device(build(single, {'compute_dtype': 'float64'}))
  assert (double['parameters'], double['gradients'], double['optimizer']) == (8 * total, 8 * total, 16 * total)


def test_rematerialisation_orders_activations():
  full, selective, none = (bytes_per_device(gpt({}, remat))['activations'] for remat in ('full', 'selective', 'none'))
  assert full < selective < none
  deeper = build({'data': 1}, {'compute_dtype': 'bfloat16', 'remat': 'full'}, {'pattern': 'M' * 9})
  shallow = build({'data': 1}, {'compute_dtype': 'bfloat16', 'remat': 'full'}, {'pattern': 'M' * 8})
  extra = bytes_per_device(deeper)['activations'] - bytes_per_device(shallow)['activations']
  assert extra == 2 * 128 * SEQ  # one layer's input: arXiv 2205.05198, 2 s b h


def test_sequence_parallel_cuts_the_stream():
  cut, whole = (gpt({'tensor': 4, 'sequence_parallel': s}, 'full') for s in (True, False))
  assert bytes_per_device(cut)['activations'] < bytes_per_device(whole)['activations']


def test_pipeline_stages():
  config = gpt({'pipe': 4})
  assert stage_layers(config) == [range(2), range(2, 4), range(4, 6), range(6, 8)]
  cut = build({'pipe': 2, 'data': 1}, model={'pattern': 'M-*|-'})
  assert stage_layers(cut) == [range(3), range(3, 4)]
  one, four = bytes_per_device(gpt({'pipe': 1})), bytes_per_device(config)
  assert four['optimizer'] < one['optimizer'] / 2
  with pytest.raises(ConfigError, match='mesh.pipe: 9 stages for the 8 layers'):
    check_mesh(gpt({'pipe': 9}))


def test_stages_are_equal_in_flops_not_in_layers():
  """The head, here as dear as two layers, is in the last stage; recomputation makes layers dearer; wrong `|` are not used."""
  model = {'d_model': 64, 'mlp': {'d_ff': 256}, 'vocab': 2 * 8 * 64}
  uncut, cut = model | {'pattern': '-' * 12}, model | {'pattern': '------|---|---'}
  for pattern in (uncut, cut):
    assert stage_layers(build({'pipe': 2, 'data': 1}, {'remat': 'none'}, pattern)) == [range(7), range(7, 12)]
  assert stage_layers(build({'pipe': 3, 'data': 1}, model=cut)) == [range(6), range(6, 9), range(9, 12)]
  uncut['vocab'] = 4 * 8 * 64  # four layers; or three that are done again
  first = [stage_layers(build({'pipe': 2, 'data': 1}, {'remat': remat}, uncut))[0] for remat in ('none', 'full')]
  assert first == [range(8), range(7)]


@pytest.mark.parametrize('schedule,residuals,inputs,gradients', [('1f1b', 7, 5, 1), ('1f1b_strict', 4, 4, 1), ('gpipe', 64, 64, 1)])
def test_a_device_holds_what_its_schedule_has_in_flight(schedule, residuals, inputs, gradients):
  """Buffers for what the layers save, outputs, inputs and gradients of stages; each has a row more."""
  config, stream = gpt({'pipe': 4, 'schedule': schedule}), 2 * H * SEQ
  block = activations_held(gpt({'pipe': 1})) // 4
  assert step_table(config).slots == {'activation': inputs, 'cotangent': gradients, 'residual': residuals}
  assert activations_held(config) == (residuals + 1) * (block + stream) + (inputs + gradients + 2) * stream


def test_full_recomputation_keeps_the_inputs_of_stages():
  """What two blocks save is there once, while one microbatch goes backward; and for each that is stored."""
  stream, saved = 2 * H * SEQ, activations_held(gpt({'pipe': 1}, 'selective')) // 4
  fixed = activations_held(gpt({'pipe': 2}, 'full')) - 2 * (2 * saved + stream)
  assert fixed == (step_table(gpt({'pipe': 2})).slots['activation'] + 1 + 2) * stream
  stored = gpt({'pipe': 2}, 'full')
  stored = dataclasses.replace(stored, train=dataclasses.replace(stored.train, stored_microbatches=2))
  assert activations_held(stored) == fixed + 4 * (2 * saved + stream)
  assert activations_held(gpt({'pipe': 1}, 'full')) == 4 * stream  # attention and MLP are one block


def test_virtual_stages_are_held_where_they_lie():
  config = gpt({'pipe': 2, 'schedule': 'interleaved', 'virtual': 2})
  assert stage_layers(config) == [range(2), range(2, 4), range(4, 6), range(6, 8)]
  assert bytes_per_device(config)['optimizer'] == bytes_per_device(gpt({'pipe': 2}))['optimizer']


@pytest.mark.parametrize('vocab_on_pipe', [False, True])
def test_the_compiler_agrees_on_a_pipeline(vocab_on_pipe):
  """The state exactly, rows without a layer and all; and what two more stored microbatches add."""
  mesh = {'pipe': 2, 'tensor': 2, 'zero': 3, 'vocab_on_pipe': vocab_on_pipe}
  temps, plans = [], []
  for stored in (0, 2):
    train = {'batch': 16, 'microbatch': 2, 'stored_microbatches': stored}
    config = resolve_mesh(build(mesh, train, {'pattern': '-----'}), 8)
    analysis = Program(config).lower_step().compile().memory_analysis()
    temps.append(analysis.temp_size_in_bytes)
    plans.append(bytes_per_device(config))
  assert analysis.alias_size_in_bytes == pytest.approx(plans[0]['optimizer'] * 3 / 2, rel=1e-3)
  added = plans[1]['total'] - plans[0]['total']
  assert added > 0
  assert (temps[1] - temps[0]) / added == pytest.approx(1, rel=0.3)
  assert 0.5 < temps[1] / (plans[1]['total'] - plans[1]['optimizer'] * 3 // 2) < 2


@pytest.mark.parametrize('remat,most', [('none', 1.7), pytest.param('full', 2.4, marks=pytest.mark.slow)])
def test_the_compiler_agrees(remat, most):
  """XLA's own figures for the compiled step: the state exactly, the rest roughly (more where layers are recomputed)."""
  config = build({'tensor': 2, 'zero': 1}, {'batch': 16, 'microbatch': 2, 'remat': remat}, {'pattern': 'M-*'})
  config = resolve_mesh(config, 8)
  analysis = Program(config).lower_step().compile().memory_analysis()
  plan = bytes_per_device(config)
  state = sum(plan[group] for group in ('parameters', 'optimizer'))
  held = plan['total'] - plan['optimizer'] * 3 // 2
  batch = 4 * 16 // 4 * SEQ * 4
  assert analysis.alias_size_in_bytes == pytest.approx(plan['optimizer'] * 3 / 2, rel=1e-3)
  assert analysis.argument_size_in_bytes == pytest.approx(plan['optimizer'] * 3 / 2 + batch, rel=1e-2)
  assert state < plan['total']
  assert 0.5 < analysis.temp_size_in_bytes / held < most
