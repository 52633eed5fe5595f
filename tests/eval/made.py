"""The folder of a tiny model with random weights, and data sets for it."""

import json

import numpy as np
import tiny

from lmscale.config import GenerateConfig
from lmscale.data.tokenizer import ByteTokenizer
from lmscale.models import model
from lmscale.train.model_folder import write_model
from lmscale.train.streamed import Pending

MODEL = tiny.change(tiny.MODEL, pattern='M*', vocab=264)


def write_run(folder):
  """A model in folder/run, of step 3."""
  config = tiny.change(tiny.config(tiny.ONE, MODEL), generate=GenerateConfig(batch=8, prefill_chunk=64))
  tree = model.init_layers(MODEL, 0)
  leaves = {f'params/layers/{i}/{name}': leaf for i, layer in enumerate(tree.pop('layers')) for name, leaf in layer.items()}
  leaves |= {f'params/{part}/{name}': leaf for part, rest in tree.items() for name, leaf in rest.items()}
  arrays = {name: np.asarray(leaf) for name, leaf in leaves.items()}
  pending = {name: Pending(x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()}
  write_model(folder / 'run', config, pending, {}, tokenizer=ByteTokenizer.identity, step=3)


def write_docs(path, docs):
  path.write_text(''.join(json.dumps(doc) + '\n' for doc in docs))
