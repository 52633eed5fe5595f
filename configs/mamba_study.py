"""The four architectures of "An Empirical Study of Mamba-based Language Models" (arXiv 2406.07887) under one recipe.

  python run.py --config=configs/mamba_study.py:arch=hybrid,size=8b,context=4k,recipe=1.1t --workdir=...
  python run.py --config=configs/mamba_study.py:arch=hybrid,size=tiny --workdir=...          (a laptop)

arch     transformer  32 blocks of attention + MLP, MHA, RoPE on half of each head, squared ReLU, LayerNorm-1p
         mamba        56 Mamba-1 layers, state 128, RMSNorm, no positions
         mamba2       56 Mamba-2 layers, state 128, 8 groups, RMSNorm, no positions
         hybrid       24 Mamba-2, 4 attention (GQA-8) and 28 MLP (GELU) layers, RMSNorm, no positions
size     8b           as published: 8.540, 8.149, 8.237 and 8.655 B parameters with the 256,000 vocabulary
         800m         the hybrid is Megatron-LM's public example (48 layers, width 1024); the others match its size: ours
         130m         24 layers as in the paper's ablations; width and the rest: ours
         tiny         1.65 to 1.74 M parameters (6 % apart, as at 8b) with the 8B models' proportions, on the bytes of the
                      Python standard library: ours
context  4k           pre-training
         16k 32k 128k continued pre-training for 50B tokens at 3e-5 -> 3e-6, from the parameters of a 4k run:
         add --config.train.init_from=FOLDER_OF_THE_4K_RUN
recipe   1.1t         batch 256, learning rate 1e-4 -> 1e-5;  3.5t  batch 1024, 3e-4 -> 3e-5

Expected at 8b, 3.5t, 4k (the paper's average over 12 tasks): transformer 53.17, mamba2 54.69, hybrid 55.82. The two data
sets (1.1T and 3.5T tokens) and the 256K tokenizer are not public, so the loss of other data will differ: give your own
with --config.data.sources and --config.data.tokenizer. Published: shapes, batch, learning rates, warm-up of 122K samples, cosine, betas, weight
decay, clipping, initial std, bf16. What is marked `ours` is not. At size tiny the whole schedule is ours, scaled down,
with the same ratios between its parts; contexts are 256, 1024, 2048 and 8192 bytes.
"""

import math

import ml_collections

from lmscale import config as config_lib
from lmscale.config import arguments

ARCHITECTURES = ('hybrid', 'transformer', 'mamba', 'mamba2')
SIZES = ('8b', '800m', '130m', 'tiny')
CONTEXTS = {'4k': 4096, '16k': 16384, '32k': 32768, '128k': 131072}
RECIPES = {'1.1t': (256, 1e-4, 1.1e12), '3.5t': (1024, 3e-4, 3.5e12)}  # batch, peak learning rate, tokens

WIDTH = {'8b': 4096, '800m': 1024, '130m': 768, 'tiny': 128}  # 130m and tiny: ours
LAYERS = {  # layers, or blocks of attention + MLP for the transformer
  '8b': {'hybrid': 56, 'transformer': 32, 'mamba': 56, 'mamba2': 56},
  '800m': {'hybrid': 48, 'transformer': 30, 'mamba': 52, 'mamba2': 45},  # ours but for the hybrid
  '130m': {'hybrid': 24, 'transformer': 16, 'mamba': 26, 'mamba2': 22},  # ours but for the hybrid's depth
  'tiny': {'hybrid': 14, 'transformer': 8, 'mamba': 13, 'mamba2': 14},  # ours
}
ATTENTION = {
  '8b': (32, 8, 128),
  '800m': (16, 8, 64),
  '130m': (12, 4, 64),
  'tiny': (4, 1, 32),
}  # heads, GQA groups, dim
MAMBA = {
  '8b': (64, 8, 128),
  '800m': (64, 8, 128),
  '130m': (64, 8, 128),
  'tiny': (32, 2, 32),
}  # head dim, groups, state
TOKENS_CONTINUED = 50e9
WARMUP_SAMPLES = 122_000


def get_config(argument: str = '') -> ml_collections.ConfigDict:
  """The recipe of an argument such as `arch=hybrid,size=8b,context=4k,recipe=1.1t`, which is also the default."""
  allowed = {'arch': ARCHITECTURES, 'size': SIZES, 'context': tuple(CONTEXTS), 'recipe': tuple(RECIPES)}
  chosen = arguments(argument, allowed)
  arch, size, context, recipe = chosen['arch'], chosen['size'], chosen['context'], chosen['recipe']
  config = config_lib.to_config_dict(config_lib.Config())
  config.name = f'mamba_study-{arch}-{size}-{context}-{recipe}'
  set_model(config.model, arch, size)
  set_training(config, size, CONTEXTS[context], recipe)
  (set_tiny if size == 'tiny' else set_large)(config, size)
  return config


def set_model(model: ml_collections.ConfigDict, arch: str, size: str) -> None:
  """Architectures as in the paper's section 2 and the public 8B scripts; other sizes keep their proportions."""
  width = WIDTH[size]
  heads, groups, head_dim = ATTENTION[size]
  ssm_head_dim, ssm_groups, state = MAMBA[size]
  layers = LAYERS[size][arch]
  model.d_model = width
  model.vocab = 264 if size == 'tiny' else 256_000
  model.attention.update(heads=heads, kv_heads=heads if arch == 'transformer' else groups, head_dim=head_dim)
  model.mlp.d_ff = 4 * width
  model.mamba2.update(heads=2 * width // ssm_head_dim, head_dim=ssm_head_dim, groups=ssm_groups, state=state)
  model.mamba.update(d_inner=2 * width, state=state, dt_rank=math.ceil(width / 16))
  model.norm_eps = 1e-5
  model.init_std = 0.02
  if arch == 'transformer':
    model.pattern = '*-' * layers
    model.update(norm='layernorm1p', positions='rope', rope_fraction=0.5)
    model.rope_base = 10000.0  # also at longer contexts, where the paper's is not published: ours
    model.mlp.activation = 'relu2'
  elif arch == 'hybrid':
    model.pattern = config_lib.hybrid_pattern(layers, attention_ratio=0.08, mlp_ratio=0.5)
    model.mlp.activation = 'gelu'
  else:
    model.pattern = {'mamba': 'm', 'mamba2': 'M'}[arch] * layers


def set_training(config: ml_collections.ConfigDict, size: str, context: int, recipe: str) -> None:
  """Batch, learning rate, warm-up and length of the run. A longer context keeps the tokens per step: ours."""
  batch, peak, tokens = RECIPES[recipe]
  base, warmup = 4096, WARMUP_SAMPLES
  continued = context > base
  if size == 'tiny':  # ours: 1/16 of context and batch, 10 times the rate, a few hundred steps
    base, context, batch, peak = base // 16, context // 16, batch // 16, 10 * peak
    tokens, warmup = 300 * batch * base, 20 * batch
  tokens_per_step = batch * base
  config.train.seq_len = context
  config.train.batch = max(tokens_per_step // context, 1)
  optimizer = config.optimizer
  optimizer.update(schedule='cosine', beta1=0.9, beta2=0.95, weight_decay=0.1, clip=1.0)
  optimizer.eps = 1e-8  # ours
  if continued:
    tokens = tokens_per_step * 30 if size == 'tiny' else TOKENS_CONTINUED
    peak, warmup = peak * 0.3 if size == 'tiny' else 3e-5, 0  # no warm-up: ours
  optimizer.learning_rate = peak
  optimizer.min_learning_rate = peak / 10
  optimizer.warmup_tokens = warmup * base
  config.train.steps = math.ceil(tokens / (config.train.batch * context))


def set_large(config: ml_collections.ConfigDict, size: str) -> None:
  """bf16, the public 8B example's mesh, and the user's own data."""
  config.train.compute_dtype = 'bfloat16'
  config.train.microbatch = 1  # ours
  config.train.remat = 'full'  # ours
  config.mesh.zero = 1
  config.mesh.tensor = 4 if size == '8b' else 1
  config.mesh.sequence_parallel = size == '8b'
  config.data.tokenizer = 'bytes'  # ours: name one of up to 256,000 ids, docs/data.md makes one
  config.data.sources = ({'name': 'text', 'kind': 'jsonl', 'path': '', 'weight': 1.0},)  # ours: your files here
  config.loop.update(eval_every=1000, checkpoint_every=1000)  # ours


def set_tiny(config: ml_collections.ConfigDict, size: str) -> None:
  """The standard library's sources on a laptop; all ours."""
  config.train.microbatch = min(4, config.train.batch)
  config.train.remat = 'none'
  config.data.sources = (
    {'name': 'code', 'kind': 'stdlib', 'path': 'code', 'weight': 0.8},
    {'name': 'prose', 'kind': 'stdlib', 'path': 'prose', 'weight': 0.2},
  )
  config.loop.update(eval_every=50, checkpoint_every=100, sample_every=300)
