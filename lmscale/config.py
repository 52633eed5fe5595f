"""The typed, validated view of a config.

A recipe in `configs/` is an `ml_collections.ConfigDict` made from the dataclasses below (`to_config_dict`),
changed, and overridden on the command line. `from_dict` turns it back into frozen dataclasses and rejects nonsense
before any work is done: each mistake is one `ConfigError` line that names the field and shows the arithmetic.
This module imports neither JAX nor Flax.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from typing import Any

import ml_collections

LAYER_KINDS = {'M': 'Mamba-2', 'm': 'Mamba', '*': 'attention', '-': 'MLP'}


class ConfigError(ValueError):
  """A mistake of the user's: one line that names the field, the arithmetic and what to do."""


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Causal self-attention: `kv_heads` equal to `heads` is MHA, 1 is MQA, anything between is GQA."""

  heads: int = 4
  kv_heads: int = 4
  head_dim: int = 32


@dataclasses.dataclass(frozen=True)
class MLPConfig:
  d_ff: int = 512
  activation: str = 'gelu'  # gelu (erf) | gelu_tanh | relu2 | swiglu | geglu


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
  """Mamba-2 mixer (arXiv 2405.21060): d_inner = heads * head_dim; heads / groups heads share one B and C."""

  heads: int = 8
  head_dim: int = 32
  groups: int = 2
  state: int = 32
  conv: int = 4
  chunk: int = 64  # tokens per SSD chunk


@dataclasses.dataclass(frozen=True)
class MambaConfig:
  """Mamba-1 mixer (arXiv 2312.00752)."""

  d_inner: int = 256
  state: int = 16
  dt_rank: int = 8
  conv: int = 4
  chunk: int = 32  # tokens per selective-scan chunk


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A language model: `pattern` is the single source of depth and layer kinds.

  One symbol is one layer with its own pre-norm and residual: `M` Mamba-2, `m` Mamba-1, `*` attention, `-` MLP;
  `|` marks an explicit pipeline cut. A Transformer block is `*-`.
  """

  pattern: str = 'M-M*-'
  d_model: int = 128
  vocab: int = 264  # rows of the embedding; at least the tokenizer's size
  norm: str = 'rmsnorm'  # rmsnorm | layernorm | layernorm1p
  norm_eps: float = 1e-5
  positions: str = 'none'  # none | rope | learned
  max_positions: int = 0  # rows of the learned position table; 0 unless positions is learned
  rope_fraction: float = 1.0
  rope_base: float = 10000.0
  bias: bool = False  # biases on the linear maps of attention and MLP
  tied: bool = False  # the output head is the transposed embedding
  init_std: float = 0.02
  attention: AttentionConfig = AttentionConfig()
  mlp: MLPConfig = MLPConfig()
  mamba2: Mamba2Config = Mamba2Config()
  mamba: MambaConfig = MambaConfig()

  @property
  def layers(self) -> str:
    """The pattern without pipeline cuts: one symbol per layer."""
    return self.pattern.replace('|', '')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """The named mesh. `data` = -1 takes the devices that pipe and tensor leave."""

  pipe: int = 1
  data: int = -1
  tensor: int = 1
  zero: int = 1  # 0 replicated, 1 optimizer and master, 2 gradients too, 3 parameters too
  sequence_parallel: bool = False

  @property
  def size(self) -> int:
    return self.pipe * self.data * self.tensor


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with a token-indexed schedule. All token counts are tokens consumed, not steps."""

  schedule: str = 'cosine'  # cosine | wsd | constant
  learning_rate: float = 1e-3
  min_learning_rate: float = 1e-4
  warmup_tokens: int = 0
  decay_tokens: int = 0  # where the decay ends; 0: at the end of the run
  wsd_decay_tokens: int = 0  # length of the final linear decay of wsd
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip: float = 1.0  # global norm; 0 switches clipping off


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  steps: int = 100
  batch: int = 8  # sequences per step, over the whole mesh (the final size of a ramp)
  seq_len: int = 256
  microbatch: int = 1  # sequences per data rank in one forward pass
  ramp_start: int = 0  # first batch size of a linear ramp; 0: no ramp
  ramp_increment: int = 0
  ramp_tokens: int = 0
  compute_dtype: str = 'float32'  # float32 | bfloat16 | float64
  grad_dtype: str = 'float32'  # dtype in which gradients are accumulated and reduced
  remat: str = 'full'  # none | selective | full
  stack: str = 'runs'  # runs | unrolled
  loss_chunk: int = 1024  # tokens of one data rank whose logits exist at a time
  nonfinite_budget: int = 5  # skipped steps after which the run stops


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """One text source and its share of the blend."""

  name: str = 'code'
  kind: str = 'stdlib'  # stdlib | text | jsonl
  path: str = 'code'  # stdlib: code or prose; otherwise a file, a folder or a glob
  weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
  sources: tuple[SourceConfig, ...] = (SourceConfig(),)
  tokenizer: str = 'bytes'
  cache: str = ''  # folder of the token cache; empty: ~/.cache/lmscale
  validation: float = 0.02  # share of files held out, chosen by the hash of their content


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """How often the loop does something beside stepping, in steps. 0 switches it off."""

  log_every: int = 1
  eval_every: int = 100
  eval_samples: int = 32  # sequences of the validation stream
  checkpoint_every: int = 100
  keep: int = 3  # checkpoints kept
  sample_every: int = 0
  sample_tokens: int = 200
  sample_prompt: str = 'def '
  temperature: float = 0.8


@dataclasses.dataclass(frozen=True)
class Config:
  """A complete recipe."""

  name: str = 'run'
  seed: int = 0
  model: ModelConfig = ModelConfig()
  mesh: MeshConfig = MeshConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  train: TrainConfig = TrainConfig()
  data: DataConfig = DataConfig()
  loop: LoopConfig = LoopConfig()
  emulate: int = 0  # CPU devices to emulate; 0: the real devices
