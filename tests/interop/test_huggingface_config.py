import json
import math
import pathlib

import pytest

from lmscale.config import ModelConfig, RopeScalingConfig
from lmscale.errors import ConfigError
from lmscale.interop.huggingface_config import read_config, read_config_with_notes

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens'
NAMES = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())
YARN = {'rope_type': 'yarn', 'rope_theta': 500.0, 'factor': 4.0, 'original_max_position_embeddings': 64}
LONGROPE = YARN | {'rope_type': 'longrope', 'short_factor': [1.0, 1.0, 1.5, 2.0, 4.0], 'long_factor': [1.0, 1.0, 1.5, 2.0, 4.0]}


def config_values(name: str) -> dict:
  return json.loads((GOLDENS / name / 'config.json').read_text())


def test_fields_of_each_family():
  llama = read_config(config_values('llama'))
  assert (llama.pattern, llama.d_model, llama.vocab, llama.tied, llama.bias) == ('*-*-', 36, 97, False, False)
  assert (llama.norm, llama.norm_eps, llama.mlp.activation, llama.mlp.d_ff) == ('rmsnorm', 2e-3, 'swiglu', 47)
  assert (llama.positions, llama.rope_fraction, llama.rope_base) == ('rope', 1.0, 500.0)
  assert (llama.attention.heads, llama.attention.kv_heads, llama.attention.head_dim) == (6, 2, 10)
  nemotron = read_config(config_values('nemotron_bias'))
  assert (nemotron.norm, nemotron.mlp.activation, nemotron.rope_fraction) == ('layernorm1p', 'gelu', 0.25)
  assert nemotron.tied and nemotron.bias
  hybrid = read_config(config_values('nemotron_h'))
  assert (hybrid.pattern, hybrid.positions, hybrid.mlp.activation) == ('M-*M-', 'none', 'relu2')
  assert (hybrid.mamba2.heads, hybrid.mamba2.head_dim, hybrid.mamba2.groups, hybrid.mamba2.state) == (6, 5, 3, 7)
  mamba = read_config(config_values('mamba_untied'))
  assert (mamba.pattern, mamba.mamba.d_inner, mamba.mamba.dt_rank, mamba.mamba.state) == ('mm', 54, 2, 5)


def test_tying():
  assert not read_config(config_values('nemotron_h_gelu')).tied  # the file says true, transformers never ties it
  values = config_values('mamba')
  del values['tie_word_embeddings']  # older files leave the family's default out
  assert read_config(values).tied
  values = config_values('mamba2')
  del values['tie_word_embeddings']
  assert not read_config(values).tied


@pytest.mark.parametrize('kinds', [None, ['mamba', 'mlp', 'attention', 'mamba', 'mlp']])
def test_older_names_of_nemotron_h(kinds):
  values = config_values('nemotron_h')
  today = read_config(values)
  del values['layers_block_type']
  values |= {'layers_block_type': kinds} if kinds else {'hybrid_override_pattern': 'M-*M-'}
  values['attention_head_dim'] = values.pop('head_dim')
  values['mamba_n_groups'] = values.pop('n_groups')
  assert read_config(values) == today


@pytest.mark.parametrize('name', ['llama', 'nemotron'])
def test_older_names_of_rotary_positions(name):
  values = config_values(name)
  today = read_config(values)
  rope = values.pop('rope_parameters')
  values |= {'rope_theta': rope['rope_theta'], 'rope_scaling': None}
  if 'partial_rotary_factor' in rope and name == 'llama':
    values['partial_rotary_factor'] = rope['partial_rotary_factor']
  assert read_config(values) == today  # Nemotron's default fraction is 0.5


@pytest.mark.parametrize(
  'limit', [[0.0, {'__float__': 'Infinity'}], [0.0, math.inf], [0, math.inf], None, [{'__float__': '0'}, math.inf]]
)
def test_spellings_of_no_dt_limit(limit):
  values = config_values('mamba2')
  assert read_config(values | {'time_step_limit': limit}) == read_config(values)
  assert math.isinf(json.loads('[0.0, Infinity]')[1])


@pytest.mark.parametrize(
  ('name', 'change', 'message'),
  [
    ('llama', {'model_type': 'gpt2'}, "model_type: 'gpt2' is not supported; supported: llama"),
    ('llama', {'model_type': ['llama']}, 'model_type: '),
    ('llama', {'hidden_size': None}, 'hidden_size: missing'),
    ('llama', {'hidden_size': 36.0}, 'hidden_size: 36.0 is not an integer'),
    ('llama', {'num_hidden_layers': 10**9}, 'num_hidden_layers: 1000000000 is not an integer from 1 to 10000'),
    ('llama', {'num_key_value_heads': 4}, 'kv_heads: 4 does not divide model.attention.heads 6'),
    ('llama', {'hidden_act': 'relu2'}, "hidden_act: 'relu2' is not supported"),
    ('llama', {'attention_bias': True}, 'mlp_bias: False, but attention_bias is True'),
    ('llama', {'rope_parameters': {'rope_type': 'llama3', 'rope_theta': 5e5}}, 'factor: missing'),
    ('llama', {'rope_parameters': {'rope_type': 'dynamic', 'factor': 4.0}}, "rope_parameters.rope_type: 'dynamic' is not supported"),
    ('llama', {'rope_scaling': {'type': ['linear'], 'factor': 2}}, 'rope_scaling.rope_type: '),
    ('llama', {'rope_scaling': {'type': 'linear', 'factor': 0.5}}, 'model.rope_scaling.factor: 0.5 is not in'),
    ('llama', {'rope_parameters': YARN | {'truncate': False}}, 'truncate: False is not supported'),
    ('llama', {'rope_parameters': YARN | {'attention_factor': 1.5}}, 'attention_factor: 1.5 is not supported; .* factor 4, 1.138629'),
    ('llama', {'rope_parameters': YARN | {'mscale': 1.0, 'mscale_all_dim': 1.0}}, 'mscale: 1.0 is not supported'),
    ('llama', {'rope_parameters': YARN | {'beta_fast': 0.5}}, r'model.rope_scaling.turns: \[1.0, 0.5\] is not'),
    ('llama', {'rope_parameters': LONGROPE | {'short_factor': [1.0] * 5}}, 'short_factor: not the same as long_factor'),
    ('llama', {'rope_parameters': LONGROPE | {'attention_factor': 1.0}}, 'attention_factor: 1.0 is not supported'),
    ('llama', {'rope_parameters': LONGROPE | {'short_factor': 'x', 'long_factor': 'x'}}, "long_factor: 'x': expected a list"),
    ('llama', {'rope_parameters': LONGROPE | {'short_factor': [1.0], 'long_factor': [1.0]}}, 'model.rope_scaling.factors: 1 numbers for 10'),
    ('llama', {'rope_parameters': {'full': {'rope_theta': 1e4}}}, 'rope_parameters: '),
    ('llama', {'rope_parameters': {'partial_rotary_factor': 0.5}}, 'partial_rotary_factor: 0.5: Llama rotates'),
    ('nemotron', {'sliding_window': 128}, 'sliding_window: 128 is not supported'),
    ('nemotron', {'hidden_act': 'silu'}, "hidden_act: 'silu' is not supported"),
    ('nemotron_h', {'use_bias': True}, 'use_bias: True is not supported'),
    ('nemotron_h', {'mlp_bias': True}, 'mlp_bias: True is not supported'),
    ('nemotron_h', {'attention_bias': True}, 'attention_bias: True is not supported'),
    ('nemotron_h', {'mlp_hidden_act': 'silu'}, "mlp_hidden_act: 'silu' is not supported; supported: relu2"),
    ('nemotron_h', {'mamba_hidden_act': 'gelu'}, "mamba_hidden_act: 'gelu' is not supported"),
    ('nemotron_h', {'layers_block_type': ['mlp', 'moe']}, "layers_block_type: 'moe' is not supported"),
    ('nemotron_h', {'layers_block_type': None, 'hybrid_override_pattern': 'ME'}, "hybrid_override_pattern: 'ME'"),
    ('nemotron_h', {'num_nextn_predict_layers': 1}, 'num_nextn_predict_layers: 1'),
    ('nemotron_h', {'sliding_window': 128}, 'sliding_window: 128'),
    ('mamba2', {'n_groups': 4}, 'groups: 4 does not divide model.mamba2.heads 6'),
    ('mamba2', {'num_heads': 3}, r'expand: 2 \* hidden_size 27 = 54, but num_heads 3 \* head_dim 9 = 27'),
    ('mamba2', {'time_step_limit': [0.2, 0.1]}, 'time_step_limit: .* lower limit < upper limit'),
    ('mamba2', {'time_step_limit': [0.0, 0.0]}, 'time_step_limit: .* lower limit < upper limit'),
    ('mamba2', {'time_step_limit': [-1.0, 1.0]}, 'time_step_limit: .* 0 <= lower limit'),
    ('mamba2', {'time_step_limit': [0.0, -math.inf]}, 'time_step_limit: .* lower limit < upper limit'),
    ('mamba2', {'time_step_limit': [0.1]}, 'time_step_limit: .*expected a lower and an upper limit'),
    ('mamba2', {'rms_norm': False}, 'rms_norm: False is not supported'),
    ('bamba', {'mamba_proj_bias': True}, 'mamba_proj_bias: True is not supported'),
    ('bamba', {'mamba_conv_bias': False}, 'mamba_conv_bias: False is not supported'),
    ('bamba', {'mamba_d_head': 9}, r'mamba_d_head: mamba_n_heads 6 \* 9 = 54, but mamba_expand \* hidden_size = 48'),
    ('bamba', {'attn_layer_indices': [3]}, r'attn_layer_indices: \[3\]: expected layers from 0 to 2'),
    ('bamba', {'attn_layer_indices': 'x'}, "attn_layer_indices: 'x': expected layers"),
    ('bamba', {'attn_rotary_emb': 8}, 'attn_rotary_emb: 8 is not supported'),
    ('bamba', {'hidden_act': 'relu2'}, "hidden_act: 'relu2' is not supported"),
    ('mamba2', {'use_conv_bias': False}, 'use_conv_bias: False is not supported'),
    ('mamba', {'hidden_act': 'relu'}, "hidden_act: 'relu' is not supported"),
    ('mamba', {'time_step_rank': 0}, 'time_step_rank: 0 is not an integer'),
    ('mamba', {'expand': math.inf}, 'expand: inf is not an integer'),
  ],
)
def test_what_is_refused(name, change, message):
  with pytest.raises(ConfigError, match=f'^(model.attention.|model.mamba2.)?{message}') as error:
    read_config(config_values(name) | change)
  assert '\n' not in str(error.value)


def test_scaled_rotary_positions_in_every_spelling():
  values = config_values('llama_scaled')
  today = read_config(values)
  assert today.rope_scaling == RopeScalingConfig('llama3', 8.0, 24, (1.0, 4.0))
  rope = values.pop('rope_parameters')
  values |= {'rope_theta': rope.pop('rope_theta'), 'rope_scaling': rope}
  assert read_config(values) == today
  length = rope.pop('original_max_position_embeddings')
  assert read_config(values | {'original_max_position_embeddings': length}) == today
  assert read_config(values | {'max_position_embeddings': length}) == today


def test_scalings_that_have_defaults():
  values = config_values('llama')
  assert read_config(values | {'rope_parameters': YARN}).rope_scaling == RopeScalingConfig('yarn', 4.0, 64, (1.0, 32.0))
  assert read_config(values | {'rope_parameters': YARN | {'attention_factor': 0.1 * math.log(4) + 1}}) == read_config(values | {'rope_parameters': YARN})
  longrope = read_config(values | {'rope_parameters': LONGROPE})
  assert longrope.rope_scaling == RopeScalingConfig('longrope', 4.0, 64, factors=(1.0, 1.0, 1.5, 2.0, 4.0))
  assert read_config(values | {'rope_parameters': LONGROPE | {'factor': None}, 'max_position_embeddings': 256}) == longrope


def test_bamba_rotates_half_of_each_head_whatever_stands_beside_rope_parameters():
  values = config_values('bamba')
  today = read_config(values)
  assert (today.pattern, today.rope_fraction, today.mlp.activation, today.bias) == ('M-*-M-', 0.5, 'swiglu', False)
  del values['rope_parameters']['partial_rotary_factor']
  assert read_config(values) == read_config(values | {'partial_rotary_factor': 1.0}) == today
  assert read_config(values | {'attn_rotary_emb': 4, 'mamba_d_head': 'auto'}) == today


@pytest.mark.parametrize(('name', 'limits'), [('mamba2', (0.0, 0.0)), ('mamba2_limits', (0.06, 0.3)), ('bamba_limits', (0.06, 0.3))])
def test_limits_of_dt(name, limits):
  found = read_config(config_values(name)).mamba2
  assert (found.dt_min, found.dt_max) == limits


@pytest.mark.parametrize('floor', [{'time_step_min': 0.001}, {'time_step_min': None}, {'time_step_min': None, 'mamba_dt_min': 0.001}])
def test_nemotron_h_says_its_lower_limit_twice(floor):
  values = {name: value for name, value in config_values('nemotron_h').items() if name != 'time_step_min'}
  values |= {name: value for name, value in floor.items() if value is not None}
  found, notes = read_config_with_notes(values)
  assert (found.mamba2.dt_min, found.mamba2.dt_max) == (0.0, 0.0)
  assert len(notes) == 1 and notes[0].startswith('time_step_min: ') and notes[0].endswith('--dt_min=0.001 follows the plain one')
  followed, notes = read_config_with_notes(values, dt_min=0.001)
  assert followed.mamba2.dt_min == 0.001 and notes == []
  agreed, notes = read_config_with_notes(values | {'time_step_limit': [0.001, math.inf]})
  assert agreed.mamba2.dt_min == 0.001 and notes == []


def test_a_lower_limit_needs_a_layer_for_it():
  with pytest.raises(ConfigError, match='--dt_min: the model has no Mamba-2 layer'):
    read_config_with_notes(config_values('llama'), dt_min=0.001)


@pytest.mark.parametrize('name', NAMES)
def test_any_value_gives_a_config_or_one_line(name):
  strange = [None, True, -1, 0, 1, 3, 2.5, 1e308, 10**400, math.nan, math.inf, 'x\n', 'auto', [], [1], ['mlp'], {}]
  strange += [{'__float__': 'x'}, {'__float__': []}, {'rope_theta': None}, [[]], [None, None]]
  values = config_values(name)
  for field in [*values, 'rope_scaling', 'hybrid_override_pattern']:
    for value in strange:
      try:
        assert isinstance(read_config(values | {field: value}), ModelConfig)
      except ConfigError as error:
        assert str(error).isprintable() and len(str(error)) < 300
