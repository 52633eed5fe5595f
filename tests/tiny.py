"""Tiny configs and random batches shared by the tests."""

import dataclasses
import zlib
from typing import Any

import numpy as np

from lmscale.config import (
  AttentionConfig,
  Config,
  Mamba2Config,
  MambaConfig,
  MeshConfig,
  MLPConfig,
  ModelConfig,
  TrainConfig,
)

# Eight heads for tensor = 8; two groups and two KV heads, which tensor = 4 and 8 do not divide.
MODEL = ModelConfig(
  pattern='M-M-m*',
  d_model=16,
  vocab=40,
  positions='rope',
  attention=AttentionConfig(heads=8, kv_heads=2, head_dim=4),
  mlp=MLPConfig(d_ff=32, activation='swiglu'),
  mamba2=Mamba2Config(heads=8, head_dim=4, groups=2, state=4, conv=4, chunk=8),
  mamba=MambaConfig(d_inner=32, state=4, dt_rank=3, conv=4, chunk=4),
  init_std=0.3,
)

ONE = MeshConfig(1, 1, 1, 0)


def config(mesh: MeshConfig = ONE, model: ModelConfig = MODEL, **train: Any) -> Config:
  """A resolved config of 16 sequences of 16 tokens per step."""
  values = {'steps': 3, 'batch': 16, 'seq_len': 16, 'microbatch': 1, 'loss_chunk': 8} | train
  return Config(model=model, mesh=mesh, train=TrainConfig(**values))


def change(value: Any, **fields: Any) -> Any:
  return dataclasses.replace(value, **fields)


class Rows:
  """Random packed rows: documents of varying length, some padding at the end, ignored labels at document ends."""

  def __init__(self, seq_len: int = 16, vocab: int = 40, seed: int = 0, samples: int = 64):
    random = np.random.default_rng(seed)
    tokens = random.integers(0, vocab, (samples, seq_len + 1)).astype(np.int32)
    self.arrays = {name: np.zeros((samples, seq_len), np.int32) for name in ('segment_ids', 'positions')}
    self.arrays['tokens'] = tokens[:, :-1]
    self.arrays['labels'] = tokens[:, 1:].copy()
    for row in range(samples):
      start, segment = 0, 1
      stop = seq_len - random.integers(0, 3)
      while start < stop:
        end = min(stop, start + int(random.integers(1, seq_len)))
        self.arrays['segment_ids'][row, start:end] = segment
        self.arrays['positions'][row, start:end] = np.arange(end - start)
        self.arrays['labels'][row, end - 1] = -1
        start, segment = end, segment + 1
      self.arrays['labels'][row, stop:] = -1

  def batch(self, first_sample: int, rows: range) -> dict[str, np.ndarray]:
    return {name: values[first_sample + rows.start : first_sample + rows.stop] for name, values in self.arrays.items()}


def worst(tree: Any, reference: Any) -> tuple[float, str]:
  """The largest max|a - b| / max|b| over leaves, and the leaf it was found in."""
  return max((error, leaf) for leaf, error in errors(tree, reference).items())


def errors(tree: Any, reference: Any) -> dict[str, float]:
  """max|a - b| / max|b| of each leaf."""
  import jax

  found = {}
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(reference), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    found[jax.tree_util.keystr(path)] = float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
  return found


def state(program: Any, seed: int = 0) -> Any:
  """A training state with random parameters, equal for every mesh and stacking. (What `program.init` does takes seconds to compile.)"""
  import jax

  from lmscale.train.stored import canonical_names, is_stacked, named, nested

  def leaf(path: str, like: Any) -> Any:
    if not path.startswith('params/'):
      return jax.device_put(np.full(like.shape, -1 if path == 'norms' else 0, like.dtype), like.sharding)
    stacked = is_stacked(path, program.index)
    shape = like.shape[stacked:]
    rows = [_values(program.config.model, name, shape, seed) if name else np.zeros(shape) for name in canonical_names(path, program.index)]
    return jax.device_put((np.stack(rows) if stacked else rows[0]).astype(like.dtype), like.sharding)

  return program.from_stored(nested({path: leaf(path, like) for path, like in named(program.abstract_stored()).items()}))


def _values(model: ModelConfig, name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
  """float32, of the size that the parameter of this canonical name has at the start of a run."""
  random = np.random.default_rng([seed, zlib.crc32(name.encode())])
  last = name.rpartition('/')[2]
  normal = random.normal(size=shape)
  if last == 'A_log':
    values = np.log(random.uniform(1, 16, shape))
  elif last == 'dt_bias':
    values = np.log(np.expm1(np.exp(random.uniform(np.log(1e-3), np.log(1e-1), shape))))
  elif last == 'D' or last.endswith('scale'):
    values = 1 + 0.1 * normal
  elif last.endswith('bias'):
    values = 0.1 * normal
  elif last.startswith('conv'):
    values = random.uniform(-0.5, 0.5, shape)
  else:
    values = model.init_std * normal / (np.sqrt(len(model.layers)) if last in ('out_kernel', 'down_kernel') else 1)
  return values.astype(np.float32)
