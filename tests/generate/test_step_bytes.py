"""What the compiled step moves and holds: its caches in place, nothing of them copied, no weight a second time."""

import re

import jax
import numpy as np
import pytest
import tiny
from generate.made import ONE

from lmscale.config import AttentionConfig, Mamba2Config, MambaConfig, MLPConfig, ModelConfig
from lmscale.generate.choose import Sampling
from lmscale.generate.engine import STATE, Engine
from lmscale.generate.weights import generation_setup
from lmscale.models import model as model_lib

ROWS, LENGTH = 1, 2048
MODEL = ModelConfig(
  d_model=256, vocab=512, attention=AttentionConfig(heads=4, kv_heads=2, head_dim=64), mlp=MLPConfig(d_ff=1024),
  mamba2=Mamba2Config(heads=8, head_dim=64, groups=2, state=64), mamba=MambaConfig(d_inner=512, state=16, dt_rank=16),
)  # fmt: skip
PATTERNS = {'transformer': '*-*-', 'mamba': 'mmmm', 'mamba2': 'MMMM', 'hybrid': 'M-M*m-'}


def compiled(arch):
  """(the engine, the compiled step), from shapes alone."""
  setup = generation_setup(tiny.config(ONE, tiny.change(MODEL, pattern=PATTERNS[arch])), jax.devices()[:1])
  engine = Engine(setup, jax.eval_shape(lambda: model_lib.init_runs(setup.config.model, setup.stacking, 0)))
  number = jax.ShapeDtypeStruct((ROWS,), np.int32)
  arguments = (engine.params, engine.abstract(ROWS, LENGTH), dict.fromkeys(STATE, number), jax.ShapeDtypeStruct((ROWS,), bool),
               jax.ShapeDtypeStruct((), np.int32))  # fmt: skip
  with engine.call.context():
    lowered = engine.step_program(Sampling(0.0), MODEL.vocab).lower(*arguments)
  return engine, lowered.compile(compiler_options={'xla_backend_optimization_level': 1})


def size(tree):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def in_place(text):
  """Bytes that XLA counts and nothing moves: of a fused scatter the whole cache, read and written, of a fused gather the whole table."""
  written = re.findall(r'= f32\[([\d,]+)\]\S* fusion\([^\n]*calls=%wrapped_scatter', text)
  tables = len(re.findall(r'gather_fusion[.\d]* = ', text)) * MODEL.vocab * MODEL.d_model * 4
  return sum(2 * 4 * int(np.prod(list(map(int, shape.split(','))))) for shape in written) + tables


@pytest.mark.parametrize('arch', PATTERNS)
def test_a_step_moves_little_more_than_it_must(arch):
  engine, step = compiled(arch)
  caches = engine.abstract(ROWS, LENGTH)
  kept = {path[-1].key: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(caches)}
  states = size([leaf for path, leaf in jax.tree_util.tree_leaves_with_path(caches) if path[-1].key not in ('k', 'v')])
  weights = size({**engine.params, 'embed': {}})
  must = weights + size(caches) + states  # states and windows are read and written
  memory = step.memory_analysis()
  assert memory.alias_size_in_bytes >= size(caches), 'a cache is not updated in place'
  if 'k' in kept:
    assert memory.temp_size_in_bytes < 0.5 * kept['k'].size * 4, 'a cache is copied'
  moved = step.cost_analysis()['bytes accessed'] - in_place(step.as_text())
  print(arch, moved / must, memory.temp_size_in_bytes / size(caches))
  assert moved <= 1.3 * must, f'{moved / must:.2f} times the weights and caches'
