"""The comparison of arXiv 2406.07887 at a size that two CPU cores train: half a million parameters, two million tokens a run.

  make study                                                                                (all of it, and docs/study.md)
  python tools/study.py --prepare                                                           (the tokenizer that the runs share)
  python run.py --config=configs/small_study.py:arch=hybrid,rate=4e-3 --config.seed=1 --workdir=...       (one run of it)

arch     hybrid       12 layers as the paper's rule spreads them: 8 % attention (1 layer), 50 % MLP, Mamba-2; no positions
         transformer  7 blocks of attention and MLP, RoPE on half of each head, squared ReLU, LayerNorm-1p
         mamba        11 Mamba-1 layers;  mamba2  12 Mamba-2 layers
         attention0, attention50   the hybrid with 0 % and 50 % attention (the latter has no Mamba layer left)
         mlp0         the hybrid without MLPs, 12 layers
         rope         the hybrid with RoPE in its attention
rate     the peak learning rate; the study takes the better of the two for each of the four architectures
size     small, or test: one that takes seconds, on bytes

476,000 to 509,000 parameters, 7 % apart. All but the proportions of the shapes is ours: width 64 has initial weights of 0.1 (0.02 is for 4096), and
a step is one row of 256 tokens, because so small a model learns to look up after some thousand steps, however many tokens they have.
95 % of the tokens are phone books (the paper's section 4.3) of 3 to 5 entries in which every name is looked up, 5 % reversed ones of 4 to
8 entries. There is no other text: in the one trial with 5 % of it (and 10 % reversed books) the hybrid did not learn to look up in
the time. This blend itself has not been tried. Expected: docs/study.md.
"""

import ml_collections

from lmscale import config as config_lib
from lmscale.config import arguments

ARCHITECTURES = ('hybrid', 'transformer', 'mamba', 'mamba2', 'attention0', 'attention50', 'mlp0', 'rope')
RATES = ('4e-3', '2e-3')
PATTERNS = {
  'small': {
    'transformer': '*-' * 7, 'mamba': 'm' * 11, 'mamba2': 'M' * 12, 'attention0': config_lib.hybrid_pattern(12, 0, 0.5),
    'attention50': '*-' * 7, 'mlp0': config_lib.hybrid_pattern(12, 0.08, 0), 'hybrid': config_lib.hybrid_pattern(12, 0.08, 0.5),
  },
  'test': {
    'transformer': '*-', 'mamba': 'm', 'mamba2': 'M', 'attention0': 'M-', 'attention50': '*-', 'mlp0': 'M*', 'hybrid': 'M*-',
  },
}  # fmt: skip
WIDTH = {'small': 64, 'test': 16}
TOKENIZER = 'runs/study/tokenizer.json'  # made by `tools/study.py`: numbers become pieces of a few digits, names two or three
TOKENIZER_INPUT = ('stdlib:prose', 'synthetic:phonebook:256-1024:2000')
VOCAB = 1024
LENGTHS = {'small': (130, 166, 260, 520), 'test': (300,)}  # tokens of the phone books that are asked for


def get_config(argument: str = '') -> ml_collections.ConfigDict:
  """The recipe of an argument such as `arch=hybrid,rate=3e-3`, which is also the default."""
  chosen = arguments(argument, {'arch': ARCHITECTURES, 'rate': RATES, 'size': ('small', 'test')})
  arch, size = chosen['arch'], chosen['size']
  config = config_lib.to_config_dict(config_lib.Config())
  config.name = f'small_study-{arch}-{chosen["rate"]}' + ('-test' if size == 'test' else '')
  set_model(config.model, arch, size)
  set_training(config, float(chosen['rate']), size)
  set_data(config, size)
  config.eval.update(tasks=('phonebook', 'phonebook_reversed'), lengths=LENGTHS[size], samples=100 if size == 'small' else 2)
  return config


def set_model(model: ml_collections.ConfigDict, arch: str, size: str) -> None:
  """Shapes with the proportions of the paper's section 2."""
  width = WIDTH[size]
  model.pattern = PATTERNS[size].get(arch, PATTERNS[size]['hybrid'])
  model.d_model = width
  model.init_std = 0.1
  model.vocab = VOCAB if size == 'small' else 264
  model.attention.update(heads=2, kv_heads=2, head_dim=width // 2)
  model.mlp.d_ff = 4 * width
  model.mamba2.update(heads=4, head_dim=width // 2, groups=1, state=32)
  model.mamba.update(d_inner=2 * width, state=16, dt_rank=4)
  if arch == 'transformer':
    model.update(norm='layernorm1p', positions='rope', rope_fraction=0.5)
    model.mlp.activation = 'relu2'
  if arch == 'rope':
    model.positions = 'rope'


def set_training(config: ml_collections.ConfigDict, rate: float, size: str) -> None:
  """A twentieth of the tokens is warm-up, then a cosine to a tenth of the rate."""
  train, small = config.train, size == 'small'
  train.update(seq_len=256, batch=1, microbatch=1, steps=8000 if small else 3, remat='none')
  tokens = train.steps * train.batch * train.seq_len
  config.optimizer.update(learning_rate=rate, min_learning_rate=rate / 10, warmup_tokens=tokens // 20)
  config.loop.update(log_every=40 if small else 1, eval_every=train.steps // 10 if small else 3, eval_samples=64 if small else 2)
  config.loop.update(checkpoint_every=1600 if small else 3, keep=1)


def set_data(config: ml_collections.ConfigDict, size: str) -> None:
  """Lengths of made texts are in bytes; an entry of a phone book has 25 of them, or 10 tokens of the tokenizer."""
  config.data.tokenizer = TOKENIZER if size == 'small' else 'bytes'
  config.data.validation = 0.05 if size == 'small' else 0.2
  documents = 20_000 if size == 'small' else 40
  config.data.sources = (
    {'name': 'books', 'kind': 'synthetic', 'path': f'phonebook_all:230-320:{documents}', 'weight': 0.95},
    {'name': 'reversed', 'kind': 'synthetic', 'path': f'phonebook_reversed:340-400:{documents}', 'weight': 0.05},
  )
