"""The fields of a config: frozen dataclasses with their defaults, units and choices. `checks.py` says what may be in them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Causal self-attention: `kv_heads` equal to `heads` is MHA, 1 is MQA, anything between is GQA."""

  heads: int = 4
  kv_heads: int = 4
  head_dim: int = 32
  implementation: str = 'auto'  # auto (the best one for the platform) | xla | cudnn


@dataclasses.dataclass(frozen=True)
class MLPConfig:
  """Two linear maps around an activation; swiglu and geglu have a third as gate."""

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
  chunk: int = 0  # tokens per SSD chunk; 0: the implementation's own choice
  dt_min: float = 0.0  # the step sizes are raised to this after softplus; 0: no bound
  dt_max: float = 0.0  # and lowered to this; 0: no bound
  implementation: str = 'auto'  # auto (the best one for the platform) | scan | xla | pallas_triton | pallas_mosaic


@dataclasses.dataclass(frozen=True)
class MambaConfig:
  """Mamba-1 mixer (arXiv 2312.00752)."""

  d_inner: int = 256
  state: int = 16
  dt_rank: int = 8
  conv: int = 4
  chunk: int = 0  # tokens per selective-scan chunk; 0: the implementation's own choice
  implementation: str = 'auto'  # auto (the best one for the platform) | scan | xla | pallas_triton


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
  """Slower rotary positions, for texts longer than those that were trained (docs/long_context.md). A kind reads the fields in brackets;
  the others stay as they are."""

  kind: str = 'none'  # none | linear (factor) | ntk (factor) | yarn, llama3 (factor, length, turns) | longrope (factor, length, factors)
  factor: float = 1.0  # how many times longer the texts may become
  length: int = 0  # of the texts that were trained
  turns: tuple[float, ...] = ()  # (low, high): rotations that make fewer than low turns over `length` become slower by the factor, those
  # of more than high turns stay; Llama 3.1 has [1, 4], YaRN [1, 32]
  factors: tuple[float, ...] = ()  # of each rotation, the fastest first: how many times slower it becomes


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
  rope_scaling: RopeScalingConfig = RopeScalingConfig()
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
  schedule: str = '1f1b'  # of the pipeline: gpipe | 1f1b | 1f1b_strict (at most pipe microbatches in flight) | interleaved
  virtual: int = 1  # pipeline stages on each device; more than 1 only with interleaved
  vocab_on_pipe: bool = False  # embedding and head cut over all stages, not whole in the first and the last

  @property
  def size(self) -> int:
    return self.pipe * self.data * self.tensor


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with a token-indexed schedule. All token counts are tokens consumed, not steps."""

  schedule: str = 'cosine'  # cosine | wsd | constant
  learning_rate: float = 1e-3
  min_learning_rate: float = 1e-4
  warmup_tokens: int = 0  # a recipe's becomes shorter in proportion where the command line makes the run shorter (train.steps,
  # train.batch, ...), unless it is set there, too; a longer run keeps it
  decay_tokens: int = 0  # where the decay ends; 0: at the end of the run
  wsd_decay_tokens: int = 0  # length of the final linear decay of wsd
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip: float = 1.0  # global norm; 0 switches clipping off


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Length, batch, precision and memory of the training step. Batches count sequences of seq_len tokens."""

  steps: int = 100
  batch: int = 8  # sequences per step, over the whole mesh (the final size of a ramp)
  seq_len: int = 256
  microbatch: int = 1  # sequences per data rank in one forward pass
  ramp_start: int = 0  # first batch size of a linear ramp; 0: no ramp
  ramp_increment: int = 0
  ramp_tokens: int = 0
  compute_dtype: str = 'float32'  # float32 | bfloat16 | float64
  grad_dtype: str = 'float32'  # dtype in which gradients are accumulated and reduced; a float64 run does it in float64
  remat: str = 'full'  # none | selective | full
  stored_microbatches: int = 0  # of those in flight on a device of a pipeline, how many `full` stores like `selective`
  stack: str = 'runs'  # runs | unrolled
  deterministic: bool = True  # False: GPU kernels may add up gradients in any order, which is faster
  loss_chunk: int = 1024  # tokens of one data rank whose logits exist at a time
  init_from: str = ''  # a finished run's folder: start from its newest parameters, step 0, empty moments
  nonfinite_budget: int = 5  # steps skipped for numbers that are not finite, after which the run stops
  spike_skip: float = 0.0  # skip a step whose gradient norm is more than this many times the median of the last 64; 0: none
  spike_budget: int = 20  # steps skipped for that, after which the run stops


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """One source of text or tokens and its share of the blend."""

  name: str = 'code'
  kind: str = 'stdlib'  # stdlib | text | jsonl | megatron | tfds | synthetic
  path: str = 'code'  # stdlib: code or prose; text, jsonl: a file, a folder or a glob; megatron: the files without .bin or
  # .idx; tfds: a prepared folder or a name; synthetic: TASK:BYTES:DOCUMENTS, for example phonebook:256-1024:20000
  weight: float = 1.0
  field: str = 'text'  # jsonl, tfds: where the text (or, in tfds, the tokens) is
  split: str = 'train'  # tfds: as in TFDS, for example train[:90%]


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The blend of text sources, by weight, and how text becomes tokens."""

  sources: tuple[SourceConfig, ...] = (SourceConfig(),)
  tokenizer: str = 'bytes'  # bytes, or the path of a tokenizer.json (Hugging Face) or a .model (SentencePiece)
  end_token: str = ''  # the token of that file that ends a document; empty: the one that published models use
  cache: str = ''  # folder of the token cache; empty: ~/.cache/lmscale
  validation: float = 0.02  # share held out: documents chosen by the hash of their content; of few or long ones the ends


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
  temperature: float = 0.8  # of samples; their top_k and top_p are those of `generate`


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
  """What follows a prompt in the job `generate`: how long it is, how a token is chosen, how many prompts go together.

  Logits are divided by the temperature, then cut by top_k, then what is left by top_p; a seed, a prompt's place among the
  prompts and the token's number give the draw.
  """

  tokens: int = 200  # at most, after each prompt
  temperature: float = 0.8  # 0: always the most likely token
  top_k: int = 0  # draw from the k most likely tokens only; 0, or as many as there are: from all
  top_p: float = 1.0  # draw from the fewest tokens that have this probability together; 1: from all
  stop: tuple[str, ...] = ()  # texts at which a prompt's continuation ends, without them; an end of document always ends it
  batch: int = 8  # prompts at a time, rounded up to divide over the devices
  prefill_chunk: int = 512  # tokens of a prompt that are read at a time


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """The tasks on which the model is scored: while it trains, and by the job `eval` where its flags name no others."""

  every: int = 0  # steps, and at the end; 0: only by the job
  tasks: tuple[str, ...] = ()  # names, as docs/evaluation.md lists them
  data: str = ''  # the folder of data sets
  lengths: tuple[int, ...] = (1024,)  # tokens of synthetic tasks; the longest is that of loss_by_position
  samples: int = 0  # of each task at most so many, drawn; 0: all of a file, 100 of a synthetic task


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
  generate: GenerateConfig = GenerateConfig()
  eval: EvalConfig = EvalConfig()
  emulate: int = 0  # CPU devices to emulate; 0: the real devices
