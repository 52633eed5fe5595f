"""Hugging Face models as lmscale models, tensor by tensor: Llama, Nemotron, NemotronH, Bamba, Mamba and Mamba-2.

`read_config` turns the values of a `config.json` into a `ModelConfig`; `match` finds for each of our parameters the rows of
their tensors that hold it (`mapping` is the table); `load_weights` and `load` make the whole canonical tree of it, in memory.
Written against transformers 5.23.0; older spellings of the same fields and names are accepted. A model either gives equal
logits or is refused.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lmscale.config import ModelConfig
from lmscale.errors import ConfigError
from lmscale.interop import mapping
from lmscale.interop.folder import Stored, open_tensors, read_json
from lmscale.interop.huggingface_config import read_config, read_config_with_notes

__all__ = ['load', 'load_weights', 'match', 'read_config']

DERIVED = '.rotary_emb.inv_freq'  # a constant that older Llama files carry
HEAD, BLOCK = 'lm_head.weight', 64 << 20  # bytes of two tensors compared at a time
SHOWN = 5  # names in an error line

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Source:
  """Where a parameter comes from: rows start..stop-1 of a tensor of theirs, called `name`, in the form that `part` says."""

  name: str
  part: mapping.Part
  stored: Stored
  start: int
  stop: int

  @property
  def shape(self) -> tuple[int, ...]:
    return self.part.shape

  @property
  def dtype(self) -> np.dtype:
    return self.stored.dtype

  def read(self, dtype: Any = None) -> np.ndarray:
    """Our parameter, in the dtype that is stored or in `dtype`."""
    rows = self.part.to_ours(self.stored.read(self.start, self.stop))
    return np.ascontiguousarray(rows, dtype)


def load(folder: str | pathlib.Path, dt_min: float | None = None) -> tuple[ModelConfig, Params]:
  """The model in `folder`: `config.json` with `model.safetensors` or its index. See `load_weights` and `read_config_with_notes`."""
  folder = pathlib.Path(folder)
  values = read_json(folder / 'config.json')
  config, _ = read_config_with_notes(values, dt_min)  # refuse before reading gigabytes
  return config, _whole(match(open_tensors(folder), values['model_type'], config))


def load_weights(tensors: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> tuple[ModelConfig, Params]:
  """The config and the canonical parameters (float32, see `models.model.param_specs`) of a transformers model.

  tensors: name -> array, as in the model's safetensors; a prefix `model.` or `backbone.` makes no difference. Every
  tensor is used exactly once. values: the parsed `config.json`.

  Raises:
    ConfigError: what `read_config` raises; tensors that are missing, left over, of a wrong shape or not finite.
  """
  config = read_config(values)
  return config, _whole(match({name: _InMemory(array) for name, array in tensors.items()}, values['model_type'], config))


def match(tensors: Mapping[str, Stored], family: str, config: ModelConfig) -> dict[str, Source]:
  """{canonical name of a parameter, `layers/3/q_kernel`: where it comes from}. Uses every tensor exactly once.

  Raises:
    ConfigError: tensors that are missing, left over, of a wrong shape, or a head that is not the embedding it is tied to.
  """
  left = _short_names(tensors)
  found, missing, embedding = {}, [], None
  for tensor in mapping.tensors(family, config):
    name = _short(tensor.name)
    stored = left.pop(name, None)
    if stored is None:
      missing.append(name)
      continue
    if stored.shape != tensor.shape:
      raise ConfigError(f'weights: {name} has shape {list(stored.shape)}, but config.json gives {list(tensor.shape)}')
    embedding = embedding or stored  # the first of the table
    found |= {part.name: Source(name, part, stored, start, stop) for part, start, stop in tensor.rows}
  if config.tied and HEAD in left and embedding is not None:
    _check_tied(left.pop(HEAD), embedding)
  parts = [f'{what} {_listed(names)}' for what, names in (('missing', missing), ('unused', left)) if names]
  if parts:
    raise ConfigError(f'weights: the tensors do not fit config.json: {"; ".join(parts)}')
  return found


class _InMemory:
  """An array with the interface of `Stored`."""

  def __init__(self, array: np.ndarray):
    self.array, self.shape, self.dtype = array, array.shape, array.dtype

  def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
    return self.array[start:stop]


def _whole(sources: dict[str, Source]) -> Params:
  """The canonical tree, in float32."""
  params: Params = {'layers': []}
  for name, source in sources.items():
    array = source.read(np.float32)
    if not np.isfinite(array).all():
      raise ConfigError(f'weights: {source.name} has values that are not finite')
    *parents, leaf = name.split('/')
    if parents[0] == 'layers':
      index = int(parents[1])
      params['layers'] += [{} for _ in range(index + 1 - len(params['layers']))]
      params['layers'][index][leaf] = array
    else:
      params.setdefault(parents[0], {})[leaf] = array
  return params


def _short(name: str) -> str:
  return name.removeprefix(next((p for p in mapping.PREFIXES if name.startswith(p)), ''))


def _short_names(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
  left: dict[str, Stored] = {}
  for name, stored in tensors.items():
    if name.endswith(DERIVED):
      continue
    if _short(name) in left:
      raise ConfigError(f'weights: {_short(name)!r} occurs under two prefixes ({" and ".join(mapping.PREFIXES)})')
    left[_short(name)] = stored
  return left


def _check_tied(head: Stored, embedding: Stored) -> None:
  rows = max(BLOCK // (4 * max(embedding.shape[1], 1)), 1)
  for start in range(0, embedding.shape[0], rows):
    a, b = (np.asarray(t.read(start, start + rows), np.float32) for t in (head, embedding))
    if not np.array_equal(a, b):
      raise ConfigError('tie_word_embeddings: true, but lm_head.weight differs from the embedding; set it to false')


def _listed(names: list[str] | dict[str, Any]) -> str:
  shown = sorted(names)[:SHOWN]
  more = f' and {len(names) - len(shown)} more' if len(names) > len(shown) else ''
  return ', '.join(text if len(text := repr(name)) <= 100 else f'{text[:97]}...' for name in shown) + more
