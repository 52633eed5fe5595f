"""Whose parameters a new run may start from: those of the same function of the same tokens."""

import dataclasses
import json
import pathlib

import pytest

from lmscale import config as config_lib
from lmscale.config import Config, recipes
from lmscale.errors import ConfigError
from lmscale.train.resume import about, check_parameters
from lmscale.train.schedule import Schedule
from lmscale.train.workdir import Workdir

ROOT = pathlib.Path(__file__).parents[2]


def change(config, path, value):
  head, _, rest = path.partition('.')
  return dataclasses.replace(config, **{head: change(getattr(config, head), rest, value) if rest else value})


def changed(config, fields):
  for path, value in fields.items():
    config = change(config, path, value)
  return config


ALL = changed(Config(), {'model.pattern': 'Mm*-', 'model.positions': 'rope', 'train.init_from': 'source'})


def parameters(old, new, tokenizer='t', of='t'):
  return check_parameters(new, tokenizer, 4, about(old, Schedule(old).inputs(3), {'tokenizer': of}))


@pytest.mark.parametrize(
  ('path', 'value'),
  [
    ('model.pattern', 'M*m-'), ('model.norm', 'layernorm1p'), ('model.norm_eps', 1e-6), ('model.positions', 'none'),
    ('model.rope_fraction', 0.5), ('model.tied', True), ('model.bias', True), ('model.d_model', 64), ('model.vocab', 300),
    ('model.attention.heads', 2), ('model.attention.kv_heads', 2), ('model.attention.head_dim', 64),
    ('model.mlp.activation', 'relu2'), ('model.mlp.d_ff', 256), ('model.mamba2.heads', 4), ('model.mamba2.head_dim', 64),
    ('model.mamba2.groups', 4), ('model.mamba2.state', 16), ('model.mamba2.conv', 3), ('model.mamba.d_inner', 128),
    ('model.mamba.state', 8), ('model.mamba.dt_rank', 4), ('model.mamba.conv', 3),
  ],
)  # fmt: skip
def test_parameters_of_another_function_are_refused(path, value):
  new = change(ALL, path, value)
  before = ALL
  for part in path.split('.'):
    before = getattr(before, part)
  with pytest.raises(ConfigError) as caught:
    parameters(ALL, new)
  text = str(caught.value).splitlines()
  assert text[0] == 'train.init_from: the parameters in source (step 4) are of another model; set as there what it computes:'
  assert text[1:] == [f'  {path}: {json.dumps(before)} -> {json.dumps(value)}']


def test_every_difference_of_the_function_has_a_line_and_so_has_the_tokenizer():
  new = changed(ALL, {'model.norm': 'layernorm', 'model.mlp.activation': 'relu2', 'model.rope_base': 5e5})
  with pytest.raises(ConfigError) as caught:
    parameters(ALL, new, of='bytes-v1')
  assert str(caught.value).splitlines()[1:] == [
    '  model.norm: "rmsnorm" -> "layernorm"', '  model.mlp.activation: "gelu" -> "relu2"', '  data.tokenizer: "bytes-v1" -> "t"',
  ]  # fmt: skip


@pytest.mark.parametrize(('path', 'value'), [('model.rope_base', 5e5), ('train.seq_len', 1024), ('model.rope_scaling.factor', 4.0), ('model.mamba2.dt_max', 0.1), ('model.mamba2.dt_min', 0.01)])
def test_what_may_be_meant_is_told(path, value):
  start = 'starting from the parameters of source at step 4'
  missing = 'source/config.json is missing: the config kept in the checkpoint was used'
  before = {'model.rope_base': 10000.0, 'train.seq_len': 256, 'model.rope_scaling.factor': 1.0}.get(path, 0.0)
  told = f'other than there: {path}: {json.dumps(before)} -> {json.dumps(value)}'
  assert parameters(ALL, change(ALL, path, value)) == [start, missing, told]


@pytest.mark.parametrize('context', ['16k', '32k', '128k'])
@pytest.mark.parametrize('arch', ['transformer', 'mamba', 'mamba2', 'hybrid'])
def test_the_study_goes_on_at_longer_contexts(arch, context):
  recipe, length = f'{ROOT}/configs/mamba_study.py:arch={arch},size=8b', {'16k': 16384, '32k': 32768, '128k': 131072}[context]
  paths = [('data.sources.0.path', 'x'), ('train.init_from', 'source')]
  old, new = recipes.load(recipe, paths), recipes.load(f'{recipe},context={context}', paths)
  longer = f'other than there: train.seq_len: 4096 -> {length}'
  assert parameters(old, new)[2:] == [longer]
  if arch == 'transformer':
    scaling = {'kind': 'yarn', 'factor': length / 4096, 'length': 4096, 'turns': '[1, 32]'}
    scaled = recipes.change(new, [(f'model.rope_scaling.{name}', str(value)) for name, value in scaling.items()])
    assert parameters(old, scaled)[2:] == [
      'other than there: model.rope_scaling.kind: "none" -> "yarn"', f'other than there: model.rope_scaling.factor: 1.0 -> {length / 4096}',
      'other than there: model.rope_scaling.length: 0 -> 4096', longer, 'other than there: model.rope_scaling.turns.0: absent -> 1.0',
      'other than there: model.rope_scaling.turns.1: absent -> 32.0',
    ]  # fmt: skip


@pytest.mark.parametrize(
  ('path', 'value'),
  [
    ('model.pattern', 'Mm|*-'), ('model.init_std', 0.1), ('model.mamba2.chunk', 8), ('model.mamba2.implementation', 'scan'),
    ('model.attention.implementation', 'xla'), ('seed', 3), ('train.batch', 2), ('optimizer.beta2', 0.99), ('mesh.zero', 3),
    ('data.sources', (config_lib.SourceConfig('other', path='prose'),)),
  ],
)  # fmt: skip
def test_what_is_no_function_of_the_parameters_is_free(path, value):
  assert parameters(ALL, change(ALL, path, value))[2:] == []


def test_fields_of_layers_that_are_not_there_do_not_count():
  old = change(ALL, 'model.pattern', 'M')
  for path, value in (('model.mlp.activation', 'relu2'), ('model.attention.heads', 2), ('model.mamba.conv', 3)):
    parameters(old, change(old, path, value))


def test_parameters_that_nobody_knows_are_refused(tmp_path):
  new = change(ALL, 'train.init_from', str(tmp_path))
  meta = about(ALL, Schedule(ALL).inputs(3), {'tokenizer': 't'})
  del meta['config']
  with pytest.raises(ConfigError, match='has no config.json'):
    check_parameters(new, 't', 4, meta)
  Workdir(tmp_path, change(ALL, 'model.norm', 'layernorm')).record()
  with pytest.raises(ConfigError, match='model.norm: "layernorm" -> "rmsnorm"'):
    check_parameters(new, 't', 4, meta)
