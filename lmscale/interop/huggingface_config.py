"""The config.json of Hugging Face models as a `ModelConfig`: see `huggingface` for what is covered.

A feature that changes the result and that lmscale lacks is an error that names its field.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from lmscale.config import AttentionConfig, Config, Mamba2Config, MambaConfig, MLPConfig, ModelConfig, validate
from lmscale.errors import ConfigError

LARGEST = 1 << 28  # bound on every size in an untrusted config
LARGEST_DEPTH = 10_000
# transformers clamps dt from below and lmscale does not. Raising dt from 0 to 1e-6 is less than float32 rounding.
HARMLESS_DT_FLOOR = 1e-6
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
  'mamba_conv_bias': 'use_conv_bias',
  'attention_head_dim': 'head_dim',
}


def read_config(values: Mapping[str, Any]) -> ModelConfig:
  """The `ModelConfig` of a parsed `config.json`.

  Raises:
    ConfigError: an unknown model type, a missing or impossible value, or a feature that lmscale lacks; the line names
      the field.
  """
  fields = _Fields(values)
  kind = values.get('model_type')
  if not isinstance(kind, str) or kind not in FAMILIES:
    raise ConfigError(f'model_type: {_shown(kind)} is not supported; supported: {", ".join(FAMILIES)}')
  model = dataclasses.replace(
    FAMILIES[kind](fields),
    d_model=fields.integer('hidden_size'),
    vocab=fields.integer('vocab_size'),
    tied=fields.flag('tie_word_embeddings', kind == 'mamba') and kind != 'nemotron_h',  # which never ties
    init_std=fields.number('initializer_range', 0.02),
  )
  validate(Config(model=model))
  return model


class _Fields:
  """Checked access to the values of an untrusted `config.json`; each error names the field."""

  def __init__(self, values: Mapping[str, Any]):
    self.values = values

  def get(self, name: str, default: Any = None) -> Any:
    """The value, or `default` where it is absent or null; without a default the field is required."""
    value = self.values.get(name)
    if value is None and default is None:
      raise ConfigError(f'{name}: missing from config.json')
    return default if value is None else value

  def integer(self, name: str, default: int | None = None, largest: int = LARGEST) -> int:
    value = self.get(name, default)
    if type(value) is not int or not 1 <= value <= largest:
      raise ConfigError(f'{name}: {_shown(value)} is not an integer from 1 to {largest}')
    return value

  def number(self, name: str, default: float | None = None) -> float:
    value = _number(name, self.get(name, default))
    if math.isinf(value):
      raise ConfigError(f'{name}: {value} is not finite')
    return value

  def flag(self, name: str, default: bool) -> bool:
    value = self.get(name, default)
    if type(value) is not bool:
      raise ConfigError(f'{name}: {_shown(value)} is not true or false')
    return value

  def choice(self, name: str, table: Mapping[str, str]) -> str:
    value = self.get(name)
    if not isinstance(value, str) or value not in table:
      raise ConfigError(f'{name}: {_shown(value)} is not supported; supported: {", ".join(table)}')
    return table[value]

  def must(self, name: str, wanted: Any, default: Any) -> None:
    """Refuses any other value than `wanted`; `default` stands for an absent one."""
    value = self.values.get(name, default)
    if value != wanted:
      raise ConfigError(f'{name}: {_shown(value)} is not supported; lmscale has {_shown(wanted)} alone')


def _number(name: str, value: Any) -> float:
  """A number; transformers writes infinity as {"__float__": "Infinity"}."""
  if isinstance(value, dict) and set(value) == {'__float__'}:
    try:
      value = float(value['__float__'])
    except (TypeError, ValueError):
      value = None
  if type(value) is int and abs(value) <= LARGEST:
    value = float(value)
  if type(value) is not float or math.isnan(value):
    raise ConfigError(f'{name}: {_shown(value)} is not a number')
  return value


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else text[:57] + '...'


def _check_dt_floor(name: str, floor: float) -> None:
  if floor > HARMLESS_DT_FLOOR:
    raise ConfigError(
      f'{name}: transformers raises every dt below {floor:g} to it and lmscale has no such clamp, so logits can differ; '
      f'set it to at most {HARMLESS_DT_FLOOR:g} in config.json to load the model without the clamp'
    )


def _rotary(fields: _Fields, default_fraction: float) -> dict[str, Any]:
  """Fields of ModelConfig for rotary positions, from `rope_parameters` or the older top-level names."""
  name = 'rope_scaling' if fields.values.get('rope_scaling') else 'rope_parameters'
  rope = fields.get(name, {})
  if not isinstance(rope, dict) or any(isinstance(v, dict) for v in rope.values()):
    raise ConfigError(f'{name}: {_shown(rope)}: expected one set of values for all layers')
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind != 'default':
    raise ConfigError(f"{name}.rope_type: {_shown(kind)} is not supported; lmscale has 'default' alone")
  base = rope.get('rope_theta', fields.get('rope_theta', 10000.0))
  fraction = rope.get('partial_rotary_factor', fields.get('partial_rotary_factor', default_fraction))
  return {
    'positions': 'rope',
    'rope_base': _number('rope_theta', base),
    'rope_fraction': _number('partial_rotary_factor', fraction),
  }


def _attention(fields: _Fields) -> AttentionConfig:
  heads = fields.integer('num_attention_heads')
  return AttentionConfig(
    heads=heads,
    kv_heads=fields.integer('num_key_value_heads', heads),
    head_dim=fields.integer('head_dim', max(fields.integer('hidden_size') // heads, 1)),
  )


def _transformer(
  fields: _Fields, eps: str, fraction: float, activations: Mapping[str, str], **rest: Any
) -> ModelConfig:
  bias = fields.flag('attention_bias', False)
  if fields.flag('mlp_bias', False) != bias:
    raise ConfigError(f'mlp_bias: {not bias}, but attention_bias is {bias}; lmscale has biases in both or in neither')
  fields.must('sliding_window', None, None)
  return ModelConfig(
    pattern='*-' * fields.integer('num_hidden_layers', largest=LARGEST_DEPTH),
    norm_eps=fields.number(eps),
    bias=bias,
    attention=_attention(fields),
    mlp=MLPConfig(fields.integer('intermediate_size'), fields.choice('hidden_act', activations)),
    **_rotary(fields, fraction),
    **rest,
  )


def _llama(fields: _Fields) -> ModelConfig:
  model = _transformer(fields, 'rms_norm_eps', 1.0, GATED_ACTIVATIONS)
  if model.rope_fraction != 1:
    raise ConfigError(f'partial_rotary_factor: {model.rope_fraction:g}: Llama rotates whole heads')
  return model


def _nemotron(fields: _Fields) -> ModelConfig:
  return _transformer(fields, 'norm_eps', 0.5, ACTIVATIONS, norm='layernorm1p')


def _nemotron_h(fields: _Fields) -> ModelConfig:
  renamed = {NEMOTRON_H_OLD_NAMES.get(name, name): value for name, value in fields.values.items()}
  fields = _Fields(renamed | fields.values)  # today's name wins
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
    _check_dt_floor('time_step_min', fields.number('time_step_min', 0.001))
    mamba2 = Mamba2Config(
      heads=fields.integer('mamba_num_heads'),
      head_dim=fields.integer('mamba_head_dim'),
      groups=fields.integer('n_groups'),
      state=fields.integer('ssm_state_size'),
      conv=fields.integer('conv_kernel'),
    )
    model = dataclasses.replace(model, mamba2=mamba2)
  return model


def _nemotron_h_pattern(fields: _Fields) -> str:
  """Our pattern from `layers_block_type` (today) or `hybrid_override_pattern` (older files)."""
  kinds = fields.values.get('layers_block_type')
  if kinds is None:
    pattern = fields.get('hybrid_override_pattern')
    if not isinstance(pattern, str) or not 0 < len(pattern) <= LARGEST_DEPTH or set(pattern) - set('M*-'):
      raise ConfigError(f'hybrid_override_pattern: {_shown(pattern)}: supported are M, * and - (no experts, E)')
    return pattern
  if not isinstance(kinds, list) or not 0 < len(kinds) <= LARGEST_DEPTH:
    raise ConfigError(f'layers_block_type: {_shown(kinds)}: expected a list of 1 to {LARGEST_DEPTH} layer kinds')
  for kind in kinds:
    if not isinstance(kind, str) or kind not in NEMOTRON_H_KINDS:
      raise ConfigError(
        f'layers_block_type: {_shown(kind)} is not supported; supported: {", ".join(NEMOTRON_H_KINDS)}'
      )
  return ''.join(NEMOTRON_H_KINDS[kind] for kind in kinds)


def _mamba_common(fields: _Fields, symbol: str) -> ModelConfig:
  fields.must('use_bias', False, False)
  fields.must('use_conv_bias', True, True)
  fields.must('hidden_act', 'silu', 'silu')
  depth = fields.integer('num_hidden_layers', largest=LARGEST_DEPTH)
  return ModelConfig(pattern=symbol * depth, norm_eps=fields.number('layer_norm_epsilon', 1e-5))


def _mamba2(fields: _Fields) -> ModelConfig:
  limits = fields.get('time_step_limit', [0.0, math.inf])
  if not isinstance(limits, list | tuple) or len(limits) != 2:
    raise ConfigError(f'time_step_limit: {_shown(limits)}: expected a lower and an upper limit')
  _check_dt_floor('time_step_limit', _number('time_step_limit', limits[0]))
  if _number('time_step_limit', limits[1]) != math.inf:
    raise ConfigError(f'time_step_limit: {_shown(limits)}: an upper limit of dt is not supported; use Infinity')
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
  )
  return dataclasses.replace(_mamba_common(fields, 'M'), mamba2=mamba2)


def _mamba(fields: _Fields) -> ModelConfig:
  width = fields.integer('hidden_size')
  rank = fields.get('time_step_rank', 'auto')
  mamba = MambaConfig(
    d_inner=fields.integer('expand', 2) * width,
    state=fields.integer('state_size'),
    dt_rank=math.ceil(width / 16) if rank == 'auto' else fields.integer('time_step_rank'),
    conv=fields.integer('conv_kernel'),
  )
  return dataclasses.replace(_mamba_common(fields, 'm'), mamba=mamba)


FAMILIES: dict[str, Callable[[_Fields], ModelConfig]] = {
  'llama': _llama,
  'nemotron': _nemotron,
  'nemotron_h': _nemotron_h,
  'mamba': _mamba,
  'mamba2': _mamba2,
}
