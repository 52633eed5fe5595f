"""Tiny configs and random batches shared by the tests."""

import dataclasses
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
  import jax

  found = []
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(reference), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    found.append((float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)), jax.tree_util.keystr(path)))
  return max(found)
