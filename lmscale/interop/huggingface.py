"""Hugging Face models as lmscale models: Llama, Nemotron, NemotronH, Mamba and Mamba-2, for the forward pass.

`read_config` turns the values of a `config.json` into a `ModelConfig`; `load_weights` turns the tensors of the same
model into the canonical parameter tree; `load` reads both from a folder. The mapping was written against transformers
5.23.0; older spellings of the same fields and names are accepted. A model either gives equal logits or is refused.

A block of Llama or Nemotron is two of our layers, attention and MLP. torch stores a linear map as [out, in] and a
convolution as [channels, 1, width]; we store [in, out] and [width, channels]. The packed input projections and
convolutions are cut into one matrix per part. Rotary positions rotate halves in both, so nothing is permuted.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lmscale.config import ModelConfig
from lmscale.errors import ConfigError
from lmscale.interop.folder import read_json, read_tensors
from lmscale.interop.huggingface_config import read_config

__all__ = ['load', 'load_weights', 'read_config']

PREFIXES = ('model.', 'backbone.')  # NemotronH: `model.` in memory, `backbone.` on disk
DERIVED = '.rotary_emb.inv_freq'  # a constant that older Llama files carry
SHOWN = 5  # names in an error line

Layer = dict[str, np.ndarray]
Params = dict[str, Any]


def load(folder: str | pathlib.Path) -> tuple[ModelConfig, Params]:
  """The model in `folder`: `config.json` with `model.safetensors` or its index. See `load_weights`."""
  folder = pathlib.Path(folder)
  values = read_json(folder / 'config.json')
  read_config(values)  # refuse before reading gigabytes
  return load_weights(read_tensors(folder), values)


def load_weights(tensors: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> tuple[ModelConfig, Params]:
  """The config and the canonical parameters (float32, see `models.model.param_specs`) of a transformers model.

  tensors: name -> array, as in the model's safetensors; a prefix `model.` or `backbone.` makes no difference. Every
  tensor is used exactly once. values: the parsed `config.json`.

  Raises:
    ConfigError: what `read_config` raises; tensors that are missing, left over, of a wrong shape or not finite.
  """
  config = read_config(values)
  names = FAMILIES[values['model_type']]
  source = _Tensors(tensors)
  tokens = source.take(f'{names.embed}.weight', (config.vocab, config.d_model))
  params: Params = {
    'embed': {'tokens': tokens},
    'layers': names.layers(source, config),
    'final_norm': _norm(source, names.final_norm, config),
  }
  if not config.tied:
    params['head'] = {'kernel': source.take('lm_head.weight', (config.vocab, config.d_model)).T}
  elif 'lm_head.weight' in source.left:
    head = source.take('lm_head.weight', (config.vocab, config.d_model))
    if not np.array_equal(head, tokens):
      raise ConfigError('tie_word_embeddings: true, but lm_head.weight differs from the embedding; set it to false')
  source.finish()
  return config, params


class _Tensors:
  """Gives out each tensor once and keeps account of what is missing and what is left."""

  def __init__(self, tensors: Mapping[str, np.ndarray]):
    self.left: dict[str, np.ndarray] = {}
    self.missing: list[str] = []
    for name, array in tensors.items():
      if name.endswith(DERIVED):
        continue
      short = name.removeprefix(next((p for p in PREFIXES if name.startswith(p)), ''))
      if short in self.left:
        raise ConfigError(f'weights: {short!r} occurs under two prefixes ({" and ".join(PREFIXES)})')
      self.left[short] = array

  def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor as float32. A missing one is noted, for `finish` to report with all others; its stand-in is tiny."""
    array = self.left.pop(name, None)
    if array is None:
      self.missing.append(name)
      return np.zeros([1] * len(shape), np.float32)
    if array.shape != shape:
      raise ConfigError(f'weights: {name} has shape {list(array.shape)}, but config.json gives {list(shape)}')
    array = np.asarray(array, np.float32)
    if not np.isfinite(array).all():
      raise ConfigError(f'weights: {name} has values that are not finite')
    return array

  def finish(self) -> None:
    """Raises one ConfigError if any tensor is missing or was not used."""
    parts = [
      f'{what} {_listed(names)}' for what, names in (('missing', self.missing), ('unused', self.left)) if names
    ]
    if parts:
      raise ConfigError(f'weights: the tensors do not fit config.json: {"; ".join(parts)}')


def _listed(names: list[str] | dict[str, Any]) -> str:
  shown = sorted(names)[:SHOWN]
  more = f' and {len(names) - len(shown)} more' if len(names) > len(shown) else ''
  return ', '.join(map(repr, shown)) + more


def _norm(source: _Tensors, name: str, config: ModelConfig) -> Layer:
  layer = {'norm_scale': source.take(f'{name}.weight', (config.d_model,))}
  if config.norm != 'rmsnorm':
    layer['norm_bias'] = source.take(f'{name}.bias', (config.d_model,))
  return layer


def _linear(source: _Tensors, name: str, ours: str, sizes: tuple[int, int], bias: bool) -> Layer:
  """The map `name` [out, in] as `<ours>_kernel` [in, out], with its bias. sizes: (in, out)."""
  layer = {f'{ours}_kernel': source.take(f'{name}.weight', sizes[::-1]).T}
  if bias:
    layer[f'{ours}_bias'] = source.take(f'{name}.bias', sizes[1:])
  return layer


def _attention(source: _Tensors, prefix: str, config: ModelConfig) -> Layer:
  c, d = config.attention, config.d_model
  heads, kv_heads = c.heads * c.head_dim, c.kv_heads * c.head_dim
  sizes = {'q': (d, heads), 'k': (d, kv_heads), 'v': (d, kv_heads), 'o': (heads, d)}
  layer: Layer = {}
  for name, size in sizes.items():
    layer |= _linear(source, f'{prefix}.{name}_proj', 'out' if name == 'o' else name, size, config.bias)
  return layer


def _mlp(source: _Tensors, prefix: str, config: ModelConfig) -> Layer:
  d, f = config.d_model, config.mlp.d_ff
  sizes = {'up': (d, f), 'down': (f, d)}
  if config.mlp.activation in ('swiglu', 'geglu'):
    sizes['gate'] = (d, f)
  layer: Layer = {}
  for name, size in sizes.items():
    layer |= _linear(source, f'{prefix}.{name}_proj', name, size, config.bias)
  return layer


def _mamba2(source: _Tensors, prefix: str, config: ModelConfig) -> Layer:
  """in_proj holds z, x, B, C, dt and the convolution x, B, C, in this order."""
  c, d = config.mamba2, config.d_model
  inner, grouped = c.heads * c.head_dim, c.groups * c.state
  conv = inner + 2 * grouped
  packed = source.take(f'{prefix}.in_proj.weight', (inner + conv + c.heads, d)).T
  ends = np.cumsum([inner, inner, grouped, grouped])
  names = ('z', 'x', 'B', 'C', 'dt')
  layer = {f'{n}_kernel': part for n, part in zip(names, np.split(packed, ends, axis=1), strict=True)}
  kernel = source.take(f'{prefix}.conv1d.weight', (conv, 1, c.conv))[:, 0].T
  bias = source.take(f'{prefix}.conv1d.bias', (conv,))
  ends = np.cumsum([inner, grouped])
  layer |= {f'conv_{n}_kernel': part for n, part in zip('xBC', np.split(kernel, ends, axis=1), strict=True)}
  layer |= {f'conv_{n}_bias': part for n, part in zip('xBC', np.split(bias, ends), strict=True)}
  layer |= {name: source.take(f'{prefix}.{name}', (c.heads,)) for name in ('dt_bias', 'A_log', 'D')}
  layer['gate_norm_scale'] = source.take(f'{prefix}.norm.weight', (inner,))
  return layer | _linear(source, f'{prefix}.out_proj', 'out', (inner, d), bias=False)


def _mamba(source: _Tensors, prefix: str, config: ModelConfig) -> Layer:
  """in_proj holds x, z; x_proj holds dt's low-rank input, B, C."""
  c, d = config.mamba, config.d_model
  packed = source.take(f'{prefix}.in_proj.weight', (2 * c.d_inner, d)).T
  return {
    'x_kernel': packed[:, : c.d_inner],
    'z_kernel': packed[:, c.d_inner :],
    'conv_kernel': source.take(f'{prefix}.conv1d.weight', (c.d_inner, 1, c.conv))[:, 0].T,
    'conv_bias': source.take(f'{prefix}.conv1d.bias', (c.d_inner,)),
    **_linear(source, f'{prefix}.x_proj', 'bcdt', (c.d_inner, c.dt_rank + 2 * c.state), bias=False),
    **_linear(source, f'{prefix}.dt_proj', 'dt', (c.dt_rank, c.d_inner), bias=True),
    'A_log': source.take(f'{prefix}.A_log', (c.d_inner, c.state)),
    'D': source.take(f'{prefix}.D', (c.d_inner,)),
    **_linear(source, f'{prefix}.out_proj', 'out', (c.d_inner, d), bias=False),
  }


def _blocks(source: _Tensors, config: ModelConfig) -> list[Layer]:
  """Llama and Nemotron: block i is our layers 2i (attention) and 2i + 1 (MLP)."""
  layers = []
  for i in range(len(config.layers) // 2):
    prefix = f'layers.{i}'
    layers += [
      _norm(source, f'{prefix}.input_layernorm', config) | _attention(source, f'{prefix}.self_attn', config),
      _norm(source, f'{prefix}.post_attention_layernorm', config) | _mlp(source, f'{prefix}.mlp', config),
    ]
  return layers


MIXERS = {'M': _mamba2, 'm': _mamba, '*': _attention, '-': _mlp}


def _mixers(source: _Tensors, config: ModelConfig) -> list[Layer]:
  """Mamba, Mamba-2 and NemotronH: layer i is our layer i."""
  return [
    _norm(source, f'layers.{i}.norm', config) | MIXERS[kind](source, f'layers.{i}.mixer', config)
    for i, kind in enumerate(config.layers)
  ]


@dataclasses.dataclass(frozen=True)
class _Names:
  """What a family calls its embedding and final norm, and how it arranges its layers."""

  embed: str
  final_norm: str
  layers: Callable[[_Tensors, ModelConfig], list[Layer]]


FAMILIES = {
  'llama': _Names('embed_tokens', 'norm', _blocks),
  'nemotron': _Names('embed_tokens', 'norm', _blocks),
  'nemotron_h': _Names('embeddings', 'norm_f', _mixers),
  'mamba': _Names('embeddings', 'norm_f', _mixers),
  'mamba2': _Names('embeddings', 'norm_f', _mixers),
}
