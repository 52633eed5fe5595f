"""What layers keep for the backward pass, read off compiled programs, beside the formulas."""

import dataclasses
import re

import pytest

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
from lmscale.plan.activations import layer_activations
from lmscale.plan.papers import iteration_flops
from tools import activation_table as lib

BATCH, TOKENS, WIDTH, TENSOR = 2, 64, 32, 4
SMALL = Config(
  model=ModelConfig(
    pattern='*-', d_model=WIDTH, vocab=8, norm='layernorm', bias=True, positions='none',
    attention=AttentionConfig(heads=8, kv_heads=8, head_dim=4),
    mlp=MLPConfig(d_ff=4 * WIDTH, activation='gelu_tanh'),
    mamba2=Mamba2Config(heads=8, head_dim=8, groups=4, state=16, chunk=16),
    mamba=MambaConfig(d_inner=64, state=4, dt_rank=8, chunk=16),
  ),
  mesh=MeshConfig(1, 1, 1, 0),
  train=TrainConfig(seq_len=TOKENS, batch=BATCH, microbatch=BATCH),
)  # fmt: skip
BLOCK = lib.Case('', '', '*-', 16, BATCH, TENSOR)
ROWS = {title: row for title, *row in lib.ROWS}
QUICK = ('TP + SP', 'TP + SP, selective')


@pytest.mark.parametrize('title', [pytest.param(title, marks=() if title in QUICK else pytest.mark.scale) for title in ROWS])
def test_a_block_keeps_what_the_formula_says(title):
  check(BLOCK, SMALL, title, rel=0.06)


def check(case, config, title, rel):
  """One row of the table: bytes by our formula, never above the paper's; no product computed twice but under `full`."""
  row = lib.measure(case, config, *ROWS[title])
  assert row.kept == pytest.approx(row.ours, rel=rel)
  if row.paper is not None:
    assert row.kept < 1.1 * row.paper
  return row


@pytest.mark.parametrize('remat,kept', [('none', 8), pytest.param('selective', 4, marks=pytest.mark.scale)])
def test_outside_the_mixers_everything_is_cut_along_the_sequence(remat, kept):
  """All four kinds under sequence parallelism: the forward loop over layers carries no array with all tokens and the model's width, and of
  those with the device's share of tokens each layer's input, and under `none` the normalised input."""
  mesh = MeshConfig(1, 1, TENSOR, 0, sequence_parallel=True)
  model = dataclasses.replace(SMALL.model, d_model=40, pattern='mM*-')  # a width that is nothing else's
  config = dataclasses.replace(SMALL, model=model, mesh=mesh, train=dataclasses.replace(SMALL.train, remat=remat))
  depth = 3
  text = lib.lower_gradients(config, 'mM*-', depth, BATCH, backward=False).compile().as_text()
  assert len(carried(text, (depth, BATCH, TOKENS // TENSOR, 40))) == kept
  assert not carried(text, (depth, BATCH, TOKENS, 40))


def carried(text, dims):
  """Arrays of these dims in the state of the largest loop of a compiled program."""
  states = [line.split(' while(')[0] for line in text.splitlines() if ' while(' in line]
  return re.findall(rf'\w+\[{",".join(map(str, dims))}\]', max(states, key=len))


@pytest.mark.parametrize('remat', ['none', 'selective'])
@pytest.mark.parametrize('sequence_parallel', [False, True])
def test_the_plan_counts_what_the_formulas_count(remat, sequence_parallel):
  mesh = MeshConfig(1, 1, TENSOR, 0, sequence_parallel)
  model = dataclasses.replace(SMALL.model, pattern='M*-')
  train = dataclasses.replace(SMALL.train, compute_dtype='bfloat16', seq_len=lib.STATE_TOKENS, remat=remat)
  config = dataclasses.replace(SMALL, model=model, mesh=mesh, train=train)
  for kind in 'M*-':
    expected = train.seq_len * lib.formula(model, kind, TENSOR, sequence_parallel, remat)
    few = 12 * train.seq_len  # bytes of positions, which all layers share
    assert abs(layer_activations(config, kind, remat) - expected) <= (0.1 * expected if kind == 'M' else few)


@pytest.mark.scale
@pytest.mark.parametrize('title', ROWS)
@pytest.mark.parametrize('name', lib.CASES)
def test_real_shapes(name, title):
  """Within 10 % of the formulas or below; arXiv 2205.05198's FLOPs of selective recomputation are not exceeded."""
  case = lib.CASES[name]
  config = lib.load(case)
  row = check(case, config, title, rel=0.1)
  if row.paper is None:
    return
  remat = ROWS[title][2]
  shape = 1, config.model.d_model, 0, config.train.seq_len, case.batch
  model, paper = iteration_flops(*shape, 'none'), iteration_flops(*shape, remat)
  core = model * config.train.seq_len / (36 * config.model.d_model) / (1 + config.train.seq_len / (6 * config.model.d_model))
  executed = row.flops * (case.tensor if ROWS[title][0] else 1)
  assert executed < 1.01 * paper + core
  if remat != 'full':
    # Of attention's six products of all queries and keys the blocks that are visited, and three more: it makes its output again, and its scores.
    visited = lib.visited_blocks(config.train.seq_len)
    share = visited / (2 * visited - 1)
    assert executed == pytest.approx(model + (9 * share - 6) * core, rel=0.01)
