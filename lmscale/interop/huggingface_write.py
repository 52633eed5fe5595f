"""A `ModelConfig` as the config.json of a transformers model: which family can express it, and in which words.

A family is taken where reading its words back (`huggingface_config`) gives the same function, else it is refused with the
reason. Fields have today's names; older ones beside them where that is harmless.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from lmscale.config import Config, ModelConfig
from lmscale.errors import ConfigError
from lmscale.interop.huggingface_config import ACTIVATIONS, GATED_ACTIVATIONS, NEMOTRON_H_KINDS, read_config
from lmscale.interop.huggingface_rope import with_plain_base, write_rope
from lmscale.train.changes import NO_FUNCTION, changed, unused_fields

ARCHITECTURES = {
  'llama': 'LlamaForCausalLM', 'nemotron': 'NemotronForCausalLM', 'nemotron_h': 'NemotronHForCausalLM', 'bamba': 'BambaForCausalLM',
  'mamba': 'MambaForCausalLM', 'mamba2': 'Mamba2ForCausalLM',
}  # fmt: skip
NO_FLOOR = 1e-12  # NemotronH raises dt to time_step_min, whose logarithm it takes when it is initialised

Values = dict[str, Any]


def write_config(model: ModelConfig, length: int, end: int | None = None) -> Values:
  """The values of a `config.json`, JSON alone, whose model computes what `model` does.

  length: what to give as `max_position_embeddings`. end: the id that ends a document, None if there is none.

  Raises:
    ConfigError: no family of transformers has such a model; the line has the reason of each that comes near.
  """
  reasons = []
  for family, (fits, write) in FAMILIES.items():
    if (reason := fits(model)) is None:
      values = {**_common(family, model, length, end), **write(model)}
      if same_function(values, model):
        return values
      reason = 'its config.json cannot say that'
    if reason:
      reasons.append(f'{family}: {reason}')
  raise ConfigError(f'no family of transformers has this model; {"; ".join(reasons) or _kinds(model)}')


def same_function(values: Mapping[str, Any], model: ModelConfig) -> bool:
  """Whether these values of a config.json are of a model that computes what `model` does."""
  try:
    found = read_config(values)
  except ConfigError:
    return False
  old, new = Config(model=found), Config(model=with_plain_base(model))
  return found.layers == model.layers and not changed(old, new, ('model.',), but=(*NO_FUNCTION, *unused_fields(old, new)))


def _kinds(model: ModelConfig) -> str:
  kinds = ', '.join(sorted(set(model.layers)))
  return f'model.pattern: none has layers of the kinds {kinds} in the order {model.layers[:40]}'


def _common(family: str, model: ModelConfig, length: int, end: int | None) -> Values:
  return {
    'architectures': [ARCHITECTURES[family]],
    'model_type': family,
    'vocab_size': model.vocab,
    'hidden_size': model.d_model,
    'max_position_embeddings': length,
    'tie_word_embeddings': model.tied,
    'initializer_range': model.init_std,
    'bos_token_id': None,
    'eos_token_id': end,
    'pad_token_id': None,
    'use_cache': True,
  }


# What a family lacks: a reason, '' where its layers are others altogether, or None where it fits.


def _blocks(model: ModelConfig, mixers: str) -> bool:
  layers = model.layers
  return len(layers) % 2 == 0 and set(layers[::2]) <= set(mixers) and set(layers[1::2]) == {'-'}


def _lacks(*pairs: tuple[bool, str]) -> str | None:
  return next((reason for lacks, reason in pairs if lacks), None)


def _norm(model: ModelConfig, wanted: str) -> tuple[bool, str]:
  return model.norm != wanted, f'model.norm: {model.norm}; it has {wanted}'


def _activation(model: ModelConfig, known: Mapping[str, str]) -> tuple[bool, str]:
  given = model.mlp.activation
  return given not in known.values(), f'model.mlp.activation: {given}; it has {", ".join(dict.fromkeys(known.values()))}'


def _positions(model: ModelConfig, wanted: str) -> tuple[bool, str]:
  return model.positions != wanted, f'model.positions: {model.positions}; it has {wanted}'


def _no_table(model: ModelConfig) -> tuple[bool, str]:
  return model.positions == 'learned', 'model.positions: learned; it has no position table'


def _fits_llama(model: ModelConfig) -> str | None:
  if not _blocks(model, '*'):
    return ''
  heads = model.attention.heads
  return _lacks(
    _norm(model, 'rmsnorm'), _positions(model, 'rope'), _activation(model, GATED_ACTIVATIONS),
    (model.rope_fraction != 1, f'model.rope_fraction: {model.rope_fraction:g}; it rotates whole heads'),
    (model.d_model % heads != 0, f'model.attention.heads: {heads} does not divide model.d_model {model.d_model}'),
  )  # fmt: skip


def _fits_nemotron(model: ModelConfig) -> str | None:
  if not _blocks(model, '*'):
    return ''
  return _lacks(_norm(model, 'layernorm1p'), _positions(model, 'rope'), _activation(model, ACTIVATIONS))


def _fits_bamba(model: ModelConfig) -> str | None:
  if not _blocks(model, 'M*') or 'M' not in model.layers:
    return ''
  return _lacks(
    _norm(model, 'rmsnorm'), _activation(model, GATED_ACTIVATIONS), _no_table(model),
    ('*' in model.layers and model.positions != 'rope', f'model.positions: {model.positions}; it has rope'), _expands(model),
  )  # fmt: skip


def _fits_nemotron_h(model: ModelConfig) -> str | None:
  if 'm' in model.layers:
    return ''
  return _lacks(
    _norm(model, 'rmsnorm'), _no_table(model),
    ('*' in model.layers and model.positions != 'none', f'model.positions: {model.positions}; its attention has none'),
    _activation(model, ACTIVATIONS) if '-' in model.layers else (False, ''),
    (model.tied, 'model.tied: true; it never ties'),
    (model.bias and set(model.layers) != {'M'}, 'model.bias: true; its attention has no biases'),
    ('M' in model.layers and model.mamba2.dt_max > 0, f'model.mamba2.dt_max: {model.mamba2.dt_max:g}; it has no upper limit of dt'),
  )  # fmt: skip


def _fits_mamba(model: ModelConfig) -> str | None:
  if set(model.layers) != {'m'}:
    return ''
  c = model.mamba
  return _lacks(
    _norm(model, 'rmsnorm'), _no_table(model),
    (c.d_inner % model.d_model != 0, f'model.mamba.d_inner: {c.d_inner} is no multiple of model.d_model {model.d_model}'),
  )  # fmt: skip


def _fits_mamba2(model: ModelConfig) -> str | None:
  if set(model.layers) != {'M'}:
    return ''
  return _lacks(_norm(model, 'rmsnorm'), _no_table(model), _expands(model))


def _expands(model: ModelConfig) -> tuple[bool, str]:
  inner = model.mamba2.heads * model.mamba2.head_dim
  return inner % model.d_model != 0, f'model.mamba2: heads * head_dim = {inner} is no multiple of model.d_model {model.d_model}'


# How a family says it.


def _limits(model: ModelConfig) -> Values:
  """Nothing where dt has no limits: transformers' default, which JSON has no literal for."""
  c = model.mamba2
  if not c.dt_min and not c.dt_max:
    return {}
  return {'time_step_limit': [c.dt_min, c.dt_max or {'__float__': 'Infinity'}]}


def _attention(model: ModelConfig) -> Values:
  c = model.attention
  return {'num_attention_heads': c.heads, 'num_key_value_heads': c.kv_heads, 'head_dim': c.head_dim, 'attention_dropout': 0.0}


def _biases(model: ModelConfig) -> Values:
  return {'attention_bias': model.bias, 'mlp_bias': model.bias}


def _spelled(ours: str, known: Mapping[str, str], preferred: str = '') -> str:
  names = [name for name, value in known.items() if value == ours]
  return preferred if preferred in names else names[0]


def _transformer(model: ModelConfig) -> Values:
  blocks = {'num_hidden_layers': len(model.layers) // 2, 'intermediate_size': model.mlp.d_ff}
  return {**blocks, **_attention(model), **_biases(model), **write_rope(model)}


def _llama(model: ModelConfig) -> Values:
  return {**_transformer(model), 'hidden_act': _spelled(model.mlp.activation, GATED_ACTIVATIONS), 'rms_norm_eps': model.norm_eps}


def _nemotron(model: ModelConfig) -> Values:
  activation = _spelled(model.mlp.activation, ACTIVATIONS, 'gelu_pytorch_tanh')
  return {**_transformer(model), 'hidden_act': activation, 'norm_eps': model.norm_eps}


def _bamba(model: ModelConfig) -> Values:
  c = model.mamba2
  return {
    **_llama(model),
    'attn_layer_indices': [i for i, kind in enumerate(model.layers[::2]) if kind == '*'],
    'mamba_n_heads': c.heads,
    'mamba_d_head': c.head_dim,
    'mamba_n_groups': c.groups,
    'mamba_d_state': c.state,
    'mamba_d_conv': c.conv,
    'mamba_expand': c.heads * c.head_dim // model.d_model,
    'mamba_conv_bias': True,
    'mamba_proj_bias': False,
    **_limits(model),
  }


def _nemotron_h(model: ModelConfig) -> Values:
  c, kinds = model.mamba2, {symbol: name for name, symbol in reversed(NEMOTRON_H_KINDS.items())}
  floor = c.dt_min if 'M' in model.layers and c.dt_min else NO_FLOOR
  return {
    'layers_block_type': [kinds[kind] for kind in model.layers],
    'hybrid_override_pattern': model.layers,
    'num_hidden_layers': len(model.layers),
    'intermediate_size': model.mlp.d_ff,
    'mlp_hidden_act': _spelled(model.mlp.activation, ACTIVATIONS, 'gelu_pytorch_tanh') if '-' in model.layers else 'relu2',
    'layer_norm_epsilon': model.norm_eps,
    **_attention(model),
    'attention_bias': False,
    'mlp_bias': False,
    'use_bias': False,
    'mamba_num_heads': c.heads,
    'mamba_head_dim': c.head_dim,
    'n_groups': c.groups,
    'ssm_state_size': c.state,
    'conv_kernel': c.conv,
    'use_conv_bias': True,
    'mamba_hidden_act': 'silu',
    'time_step_min': floor,
    **_limits(model),
  }


def _mamba_common(model: ModelConfig) -> Values:
  return {
    'num_hidden_layers': len(model.layers),
    'layer_norm_epsilon': model.norm_eps,
    'use_bias': False,
    'use_conv_bias': True,
    'hidden_act': 'silu',
    'residual_in_fp32': True,
  }


def _mamba(model: ModelConfig) -> Values:
  c = model.mamba
  return {
    **_mamba_common(model),
    'state_size': c.state,
    'expand': c.d_inner // model.d_model,
    'intermediate_size': c.d_inner,
    'conv_kernel': c.conv,
    'time_step_rank': c.dt_rank,
  }


def _mamba2(model: ModelConfig) -> Values:
  c = model.mamba2
  return {
    **_mamba_common(model),
    'num_heads': c.heads,
    'head_dim': c.head_dim,
    'n_groups': c.groups,
    'state_size': c.state,
    'conv_kernel': c.conv,
    'expand': math.ceil(c.heads * c.head_dim / model.d_model),
    **_limits(model),
  }


FAMILIES: dict[str, tuple[Callable[[ModelConfig], str | None], Callable[[ModelConfig], Values]]] = {
  'mamba': (_fits_mamba, _mamba),
  'mamba2': (_fits_mamba2, _mamba2),
  'llama': (_fits_llama, _llama),
  'nemotron': (_fits_nemotron, _nemotron),
  'bamba': (_fits_bamba, _bamba),
  'nemotron_h': (_fits_nemotron_h, _nemotron_h),
}
