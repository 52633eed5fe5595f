"""The config.json of Hugging Face models as a `ModelConfig`: see `huggingface` for what is covered.

A feature that changes the result and that lmscale lacks is an error that names its field.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from lmscale.config import AttentionConfig, Config, Mamba2Config, MambaConfig, MLPConfig, ModelConfig, validate
from lmscale.errors import ConfigError
from lmscale.interop.huggingface_fields import Fields, read_number, shown
from lmscale.interop.huggingface_rope import read_rope

LARGEST_DEPTH = 10_000
HARMLESS_DT_FLOOR = 1e-6  # raising dt from 0 to this is less than float32 rounding
ACTIVATIONS = {
  'relu2': 'relu2',
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_fast': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
}
GATED_ACTIVATIONS = {'silu': 'swiglu', 'swish': 'swiglu', 'gelu': 'geglu'}
NEMOTRON_H_KINDS = {'linear_attention': 'M', 'mamba': 'M', 'full_attention': '*', 'attention': '*', 'mlp': '-'}
NEMOTRON_H_OLD_NAMES = {
  'mamba_n_groups': 'n_groups',
  'mamba_d_conv': 'conv_kernel',
  'mamba_dt_min': 'time_step_min',
  'mamba_dt_limit': 'time_step_limit',
  'mamba_conv_bias': 'use_conv_bias',
  'attention_head_dim': 'head_dim',
}


def read_config(values: Mapping[str, Any]) -> ModelConfig:
  """The `ModelConfig` of a parsed `config.json`; see `read_config_with_notes`."""
  return read_config_with_notes(values)[0]


def read_config_with_notes(values: Mapping[str, Any], dt_min: float | None = None) -> tuple[ModelConfig, list[str]]:
  """The `ModelConfig` of a parsed `config.json`, and lines for people.

  dt_min: of the Mamba-2 layers, in place of what the file says (NemotronH's says it twice).

  Raises:
    ConfigError: an unknown model type, a missing or impossible value, or a feature that lmscale lacks; the line names
      the field.
  """
  fields = Fields(values)
  fields.dt_min = dt_min
  kind = values.get('model_type')
  if not isinstance(kind, str) or kind not in FAMILIES:
    raise ConfigError(f'model_type: {shown(kind)} is not supported; supported: {", ".join(FAMILIES)}')
  fields.must('quantization_config', None, None)
  model = dataclasses.replace(
    FAMILIES[kind](fields),
    d_model=fields.integer('hidden_size'),
    vocab=fields.integer('vocab_size'),
    tied=fields.flag('tie_word_embeddings', kind == 'mamba') and kind != 'nemotron_h',  # which never ties
    init_std=fields.number('initializer_range', 0.02),
  )
  if dt_min is not None and 'M' not in model.layers:
    raise ConfigError('--dt_min: the model has no Mamba-2 layer')
  validate(Config(model=model))
  return model, fields.notes


def _dt_limits(fields: Fields) -> dict[str, float]:
  """dt_min and dt_max from `time_step_limit`, between which transformers puts every dt; ours have 0 for no bound."""
  limits = fields.get('time_step_limit', [0.0, math.inf])
  if not isinstance(limits, list | tuple) or len(limits) != 2:
    raise ConfigError(f'time_step_limit: {shown(limits)}: expected a lower and an upper limit')
  low, high = (read_number('time_step_limit', limit) for limit in limits)
  if not 0 <= low < high:
    raise ConfigError(f'time_step_limit: {shown(limits)}: expected 0 <= lower limit < upper limit')
  return {'dt_min': low if fields.dt_min is None else fields.dt_min, 'dt_max': 0.0 if high == math.inf else high}


def _attention(fields: Fields) -> AttentionConfig:
  heads = fields.integer('num_attention_heads')
  return AttentionConfig(
    heads=heads,
    kv_heads=fields.integer('num_key_value_heads', heads),
    head_dim=fields.integer('head_dim', max(fields.integer('hidden_size') // heads, 1)),
  )


def _transformer(
  fields: Fields, eps: str, fraction: float, activations: Mapping[str, str], **rest: Any
) -> ModelConfig:
  fields.must('sliding_window', None, None)
  return ModelConfig(
    pattern='*-' * fields.integer('num_hidden_layers', largest=LARGEST_DEPTH),
    norm_eps=fields.number(eps),
    bias=_bias(fields),
    attention=_attention(fields),
    mlp=MLPConfig(fields.integer('intermediate_size'), fields.choice('hidden_act', activations)),
    **read_rope(fields, fraction),
    **rest,
  )


def _bias(fields: Fields) -> bool:
  bias = fields.flag('attention_bias', False)
  if fields.flag('mlp_bias', False) != bias:
    raise ConfigError(f'mlp_bias: {not bias}, but attention_bias is {bias}; lmscale has biases in both or in neither')
  return bias


def _llama(fields: Fields) -> ModelConfig:
  model = _transformer(fields, 'rms_norm_eps', 1.0, GATED_ACTIVATIONS)
  if model.rope_fraction != 1:
    raise ConfigError(f'partial_rotary_factor: {model.rope_fraction:g}: Llama rotates whole heads')
  return model


def _nemotron(fields: Fields) -> ModelConfig:
  return _transformer(fields, 'norm_eps', 0.5, ACTIVATIONS, norm='layernorm1p')


def _nemotron_h(fields: Fields) -> ModelConfig:
  renamed = {NEMOTRON_H_OLD_NAMES.get(name, name): value for name, value in fields.values.items()}
  fields.values = renamed | fields.values  # today's name wins
  for name, wanted in (('use_bias', False), ('attention_bias', False), ('mlp_bias', False), ('use_conv_bias', True)):
    fields.must(name, wanted, wanted)
  fields.must('mamba_hidden_act', 'silu', 'silu')
  fields.must('sliding_window', None, None)
  fields.must('num_nextn_predict_layers', 0, 0)
  pattern = _nemotron_h_pattern(fields)
  model = ModelConfig(pattern=pattern, norm_eps=fields.number('layer_norm_epsilon', 1e-5))
  if '*' in pattern:
    model = dataclasses.replace(model, attention=_attention(fields))
  if '-' in pattern:
    mlp = MLPConfig(fields.integer('intermediate_size'), fields.choice('mlp_hidden_act', ACTIVATIONS))
    model = dataclasses.replace(model, mlp=mlp)
  if 'M' in pattern:
    limits = _dt_limits(fields)
    floor = fields.number('time_step_min', 0.001)
    if fields.dt_min is None and floor > HARMLESS_DT_FLOOR and floor != limits['dt_min']:
      fields.notes.append(
        f"time_step_min: transformers' plain path raises every dt to {floor:g}, its fused one goes by time_step_limit, which is "
        f'followed here; --dt_min={floor:g} follows the plain one'
      )
    mamba2 = Mamba2Config(
      heads=fields.integer('mamba_num_heads'),
      head_dim=fields.integer('mamba_head_dim'),
      groups=fields.integer('n_groups'),
      state=fields.integer('ssm_state_size'),
      conv=fields.integer('conv_kernel'),
      **limits,
    )
    model = dataclasses.replace(model, mamba2=mamba2)
  return model


def _bamba(fields: Fields) -> ModelConfig:
  """Every block is a mixer, attention where `attn_layer_indices` says so, and a gated MLP."""
  fields.must('mamba_proj_bias', False, False)
  fields.must('mamba_conv_bias', True, True)
  heads, kinds = fields.integer('mamba_n_heads'), _bamba_kinds(fields)
  attention = _attention(fields)
  fields.must('attn_rotary_emb', attention.head_dim // 2, attention.head_dim // 2)  # of older files, without effect in transformers
  inner, given = fields.integer('mamba_expand', 2) * fields.integer('hidden_size'), fields.values.get('mamba_d_head', 'auto')
  head_dim = max(inner // heads, 1) if given in ('auto', None) else fields.integer('mamba_d_head')
  if heads * head_dim != inner:
    raise ConfigError(f'mamba_d_head: mamba_n_heads {heads} * {head_dim} = {heads * head_dim}, but mamba_expand * hidden_size = {inner}')
  mamba2 = Mamba2Config(
    heads, head_dim, fields.integer('mamba_n_groups'), fields.integer('mamba_d_state'), fields.integer('mamba_d_conv'), **_dt_limits(fields)
  )
  return ModelConfig(
    pattern=''.join(f'{kind}-' for kind in kinds),
    norm_eps=fields.number('rms_norm_eps', 1e-5),
    bias=_bias(fields),
    attention=attention,
    mlp=MLPConfig(fields.integer('intermediate_size'), fields.choice('hidden_act', GATED_ACTIVATIONS)),
    mamba2=mamba2,
    **read_rope(Fields({**fields.values, 'partial_rotary_factor': 0.5}), 0.5),  # beside rope_parameters it is not looked at
  )


def _bamba_kinds(fields: Fields) -> str:
  depth, chosen = fields.integer('num_hidden_layers', largest=LARGEST_DEPTH), fields.values.get('attn_layer_indices') or []
  if not isinstance(chosen, list) or any(type(i) is not int or not 0 <= i < depth for i in chosen):
    raise ConfigError(f'attn_layer_indices: {shown(chosen)}: expected layers from 0 to {depth - 1}')
  return ''.join('*' if i in set(chosen) else 'M' for i in range(depth))


def _nemotron_h_pattern(fields: Fields) -> str:
  """Our pattern from `layers_block_type` (today) or `hybrid_override_pattern` (older files)."""
  kinds = fields.values.get('layers_block_type')
  if kinds is None:
    pattern = fields.get('hybrid_override_pattern')
    if not isinstance(pattern, str) or not 0 < len(pattern) <= LARGEST_DEPTH or set(pattern) - set('M*-'):
      raise ConfigError(f'hybrid_override_pattern: {shown(pattern)}: supported are M, * and - (no experts, E)')
    return pattern
  if not isinstance(kinds, list) or not 0 < len(kinds) <= LARGEST_DEPTH:
    raise ConfigError(f'layers_block_type: {shown(kinds)}: expected a list of 1 to {LARGEST_DEPTH} layer kinds')
  for kind in kinds:
    if not isinstance(kind, str) or kind not in NEMOTRON_H_KINDS:
      raise ConfigError(
        f'layers_block_type: {shown(kind)} is not supported; supported: {", ".join(NEMOTRON_H_KINDS)}'
      )
  return ''.join(NEMOTRON_H_KINDS[kind] for kind in kinds)


def _mamba_common(fields: Fields, symbol: str) -> ModelConfig:
  fields.must('use_bias', False, False)
  fields.must('use_conv_bias', True, True)
  fields.must('hidden_act', 'silu', 'silu')
  depth = fields.integer('num_hidden_layers', largest=LARGEST_DEPTH)
  return ModelConfig(pattern=symbol * depth, norm_eps=fields.number('layer_norm_epsilon', 1e-5))


def _mamba2(fields: Fields) -> ModelConfig:
  fields.must('rms_norm', True, True)
  if fields.values.get('norm_before_gate'):
    fields.notes.append('norm_before_gate: true has no effect in transformers, which gates first, and none here')
  heads, head_dim = fields.integer('num_heads'), fields.integer('head_dim')
  width, expand = fields.integer('hidden_size'), fields.integer('expand', 2)
  if expand * width != heads * head_dim:
    raise ConfigError(
      f'expand: {expand} * hidden_size {width} = {expand * width}, but num_heads {heads} * head_dim {head_dim} = '
      f'{heads * head_dim}; they must be equal'
    )
  mamba2 = Mamba2Config(
    heads=heads,
    head_dim=head_dim,
    groups=fields.integer('n_groups'),
    state=fields.integer('state_size'),
    conv=fields.integer('conv_kernel'),
    **_dt_limits(fields),
  )
  return dataclasses.replace(_mamba_common(fields, 'M'), mamba2=mamba2)


def _mamba(fields: Fields) -> ModelConfig:
  width = fields.integer('hidden_size')
  rank = fields.get('time_step_rank', 'auto')
  mamba = MambaConfig(
    d_inner=fields.integer('expand', 2) * width,
    state=fields.integer('state_size'),
    dt_rank=math.ceil(width / 16) if rank == 'auto' else fields.integer('time_step_rank'),
    conv=fields.integer('conv_kernel'),
  )
  return dataclasses.replace(_mamba_common(fields, 'm'), mamba=mamba)


FAMILIES: dict[str, Callable[[Fields], ModelConfig]] = {
  'llama': _llama,
  'nemotron': _nemotron,
  'nemotron_h': _nemotron_h,
  'mamba': _mamba,
  'mamba2': _mamba2,
  'bamba': _bamba,
}
