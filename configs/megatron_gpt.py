"""The GPT models of Megatron-LM's scaling papers, and the recipe of Megatron-Turing NLG 530B.

  python run.py --config=configs/megatron_gpt.py:size=1t --job=plan
  python run.py --config=configs/megatron_gpt.py:size=1.7b --workdir=... --config.data.sources.0.path=...

size  1.7b 3.6b 7.5b 18b 39b 76b 145b 310b 530b 1t   table 1 of arXiv 2104.04473 (PTD-P): shape, tensor and pipe sizes, stages, batch
      22b 175b                                       table 3 of arXiv 2205.05198: the same
      mtnlg                                          MT-NLG 530B, arXiv 2201.11990: the whole recipe

Expected: parameters of 529.6 B (530b), 1008.0 B (1t) and 145.6 B (145b); in the papers 163 TFLOP/s per A100 with full
recomputation at 1t, and for mtnlg a loss of 3.15 at 1B, 2.31 at 12B and 1.85 at 270B tokens (their data, not public).
Published: shapes, vocabulary 51,200, sequence length 2048, batch sizes, tensor and pipe sizes, stages on a device; GPT-2's architecture
(learned positions, GELU by tanh, LayerNorm, biases, tied embeddings, 4 h wide MLP). Learning rates of the scaling papers
are not published, nor their number of tokens but for 175b (300B) and 1t (450B); they are marked `ours`, and so is bf16
for the fp16 of the first two papers. Dropout (0.1 in GPT-2) is 0 here: ours. mtnlg is published but where marked.
Sizes with mesh.pipe > 1 can be planned everywhere and trained where that many stages are available.
"""

import math

import ml_collections

from lmscale import config as config_lib
from lmscale.config import arguments, batch_segments

SEQ_LEN = 2048
# layers, width, heads, tensor, pipe, stages on a device (more than 1: interleaved), batch, microbatch
SIZES = {
  '1.7b': (24, 2304, 24, 1, 1, 1, 512, 16),  # microbatch: ours
  '3.6b': (30, 3072, 32, 2, 1, 1, 512, 16),
  '7.5b': (36, 4096, 32, 4, 1, 1, 512, 16),
  '18b': (40, 6144, 48, 8, 1, 1, 1024, 8),
  '39b': (48, 8192, 64, 8, 2, 1, 1536, 4),
  '76b': (60, 10240, 80, 8, 4, 3, 1792, 2),
  '145b': (80, 12288, 96, 8, 8, 2, 2304, 2),
  '310b': (96, 16384, 128, 8, 16, 2, 2160, 1),
  '530b': (105, 20480, 128, 8, 35, 3, 2520, 1),
  '1t': (128, 25600, 160, 8, 64, 1, 3072, 1),
  '22b': (48, 6144, 64, 8, 1, 1, 4, 4),
  '175b': (96, 12288, 96, 8, 8, 3, 64, 1),
  'mtnlg': (105, 20480, 128, 8, 35, 1, 1920, 1),
}
TOKENS = {'1t': 450e9, 'mtnlg': 270e9}  # else 300e9: ours but for 175b


def get_config(argument: str = '') -> ml_collections.ConfigDict:
  """The recipe of an argument such as `size=1t`; the default is size=1.7b."""
  size = arguments(argument, {'size': tuple(SIZES)})['size']
  layers, width, heads, tensor, pipe, virtual, batch, microbatch = SIZES[size]
  config = config_lib.to_config_dict(config_lib.Config())
  config.name = f'megatron_gpt-{size}'
  model = config.model
  model.pattern = '*-' * layers
  model.d_model = width
  model.vocab = 51_200
  model.update(norm='layernorm', positions='learned', max_positions=SEQ_LEN, bias=True, tied=True)
  model.attention.update(heads=heads, kv_heads=heads, head_dim=width // heads)
  model.mlp.update(d_ff=4 * width, activation='gelu_tanh')
  config.mesh.update(pipe=pipe, tensor=tensor, virtual=virtual, schedule='interleaved' if virtual > 1 else '1f1b')
  config.mesh.zero = 0 if size == 'mtnlg' else 1  # 1: ours, the papers replicate
  config.mesh.sequence_parallel = size in ('22b', '175b')  # introduced by arXiv 2205.05198
  config.train.update(batch=batch, seq_len=SEQ_LEN, microbatch=microbatch)
  config.train.compute_dtype = 'bfloat16'  # ours but for mtnlg: the others used fp16
  config.train.remat = 'selective' if size in ('22b', '175b') else 'full'
  config.data.tokenizer = 'bytes'  # ours: name one of up to 51,200 ids, docs/data.md makes one
  config.data.sources = ({'name': 'text', 'kind': 'jsonl', 'path': '', 'weight': 1.0},)  # ours: your files here
  config.loop.update(eval_every=1000, checkpoint_every=1000)  # ours
  tokens = TOKENS.get(size, 300e9)
  config.train.steps = math.ceil(tokens / (batch * SEQ_LEN))
  (set_mtnlg if size == 'mtnlg' else set_gpt)(config)
  return config


def set_gpt(config: ml_collections.ConfigDict) -> None:
  """GPT-3's schedule for models whose papers measure speed only; every value is ours."""
  config.model.init_std = 0.02
  config.optimizer.update(
    learning_rate=1e-4, min_learning_rate=1e-5, beta2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0
  )
  config.optimizer.warmup_tokens = 375_000_000


def set_mtnlg(config: ml_collections.ConfigDict) -> None:
  """arXiv 2201.11990, section 3: 32 -> 1920 sequences over 12B tokens, warm-up 1B, cosine to 10 % over 340B tokens."""
  train, optimizer = config.train, config.optimizer
  config.model.init_std = math.sqrt(1 / (3 * config.model.d_model))
  optimizer.update(
    learning_rate=5e-5, min_learning_rate=5e-6, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0
  )
  optimizer.warmup_tokens = 1_000_000_000
  optimizer.decay_tokens = 340_000_000_000
  train.update(ramp_start=32, ramp_increment=32, ramp_tokens=12_000_000_000)
  train.steps = steps_with_ramp(train, 270_000_000_000)


def steps_with_ramp(train: ml_collections.ConfigDict, tokens: int) -> int:
  """Steps until `tokens` are consumed, the ramp included."""
  step, sample, batch = batch_segments(train)[-1]
  return step + math.ceil((tokens / train.seq_len - sample) / batch)
