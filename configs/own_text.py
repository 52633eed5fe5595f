"""A small model on a text of your own: one file is enough, of some ten thousand characters or more.

  python run.py --config=configs/own_text.py:my.txt

After the colon: a file, a folder (its *.txt) or a glob in quotes; *.jsonl is read as JSON lines. Reproduces nothing
published, all values are ours: the quickstart's hybrid of 1.25 M parameters, byte by byte, on the devices that JAX
finds. 1.2 M tokens, which is about one pass over a text of a megabyte; its last 5 % are held out. The run is kept in
runs/NAME, NAME being the file's. Expected: some minutes on a laptop, a validation loss below 2 nats per byte for English
prose (docs/data.md shows one), and samples that look like the text from afar. Longer is better:
--config.train.steps=3000.
"""

import pathlib
import re

import ml_collections

from lmscale import config as config_lib


def get_config(path: str = '') -> ml_collections.ConfigDict:
  """The recipe for the text in `path`. Every value is ours."""
  if not path:
    example = '--config=configs/own_text.py:my.txt'
    raise config_lib.ConfigError(f'configs/own_text.py: which text? Write its path after a colon: {example}')
  config = config_lib.to_config_dict(config_lib.Config())
  config.name = name_of(path)

  config.model.pattern = config_lib.hybrid_pattern(10, attention_ratio=0.08, mlp_ratio=0.5)
  config.model.d_model = 128
  config.model.attention.kv_heads = 2

  config.train.steps = 300
  config.train.batch = 16
  config.train.seq_len = 256
  config.train.microbatch = 2
  config.train.remat = 'none'
  config.optimizer.learning_rate = 3e-3
  config.optimizer.min_learning_rate = 3e-4
  config.optimizer.warmup_tokens = 20 * 16 * 256

  config.data.sources = ({'name': config.name, 'kind': kind_of(path), 'path': path},)
  config.data.validation = 0.05
  config.loop.eval_every = 100
  config.loop.checkpoint_every = 50
  config.loop.sample_every = 100
  config.loop.sample_prompt = '\n'
  return config


def name_of(path: str) -> str:
  """The file's or the folder's name without its ending: letters, digits, - and _."""
  return re.sub(r'[^\w-]+', '_', pathlib.PurePath(path).name.partition('.')[0]).strip('_') or 'text'


def kind_of(path: str) -> str:
  """How a file of this name is read."""
  return 'jsonl' if '.jsonl' in pathlib.PurePath(path).suffixes else 'text'
