"""The typed view of a config: conversion, types, values, and the mesh."""

import dataclasses
import json
import math

import ml_collections
import pytest

from lmscale import config as config_lib
from lmscale.config import Config, ConfigError, run_tokens
from lmscale.train.schedule import Schedule


def nested(path: str, value: object) -> dict:
  for name in reversed(path.split('.')):
    value = {name: value}
  return value


def rejected(values: object) -> str:
  with pytest.raises(ConfigError) as caught:
    config_lib.from_dict(values)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def build(**sections: object) -> Config:
  return config_lib.from_dict(sections)


def test_to_dict_and_from_dict_are_inverse():
  source = {'name': 'a', 'kind': 'text', 'path': 'x.txt', 'weight': 2}
  config = build(seed=3, model={'pattern': '*-', 'mlp': {'d_ff': 64}}, data={'sources': [source, {'weight': 0.5}]})
  assert config_lib.from_dict(json.loads(json.dumps(config_lib.to_dict(config)))) == config
  assert config_lib.from_dict(config_lib.to_config_dict(config)) == config
  assert config.data.sources[0].weight == 2.0
  assert config.data.sources[1].name == 'code'


def test_config_dict_is_locked_and_typed():
  values = config_lib.to_config_dict(Config())
  assert isinstance(values, ml_collections.ConfigDict)
  with pytest.raises(AttributeError):
    values.train.stepz = 3
  with pytest.raises(TypeError):
    values.train.steps = 64.0


def scaled(kind: str, positions: str = 'rope', base: float = 1e4, **fields: object) -> dict:
  published = {'llama3': {'factor': 8.0, 'length': 8192, 'turns': [1.0, 4.0]}, 'yarn': {'factor': 4.0, 'length': 4096, 'turns': [1.0, 32.0]}}
  return {'model': {'positions': positions, 'rope_base': base, 'rope_scaling': {'kind': kind, **published.get(kind, {}), **fields}}}


def test_names_of_older_versions_are_read():
  old = {'rope_scaling_factor': 8.0, 'rope_scaling_low': 1.0, 'rope_scaling_high': 4.0, 'rope_scaling_length': 8192}
  today = build(**scaled('llama3'))
  assert build(model={'positions': 'rope', **old}) == today
  assert build(model={'positions': 'rope', **dict.fromkeys(old, 0)}) == build(model={'positions': 'rope'})
  assert build(model={'positions': 'rope', **old, 'rope_scaling': {'factor': 2}}).model.rope_scaling.factor == 2  # changed on the command line
  assert rejected({'model': {'positions': 'rope', 'rope_scaling_factor': 8.0}}).startswith('model.rope_scaling.length: not set')


def test_a_config_is_small():
  def count(section: type) -> int:
    return sum(count(t) if dataclasses.is_dataclass(t) else 1 for t in config_lib.field_types(section).values())

  assert count(Config) < 105


@pytest.mark.parametrize(
  ('path', 'value', 'expected'),
  [
    ('train.steps', 64.0, 'an integer'),
    ('train.steps', True, 'an integer'),
    ('train.steps', '64', 'an integer'),
    ('train.steps', None, 'an integer'),
    ('optimizer.learning_rate', '1e-3', 'a number'),
    ('optimizer.learning_rate', True, 'a number'),
    ('mesh.sequence_parallel', 1, 'true or false'),
    ('model.norm', 3, 'a string'),
    ('train', 3, 'a group of fields'),
    ('data.sources', 'code', 'a list'),
    ('data.sources', [3], 'a group of fields'),
  ],
)
def test_wrong_types_name_field_type_and_value(path, value, expected):
  message = rejected(nested(path, value))
  assert message.startswith(path)
  assert f'expected {expected}' in message


@pytest.mark.parametrize(
  ('path', 'nearest'),
  [
    ('train.stpes', 'train.steps'),
    ('steps', 'train.steps'),
    ('train.learning_rat', 'optimizer.learning_rate'),
    ('model.mamba2.grops', 'model.mamba2.groups'),
    ('trian', 'train'),
  ],
)
def test_unknown_fields_name_the_nearest(path, nearest):
  message = rejected(nested(path, 1))
  assert message.startswith(f'{path}: no such field')
  assert nearest in message


@pytest.mark.parametrize(
  ('sections', 'field', 'detail'),
  [
    ({'train': {'steps': 0}}, 'train.steps', '0 is less than 1'),
    ({'train': {'steps': -5}}, 'train.steps', '-5'),
    ({'train': {'batch': 0}}, 'train.batch', '0'),
    ({'train': {'seq_len': -1}}, 'train.seq_len', '-1'),
    ({'model': {'vocab': 0}}, 'model.vocab', '0'),
    ({'seed': -1}, 'seed', '-1'),
    ({'seed': 2**32}, 'seed', 'more than 4294967295'),
    ({'emulate': -8}, 'emulate', '-8'),
    ({'name': 'a/b'}, 'name', "'a/b'"),
    ({'name': 'a\nb'}, 'name', 'cannot name a run'),
    ({'loop': {'log_every': 0}}, 'loop.log_every', '0'),
    ({'optimizer': {'learning_rate': 0}}, 'optimizer.learning_rate', '(0, 100]'),
    ({'optimizer': {'learning_rate': math.nan}}, 'optimizer.learning_rate', 'nan'),
    ({'optimizer': {'learning_rate': math.inf}}, 'optimizer.learning_rate', 'inf'),
    ({'optimizer': {'beta2': 1.0}}, 'optimizer.beta2', '[0, 1)'),
    ({'optimizer': {'clip': -1}}, 'optimizer.clip', '-1'),
    ({'model': {'mamba2': {'dt_min': -0.1}}}, 'model.mamba2.dt_min', '-0.1 is not in [0, 1e6]'),
    ({'model': {'mamba2': {'dt_min': 0.2, 'dt_max': 0.1}}}, 'model.mamba2.dt_max', '0.1 is not above model.mamba2.dt_min 0.2'),
    ({'train': {'grad_dtype': 'float64'}}, 'train.grad_dtype', 'set train.compute_dtype=float64'),
    ({'train': {'grad_dtype': 'bfloat16', 'compute_dtype': 'float64'}}, 'train.grad_dtype', 'sums its gradients in float64'),
    ({'optimizer': {'min_learning_rate': 1.0}}, 'optimizer.min_learning_rate', 'exceeds'),
    ({'optimizer': {'schedule': 'linear'}}, 'optimizer.schedule', 'cosine'),
    ({'optimizer': {'warmup_tokens': 204801}}, 'optimizer.warmup_tokens', 'steps 100, batch 8, seq_len 256'),
    ({'optimizer': {'warmup_tokens': 2000, 'decay_tokens': 1000}}, 'optimizer.decay_tokens', '2000'),
    ({'optimizer': {'schedule': 'wsd'}}, 'optimizer.wsd_decay_tokens', '0'),
    (
      {'optimizer': {'schedule': 'wsd', 'wsd_decay_tokens': 200000, 'warmup_tokens': 10000}},
      'optimizer.wsd_decay_tokens',
      '210000 tokens exceed the end of the run at 204800',
    ),
    ({'model': {'pattern': 'M-x'}}, 'model.pattern', "'x' at position 2"),
    ({'model': {'pattern': ''}}, 'model.pattern', 'no layers'),
    ({'model': {'pattern': 'M||-'}}, 'model.pattern', 'without layers'),
    ({'model': {'norm': 'batchnorm'}}, 'model.norm', 'rmsnorm'),
    ({'model': {'norm_eps': 0.0}}, 'model.norm_eps', '(0, 1]'),
    ({'model': {'attention': {'heads': 6, 'kv_heads': 4}}}, 'model.attention.kv_heads', '6 = 1 * 4 + 2'),
    ({'model': {'mamba2': {'heads': 8, 'groups': 3}}}, 'model.mamba2.groups', '8 = 2 * 3 + 2'),
    ({'model': {'mlp': {'activation': 'silu'}}}, 'model.mlp.activation', 'swiglu'),
    ({'model': {'positions': 'learned', 'max_positions': 255}}, 'model.max_positions', '255'),
    ({'model': {'max_positions': 256}}, 'model.max_positions', 'only used with'),
    (scaled('dynamic'), 'model.rope_scaling.kind', 'none, linear, ntk, yarn, longrope, llama3'),
    (scaled('llama3', 'none'), 'model.rope_scaling.kind', 'llama3 is only used with model.positions=rope, not none'),
    (scaled('llama3', length=0), 'model.rope_scaling.length', 'not set; model.rope_scaling.kind=llama3 reads factor, length, turns'),
    (scaled('yarn', turns=[]), 'model.rope_scaling.turns', 'not set'),
    (scaled('yarn', turns=[4.0, 4.0]), 'model.rope_scaling.turns', '[4.0, 4.0] is not [low, high]'),
    (scaled('llama3', turns=[1.0]), 'model.rope_scaling.turns', '[1.0] is not [low, high]'),
    (scaled('yarn', turns=[1.0, math.nan]), 'model.rope_scaling.turns', 'nan] is not [low, high]'),
    (scaled('yarn', base=1.0), 'model.rope_base', '1 is not above 1'),
    (scaled('linear', factor=0.5), 'model.rope_scaling.factor', '0.5 is not in [1, 1e6]'),
    (scaled('linear', length=256), 'model.rope_scaling.length', '256 is not used with model.rope_scaling.kind=linear'),
    (scaled('none', factor=2.0), 'model.rope_scaling.factor', '2.0 is not used with model.rope_scaling.kind=none'),
    (scaled('llama3', factors=[1.0] * 16), 'model.rope_scaling.factors', 'is not used with'),
    (scaled('longrope', length=256, factors=[1.0] * 15), 'model.rope_scaling.factors', '15 numbers for 32 rotated dimensions / 2 = 16'),
    (scaled('longrope', length=256, factors=[0.0] * 16), 'model.rope_scaling.factors', '0.0 is not in [0.001, 1e+06]'),
    (scaled('longrope', length=1, factors=[1.0] * 16), 'model.rope_scaling.length', 'divides by its logarithm'),
    ({'model': {**scaled('ntk', factor=2.0)['model'], 'rope_fraction': 1 / 16}}, 'model.rope_scaling.kind', '2 rotated dimensions have one'),
    (
      {'model': {'positions': 'learned', 'max_positions': 256}, 'loop': {'sample_every': 9, 'sample_tokens': 253}},
      'loop.sample_tokens',
      'prompt of 4 bytes = 257 tokens',
    ),
    ({'model': {'positions': 'rope', 'rope_fraction': 0.4}}, 'model.rope_fraction', '32 * 0.4 = 12.8'),
    ({'model': {'rope_fraction': 0.0}}, 'model.rope_fraction', '(0, 1]'),
    ({'mesh': {'zero': 4}}, 'mesh.zero', '0, 1, 2, 3'),
    ({'mesh': {'schedule': 'zb'}}, 'mesh.schedule', "'zb' is not one of gpipe, 1f1b, 1f1b_strict, interleaved"),
    ({'mesh': {'schedule': 'forward'}}, 'mesh.schedule', "'forward' is not one of"),
    ({'mesh': {'virtual': 0}}, 'mesh.virtual', '0 is less than 1'),
    ({'mesh': {'tensor': 0}}, 'mesh.tensor', '0'),
    ({'mesh': {'data': 0}}, 'mesh.data', '-1'),
    ({'train': {'compute_dtype': 'float16'}}, 'train.compute_dtype', 'bfloat16'),
    ({'train': {'remat': 'some'}}, 'train.remat', 'selective'),
    ({'train': {'ramp_start': 2}}, 'train.ramp_increment, train.ramp_tokens', 'all three'),
    ({'train': {'ramp_start': 8, 'ramp_increment': 1, 'ramp_tokens': 9}}, 'train.ramp_start', 'not below'),
    ({'train': {'ramp_start': 2, 'ramp_increment': 4, 'ramp_tokens': 9}}, 'train.ramp_increment', '8 - ramp_start 2'),
    ({'data': {'sources': []}}, 'data.sources', 'empty'),
    ({'data': {'sources': [{'weight': 0}]}}, 'data.sources', 'sum to 0'),
    ({'data': {'sources': [{'weight': -1}]}}, 'data.sources.0.weight', '-1'),
    ({'data': {'sources': [{}, {'name': 'b', 'weight': math.nan}]}}, 'data.sources.1.weight', 'nan'),
    ({'data': {'sources': [{'kind': 'csv'}]}}, 'data.sources.0.kind', 'jsonl'),
    ({'data': {'sources': [{'path': 'docs'}]}}, 'data.sources.0.path', 'code or prose'),
    ({'data': {'sources': [{}, {}]}}, 'data.sources', "'code'"),
    ({'data': {'validation': 1.0}}, 'data.validation', '[0, 1)'),
    ({'data': {'validation': 0.0}}, 'data.validation', 'eval_every'),
    ({'data': {'tokenizer': 'bpe'}}, 'data.tokenizer', 'bytes'),
    ({'data': {'tokenizer': 'bpe.txt'}}, 'data.tokenizer', '.model'),
    ({'data': {'sources': [{'field': 'body'}]}}, 'data.sources.0.field', 'jsonl'),
    ({'data': {'sources': [{'kind': 'jsonl', 'field': ''}]}}, 'data.sources.0.field', "''"),
    ({'data': {'sources': [{'kind': 'text', 'split': 'test'}]}}, 'data.sources.0.split', 'tfds'),
  ],
)
def test_nonsense_is_rejected(sections, field, detail):
  message = rejected(sections)
  assert message.startswith(f'{field}:')
  assert detail in message


def test_fields_of_unused_layer_kinds_are_not_checked():
  build(model={'pattern': 'M', 'attention': {'heads': 6, 'kv_heads': 4}, 'mlp': {'activation': 'none'}})
  build(model={'pattern': '*', 'mamba2': {'heads': 8, 'groups': 3, 'state': 0}, 'mamba': {'dt_rank': 0}})


@pytest.mark.parametrize(
  ('mesh', 'devices', 'detail'),
  [
    ({'tensor': 3}, 8, '8 devices / (pipe 1 * tensor 3 = 3)'),
    ({'tensor': 2, 'data': 3}, 8, '1 * data 3 * tensor 2 = 6, but there are 8 devices; set mesh.data=4'),
    ({'tensor': 3, 'data': 2}, 8, 'mesh.tensor=2, mesh.data=4'),
    ({'data': 8}, 1, 'there are 1 devices'),
  ],
)
def test_mesh_and_devices_must_agree(mesh, devices, detail):
  with pytest.raises(ConfigError, match='mesh') as caught:
    config_lib.resolve_mesh(build(mesh=mesh), devices)
  assert detail in str(caught.value)


@pytest.mark.parametrize(
  ('pattern', 'sections', 'tensor', 'field'),
  [
    ('*', {'attention': {'heads': 6, 'kv_heads': 2}}, 4, 'model.attention.heads 6'),
    ('M', {'mamba2': {'heads': 6, 'groups': 2}}, 4, 'model.mamba2.heads 6'),
    ('m', {'mamba': {'d_inner': 66}}, 4, 'model.mamba.d_inner 66'),
    ('-', {'mlp': {'d_ff': 66}}, 4, 'model.mlp.d_ff 66'),
    ('M', {'vocab': 258}, 4, 'model.vocab 258'),
  ],
)
def test_tensor_must_divide_what_it_cuts(pattern, sections, tensor, field):
  config = build(model={'pattern': pattern, **sections}, mesh={'tensor': tensor})
  with pytest.raises(ConfigError, match=f'^mesh.tensor: {tensor} does not divide {field}'):
    config_lib.resolve_mesh(config, tensor)


def test_tensor_ignores_unused_kinds_and_groups():
  model = {'pattern': 'M', 'attention': {'heads': 3, 'kv_heads': 3}, 'mamba2': {'heads': 8, 'groups': 2}}
  assert config_lib.resolve_mesh(build(model=model, mesh={'tensor': 4}), 8).mesh.data == 2


def test_sequence_parallel_cuts_the_sequence():
  config = build(mesh={'tensor': 4, 'sequence_parallel': True}, train={'seq_len': 254})
  with pytest.raises(
    ConfigError, match=r'mesh.tensor: 4 does not divide train.seq_len 254 \(mesh.sequence_parallel\)'
  ):
    config_lib.resolve_mesh(config, 4)


def test_batch_and_ramp_are_whole_microbatches():
  with pytest.raises(ConfigError, match=r'train.batch: 8 is not a multiple of .* = 16; nearest: 16'):
    config_lib.resolve_mesh(build(train={'microbatch': 2}), 8)
  ramp = {'batch': 24, 'ramp_start': 8, 'ramp_increment': 4, 'ramp_tokens': 999}
  with pytest.raises(ConfigError, match=r'train.ramp_increment: 4 is not a multiple of .* = 8; nearest: 8'):
    config_lib.resolve_mesh(build(train=ramp), 8)
  assert config_lib.resolve_mesh(build(train=ramp), 4).mesh.data == 4


@pytest.mark.parametrize(
  'train',
  [
    {'steps': 100},
    {'steps': 1, 'batch': 12, 'ramp_start': 4, 'ramp_increment': 4, 'ramp_tokens': 100_000},
    {'steps': 57, 'batch': 12, 'ramp_start': 4, 'ramp_increment': 4, 'ramp_tokens': 100_000},
    {'steps': 500, 'batch': 1920, 'ramp_start': 32, 'ramp_increment': 32, 'ramp_tokens': 10_000_000},
  ],
)
def test_run_tokens_are_what_the_schedule_consumes(train):
  config = build(train=train)
  schedule = Schedule(config)
  assert run_tokens(config.train) == sum(schedule.inputs(i).batch for i in range(config.train.steps)) * 256
  assert run_tokens(config.train) == schedule.total_tokens


@pytest.mark.parametrize(
  ('mesh', 'message'),
  [
    (
      {'pipe': 2, 'virtual': 2},
      (
        'mesh.virtual: 2 stages a device with mesh.schedule 1f1b; only interleaved has more than one: '
        'set mesh.schedule=interleaved or mesh.virtual=1'
      ),
    ),
    (
      {'pipe': 1, 'virtual': 2, 'schedule': 'interleaved'},
      'mesh.virtual: 2 stages a device with mesh.pipe 1, without a pipeline; set mesh.virtual=1 or mesh.pipe above 1',
    ),
    (
      {'pipe': 9},
      'mesh.pipe: 9 stages for the 8 layers of model.pattern; each needs at least one layer: set mesh.pipe to at most 8',
    ),
    (
      {'pipe': 3, 'virtual': 3, 'schedule': 'interleaved'},
      (
        'mesh.virtual: mesh.pipe 3 * mesh.virtual 3 = 9 stages for the 8 layers of model.pattern; each needs at least one '
        'layer: set mesh.virtual to at most 2'
      ),
    ),
    (
      {'pipe': 4, 'schedule': 'interleaved', 'data': 2},
      (
        'train.batch: 20 / (train.microbatch 2 * mesh.data 2) = 5 microbatches are not a multiple of mesh.pipe 4, which '
        'mesh.schedule interleaved needs; nearest: 16 or 32, or set mesh.schedule=1f1b and mesh.virtual=1'
      ),
    ),
  ],
)
def test_a_pipeline_that_cannot_be(mesh, message):
  config = build(mesh={'data': 1} | mesh, model={'pattern': 'M-M-|M-*-'}, train={'batch': 20, 'microbatch': 2})
  with pytest.raises(ConfigError) as caught:
    config_lib.check_mesh(config)
  assert str(caught.value) == message


def test_a_ramp_is_whole_groups_of_microbatches_too():
  ramp = {'batch': 24, 'ramp_start': 8, 'ramp_increment': 4, 'ramp_tokens': 999}
  mesh = {'pipe': 4, 'schedule': 'interleaved', 'data': 2}
  with pytest.raises(ConfigError, match=r'train.ramp_increment: 4 / .* = 2 microbatches .* nearest: 8,'):
    config_lib.check_mesh(build(mesh=mesh, model={'pattern': 'M' * 8}, train=ramp))


def test_a_timetable_has_an_end():
  with pytest.raises(ConfigError, match=r'train.batch: 1048576 microbatches \* mesh.pipe 2 \* mesh.virtual 1 = 2097152 tasks'):
    config_lib.check_mesh(build(mesh={'pipe': 2, 'data': 1}, train={'batch': 2**20}))


def test_a_config_from_before_the_schedules_is_read():
  old = config_lib.to_dict(Config())
  del old['mesh']['schedule'], old['mesh']['virtual']
  assert config_lib.from_dict(old) == Config()
