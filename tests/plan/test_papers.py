"""The figures that the scaling papers print, from their formulas and from the plan."""

import pathlib

import pytest

from lmscale.config import Config, fill_data, recipes
from lmscale.models.flops import flops_per_token_paper
from lmscale.parallel.pipeline.replay import in_flight, simulate
from lmscale.parallel.pipeline.schedule import make_table
from lmscale.plan.executed import executed_flops
from lmscale.plan.papers import activation_bytes, iteration_flops

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'
A100 = 312e12
SHAPES = {'22b': (48, 64, 6144), '175b': (96, 96, 12288), '530b': (105, 128, 20480), '1t': (128, 160, 25600)}


def load(size: str, remat: str) -> Config:
  config = recipes.load(f'{CONFIGS}/megatron_gpt.py:size={size}', [('train.remat', remat)])
  return fill_data(config, config.mesh.pipe * config.mesh.tensor)


@pytest.mark.parametrize(
  ('size', 'rows', 'gigabytes'),
  [('22b', 4, [339.84, 63.62, 42.48, 10.27, 4.83]), ('530b', 1, [431.59, 92.48, 53.95, 18.72, 8.81])],
)
def test_activations_of_the_first_stage(size, rows, gigabytes):
  """arXiv 2205.05198, table 2: no parallelism, tensor 8, with sequence parallelism, with selective recomputation, full."""
  shape = *SHAPES[size], 2048, rows
  found = [
    activation_bytes(*shape),
    activation_bytes(*shape, tensor=8),
    activation_bytes(*shape, tensor=8, sequence_parallel=True),
    activation_bytes(*shape, tensor=8, sequence_parallel=True, remat='selective'),
    activation_bytes(*shape, remat='full'),
  ]
  assert [n / 1e9 for n in found] == pytest.approx(gigabytes, abs=0.005)


@pytest.mark.parametrize('remat', ['none', 'full'])
@pytest.mark.parametrize('size', SHAPES)
def test_executed_flops(size, remat):
  """The plan's count, attention in full, is that of both papers."""
  config = load(size, remat)
  layers, _, hidden = SHAPES[size]
  formula = iteration_flops(layers, hidden, 51_200, 2048, config.train.batch, remat)
  assert executed_flops(config, causal=False) * config.train.batch * 2048 == pytest.approx(formula, rel=1e-3)


@pytest.mark.parametrize(('size', 'percent'), [('175b', 2.7), ('530b', 1.6)])
def test_the_cost_of_selective_recomputation(size, percent):
  """arXiv 2205.05198 says 2.7 % more FLOPs for GPT-3 and 1.6 % for MT-NLG, s / 6h: what attention's core costs in both
  passes. Ours keeps what attention gives, and computes no matrix product of these models again."""
  config = load(size, 'selective')
  layers, _, hidden = SHAPES[size]
  model, executed = (iteration_flops(layers, hidden, 51_200, 2048, 1, remat) for remat in ('none', 'selective'))
  assert 100 * (executed / model - 1) == pytest.approx(percent, abs=0.06)
  assert executed_flops(config, causal=False) == flops_per_token_paper(config.model, 2048)


@pytest.mark.parametrize(
  ('size', 'devices', 'batch', 'seconds', 'mfu', 'hfu'),
  [
    ('22b', 8, 4, 1.10, 41.5, 43.7),
    ('175b', 64, 64, 13.75, 51.4, 52.8),
    ('530b', 280, 280, 37.83, 56.0, 57.0),
    ('1t', 512, 512, 71.49, 56.3, 57.0),
  ],
)
def test_published_utilisation(size, devices, batch, seconds, mfu, hfu):
  """arXiv 2205.05198, table 5: a step with selective recomputation on A100s, to the rounding of its seconds."""
  layers, _, hidden = SHAPES[size]
  peak = devices * A100 * seconds
  executed = iteration_flops(layers, hidden, 51_200, 2048, batch, 'selective')
  model = flops_per_token_paper(load(size, 'selective').model, 2048) * batch * 2048
  assert (100 * model / peak, 100 * executed / peak) == (pytest.approx(mfu, rel=5e-3), pytest.approx(hfu, rel=5e-3))


def test_published_throughput_of_ptd_p():
  """arXiv 2104.04473, table 1: 163 TFLOP/s a GPU at 1T are executed FLOPs; 84 days for 450B tokens (section 5.1)."""
  config = load('1t', 'full')
  seconds = executed_flops(config, causal=False) * 450e9 / (3072 * 163e12)
  assert seconds / 86400 == pytest.approx(84, abs=1.5)


@pytest.mark.parametrize('p,m,v', [(4, 8, 1), (4, 12, 2), (8, 32, 3)])
def test_schedule_columns(p, m, v):
  """arXiv 2401.10241, table 2, and 2104.04473, section 2.2: bubble in time, peak activations in microbatches of a
  device, and messages, for T_F = 1, T_B + T_W = 2. `1f1b` pairs tasks in ticks and holds 2 p - 1 instead of p."""
  columns = {'gpipe': (1, m), '1f1b_strict': (1, p), '1f1b': (1, 2 * p - 1), 'interleaved': (v, p * (1 + (p - 1) / (p * v)))}
  for name, (virtual, peak) in columns.items():
    table = make_table(name, p, m, virtual)
    costs = [1 / virtual] * table.stages, [2 / virtual] * table.stages
    assert simulate(table, *costs).asynchronous * 3 * m == pytest.approx((p - 1) * 3 / virtual)
    assert in_flight(table, [1 / virtual] * table.stages).max() == pytest.approx(min(m, peak))
    assert (table.column('receive_activation') >= 0).sum() == m * (p * virtual - 1)
