"""A Hugging Face folder becomes the folder of a run: tensor by tensor, whole or not at all.

Everything that can be refused is refused from headers and JSON before the first number is read; each parameter is then read,
turned and written by itself, so memory holds a few copies of the largest one.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
import tqdm

from lmscale.config import Config, ModelConfig
from lmscale.errors import ConfigError
from lmscale.interop import tokenizer_folder
from lmscale.interop.folder import check_sums, inside, open_tensors, read_json
from lmscale.interop.huggingface import match
from lmscale.interop.huggingface_config import read_config_with_notes
from lmscale.models import model as model_lib
from lmscale.train.model_folder import TOKENIZER, write_model
from lmscale.train.streamed import Pending

DTYPES = {'fp32': 'float32', 'bf16': 'bfloat16', 'fp16': 'float16'}
LARGEST_ABOUT = 1 << 20  # characters of a config.json that is kept with the model
NO_TOKENIZER = 'no tokenizer: data.tokenizer is bytes, which is not what the model was trained with'


class Source(Protocol):
  """Where a parameter of ours comes from."""

  shape: tuple[int, ...]
  dtype: np.dtype

  def read(self, dtype: Any = None) -> np.ndarray:
    """Our parameter, in the dtype that is stored or in `dtype`."""


def import_model(
  source: str | pathlib.Path, target: str | pathlib.Path, dtype: str = '', dt_min: float | None = None, tokenizer: bool = True,
  end_token: str = '',
) -> tuple[Config, list[str]]:  # fmt: skip
  """Makes `target`, the folder of a run, of the transformers model in `source`. Returns its config and lines for people.

  dtype: of the matrices, a key of DTYPES; empty: as they are (float64 becomes float32). Norms, decays and other parameters that
  are never computed in half precision stay as they are, or become float32. dt_min: of Mamba-2 in place of what config.json says.
  tokenizer: carry it along and use it; end_token: see `data.end_token`.

  Raises:
    ConfigError: a model that lmscale cannot compute, files that are missing, damaged or not plain data, or a folder that cannot
      be written.
  """
  source, target = pathlib.Path(source).expanduser(), pathlib.Path(target).expanduser()
  tensors = open_tensors(source)
  values = read_json(inside(source, 'config.json'))
  model, notes = read_config_with_notes(values, dt_min)
  sources = match(tensors, values['model_type'], model)
  words = tokenizer_folder.find(source, model.vocab, end_token) if tokenizer else tokenizer_folder.Found(source, ())
  sums = _check(source, ['config.json', *words.files, *sorted({stored.path.name for stored in tensors.values()})])
  kept = values if len(json.dumps(values)) <= LARGEST_ABOUT else {}
  about = {'from': 'huggingface', 'family': values['model_type'], 'config': kept, 'sha256': sums}
  config = _config(target, Config(model=model), words, end_token)
  _write(target, config, sources, dtype, about, words)
  if not words.name:
    notes.append(NO_TOKENIZER)
  return config, notes


def write_sources(
  target: str | pathlib.Path, config: Config, sources: Mapping[str, Source], dtype: str, about: dict[str, Any], tokenizer: str,
  notes: list[str],
) -> tuple[Config, list[str]]:  # fmt: skip
  """The end of an import of another kind: writes `target` with the tokenizer in the file of that name, if any.

  Returns (the folder's config, notes and more lines). Raises ConfigError as `import_model`.
  """
  target = pathlib.Path(target).expanduser()
  words = tokenizer_folder.Found(target, ())
  if tokenizer:
    words = tokenizer_folder.find_file(pathlib.Path(tokenizer).expanduser(), config.model.vocab, config.data.end_token)
  config = _config(target, config, words, config.data.end_token)
  _write(target, config, sources, dtype, about, words)
  return config, notes if words.name else [*notes, NO_TOKENIZER]


def _write(
  target: pathlib.Path, config: Config, sources: Mapping[str, Source], dtype: str, about: dict[str, Any], words: tokenizer_folder.Found
) -> None:
  dtypes = _dtypes(sources, config.model, dtype)
  total = sum(math.prod(source.shape) * dtypes[name].itemsize for name, source in sources.items())
  with tqdm.tqdm(total=total, unit='B', unit_scale=True, desc='importing', disable=None) as bar:
    write_model(
      target, config, _leaves(sources, dtypes, bar), about, words.tokenizer and words.tokenizer.identity,
      beside=lambda folder: tokenizer_folder.carry(words, folder / TOKENIZER),
    )  # fmt: skip


def _check(source: pathlib.Path, names: Sequence[str]) -> dict[str, str]:
  size = sum((source / name).stat().st_size for name in names)
  with tqdm.tqdm(total=size, unit='B', unit_scale=True, desc='checking', disable=None) as bar:
    return check_sums(source, names, bar.update)


def _config(target: pathlib.Path, config: Config, words: tokenizer_folder.Found, end_token: str) -> Config:
  """The config of the folder: `config` under its name, with its tokenizer."""
  name = words.name or 'bytes'
  path = name if name == 'bytes' else str(target.absolute() / TOKENIZER / name)
  data = dataclasses.replace(config.data, tokenizer=path, end_token=end_token if path != 'bytes' else '')
  return dataclasses.replace(config, name=''.join(c for c in target.name if c.isprintable()) or 'model', data=data)


def _dtypes(sources: Mapping[str, Source], model: ModelConfig, dtype: str) -> dict[str, np.dtype]:
  """The dtype of each parameter, the same for a name in all layers of a kind."""
  if dtype and dtype not in DTYPES:
    raise ConfigError(f'--dtype: {dtype!r} is not one of {", ".join(DTYPES)}')
  specs = model_lib.param_specs(model)
  groups: dict[tuple[str, ...], list[str]] = {}
  for name in sources:
    first, *_, leaf = name.split('/')
    groups.setdefault((model.layers[int(name.split('/')[1])], leaf) if first == 'layers' else (name,), []).append(name)
  found = {}
  for names in groups.values():
    kept = jnp.float32 if jnp.float64 in (kinds := {sources[n].dtype for n in names}) else _widest(kinds)
    if dtype:
      full = _spec(specs, names[0]).full_precision
      kept = jnp.promote_types(kept, DTYPES[dtype]) if full else DTYPES[dtype]
    found |= dict.fromkeys(names, np.dtype(jnp.dtype(kept)))
  return found


def _widest(dtypes: Iterable[np.dtype]) -> Any:
  first, *rest = dtypes
  for other in rest:
    first = jnp.promote_types(first, other)
  return first


def _spec(specs: dict[str, Any], name: str) -> Any:
  part, *rest = name.split('/')
  return specs['layers'][int(rest[0])][rest[1]] if part == 'layers' else specs[part][rest[0]]


def _leaves(sources: Mapping[str, Source], dtypes: dict[str, np.dtype], bar: tqdm.tqdm) -> dict[str, Pending]:

  def pending(name: str, source: Source) -> Pending:
    def load() -> np.ndarray:
      array = source.read(dtypes[name])
      bar.update(array.nbytes)
      return array

    return Pending(source.shape, dtypes[name], load)

  return {f'params/{name}': pending(name, source) for name, source in sources.items()}
