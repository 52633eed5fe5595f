"""The folder of a run becomes a Hugging Face folder: config.json, safetensors in shards, the tokenizer, and their SHA-256.

Parameters are read, turned and written one at a time; the folder is there when it is whole.
"""

import dataclasses
import hashlib
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import tqdm

from lmscale.config import Config, ModelConfig
from lmscale.data import atomic_folder
from lmscale.data.tokenizer import Tokenizer
from lmscale.errors import ConfigError
from lmscale.interop import mapping, tokenizer_folder
from lmscale.interop.huggingface_write import same_function, write_config
from lmscale.interop.importing import DTYPES
from lmscale.interop.shards import ToWrite, write_json, write_shards, write_sums
from lmscale.train.checkpoint import DamagedCheckpoint
from lmscale.train.model_folder import TOKENIZER, ModelFolder, open_model
from lmscale.train.streamed import Rows

SHARD = 5_000_000_000  # bytes: transformers' own choice for a long time


def export_model(
  source: str | pathlib.Path, target: str | pathlib.Path, dtype: str = '', shard_size: int = SHARD, vocab: int = 0,
  tokenizer: bool = True,
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
  """Makes `target`, a folder that transformers loads, of the model in `source`. Returns its config.json and lines for people.

  dtype: of all tensors, a key of `importing.DTYPES`; empty: as they are stored. shard_size: bytes of numbers in a file. vocab: rows of
  the embedding to keep, where it has more than the tokenizer ids; 0: all. tokenizer: write it along.

  Raises:
    ConfigError: no model, only damaged ones, one that no family of transformers can express, or a folder that cannot be written.
  """
  if dtype and dtype not in DTYPES:
    raise ConfigError(f'--dtype: {dtype!r} is not one of {", ".join(DTYPES)}')
  model, notes = open_model(source), []
  known = model.tokenizer is not None or not model.about
  words = tokenizer_folder.open_for(model.config, model.tokenizer) if tokenizer and known else None
  if not known:
    notes.append('no tokenizer: the model came without one')
  kept = _vocabulary(model.config, words, vocab, notes)
  values = _values(model, kept, words)
  target = pathlib.Path(target).expanduser().absolute()
  with tqdm.tqdm(unit='B', unit_scale=True, desc='exporting', disable=None) as bar:
    while True:
      try:
        atomic_folder.make(target, lambda folder: _write(folder, model, kept, dict(values), dtype, shard_size, words, bar))
        return values, [*model.notes, *notes]
      except DamagedCheckpoint as damage:
        model.pass_over(damage)


def _vocabulary(config: Config, words: Tokenizer | None, vocab: int, notes: list[str]) -> ModelConfig:
  """The model with as many rows of its vocabulary as are exported."""
  model, ids = config.model, words.size if words else 1
  if vocab and not ids <= vocab <= model.vocab:
    raise ConfigError(f'--vocab: {vocab}; the tokenizer has {ids} ids and the embedding {model.vocab} rows')
  if not vocab and words and ids < model.vocab:
    notes.append(
      f'vocab_size {model.vocab}: {model.vocab - ids} rows beyond the {ids} ids of the tokenizer are kept; --vocab={ids} cuts them'
    )
  return dataclasses.replace(model, vocab=vocab or model.vocab)


def _values(model: ModelFolder, kept: ModelConfig, words: Tokenizer | None) -> dict[str, Any]:
  """The config.json: the one it was imported with where that still says the same, else a new one."""
  given = model.about.get('config')
  if model.about.get('from') == 'huggingface' and isinstance(given, dict) and same_function(given, kept):
    return given
  return write_config(kept, model.config.train.seq_len, words.end if words else None)


def _write(
  folder: pathlib.Path, model: ModelFolder, kept: ModelConfig, values: dict[str, Any], dtype: str, shard_size: int,
  words: Tokenizer | None, bar: tqdm.tqdm,
) -> None:  # fmt: skip
  with model.rows() as rows:
    tensors = [_to_write(tensor, rows, dtype) for tensor in mapping.tensors(values['model_type'], kept)]
    bar.reset(sum(tensor.nbytes for tensor in tensors))
    sums = write_shards(folder, tensors, shard_size, bar.update)
  values['dtype'] = values['torch_dtype'] = tensors[0].dtype.name  # today's name and the older one
  sums['config.json'] = write_json(folder / 'config.json', values)
  if words is not None:
    _write_tokenizer(model, words, folder)
  others = [path for path in folder.iterdir() if path.name in tokenizer_folder.CARRIED]
  write_sums(folder, sums | {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in others})


def _write_tokenizer(model: ModelFolder, words: Tokenizer, folder: pathlib.Path) -> None:
  carried = model.path / TOKENIZER
  files = tuple(name for name in tokenizer_folder.CARRIED if (carried / name).is_file())
  if files:
    tokenizer_folder.carry(tokenizer_folder.Found(carried, files), folder)
  else:
    tokenizer_folder.write(model.config, words, folder)


def _to_write(tensor: mapping.Tensor, rows: Rows, dtype: str) -> ToWrite:
  kinds = {rows.dtypes[part.name] for part in tensor.parts}
  made = np.dtype(jnp.dtype(DTYPES[dtype])) if dtype else _one(kinds)

  def load() -> np.ndarray:
    parts = []
    for part in tensor.parts:
      array = part.to_theirs(rows.read(part.name))[: part.stored[0]]  # of a vocabulary that is cut, the first rows
      with np.errstate(over='ignore'):  # told below
        parts.append(array.astype(made, copy=False))
      if not np.isfinite(parts[-1]).all():
        raise ConfigError(f'{tensor.name}: a value of {part.name} is beyond {made}; export with --dtype=fp32')
    return parts[0] if len(parts) == 1 else np.concatenate(parts)

  return ToWrite(tensor.shape, made, load, tensor.name)


def _one(dtypes: set[np.dtype]) -> np.dtype:
  """The dtype that holds all of them; float64 becomes float32, which transformers computes in."""
  found = next(iter(dtypes))
  for other in dtypes:
    found = jnp.promote_types(found, other)
  return np.dtype(np.float32) if found == np.float64 else np.dtype(found)
