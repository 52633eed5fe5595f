"""The step compiled ahead of time, beside the plan's formulas."""

import importlib.util
import json

import pytest
import tiny

from lmscale.config import ConfigError, MeshConfig, MLPConfig
from lmscale.jobs import ahead
from lmscale.plan.hardware import gpu_target
from lmscale.plan.report import format_report, make_report

CUDA = importlib.util.find_spec('jax_cuda12_plugin') or importlib.util.find_spec('jax_cuda13_plugin')
MLPS = tiny.change(tiny.MODEL, pattern='---', positions='none', mlp=MLPConfig(d_ff=32))


def compiled(config, target='cpu'):
  report = make_report(config)
  report['compiled'] = ahead.compile_step(config, target)
  return json.loads(json.dumps(report))


def sent(kinds):
  return sum(kind['bytes'] for kind in kinds.values())


@pytest.mark.parametrize('zero', [1, pytest.param(3, marks=pytest.mark.scale)])
def test_the_compiled_step_is_the_planned_one(zero):
  """State to the byte, what is sent but for scalars and a few norms. (For the CPU a layer of one input projection: XLA sums the
  input gradients of several one by one there.)"""
  report = compiled(tiny.config(MeshConfig(1, 4, 2, zero), MLPS, microbatch=2))
  found = report['compiled']
  assert found['state']['equal'] and found['state']['arguments'] < found['bytes']['arguments']
  ids = 4 * 2 * (2 * 16) * 4  # tokens, labels, segments and positions: two microbatches of two rows
  bookkeeping = 4 + 4 * 64 + 3 * 4 + 8
  assert found['other_arguments'] == pytest.approx(ids + bookkeeping, abs=64)
  assert 0.5 < found['bytes']['total'] / report['bytes_per_device']['total'] < 2
  for axis in ('tensor', 'data'):
    assert sent(found['collectives'][axis]) == pytest.approx(sum(report['traffic'][axis].values()), rel=0.02)
  text = format_report(report)
  assert 'parameters and optimizer: the plan says the same' in text and '8  cpu, lowered in' in text
  assert max(map(len, text.splitlines())) < 130


@pytest.mark.parametrize(
  'mesh',
  [MeshConfig(2, 2, 2, 2, True, 'interleaved', 2, True)]
  + [pytest.param(m, marks=pytest.mark.scale) for m in (MeshConfig(4, 2, 1, 1), MeshConfig(2, 2, 2, 3, True))],
)
def test_a_compiled_pipeline_is_the_planned_one(mesh):
  """Unlike stages: a device has room for the most layers of each kind. What is sent in branches is counted as if all were taken."""
  model = tiny.change(MLPS, pattern='*-----', tied=mesh.zero == 1)
  report = compiled(tiny.config(mesh, model, microbatch=2, remat='none'))
  found = report['compiled']
  assert found['state']['equal'], found['state']
  for axis in ('data', 'pipe'):
    assert sent(found['collectives'][axis]) == pytest.approx(sum(report['traffic'][axis].values()), rel=0.05) or mesh.vocab_on_pipe
  ticks = report['pipeline']['ticks']
  assert found['collectives']['pipe']['collective-permute'] == {
    'count': 2 * ticks, 'bytes': report['traffic']['pipe']['collective-permute'], 'at_most': False,
  }  # fmt: skip
  if mesh.tensor > 1:
    assert found['collectives']['tensor']['all-reduce']['at_most']
    assert sent(found['collectives']['tensor']) > sum(report['traffic']['tensor'].values())
  assert 'at most' in format_report(report) or mesh.tensor == 1


@pytest.mark.skipif(not CUDA, reason="needs the extra 'cuda'; no GPU")
@pytest.mark.scale
@pytest.mark.parametrize(('zero', 'sequence_parallel', 'remat'), [(1, True, 'none'), (2, False, 'selective'), (3, True, 'full')])
def test_compiled_for_gpus_that_are_not_there(zero, sequence_parallel, remat):
  """Every kind of layer, in the collectives that are planned."""
  model = tiny.change(tiny.MODEL, pattern='*-*-MMmm', d_model=128, vocab=512, mlp=MLPConfig(d_ff=512))
  mesh = MeshConfig(1, 8, 2, zero, sequence_parallel)
  report = compiled(tiny.config(mesh, model, compute_dtype='bfloat16', remat=remat, seq_len=256, loss_chunk=256), 'H100')
  found = report['compiled']
  assert found['state']['equal'] and found['devices'] == 16 and found['device_kind'] == 'NVIDIA H100 80GB HBM3'
  for axis, kinds in report['traffic'].items():
    assert sent(found['collectives'][axis]) == pytest.approx(sum(kinds.values()), rel=0.05)


def test_slices_of_a_torus():
  assert [ahead.torus(n) for n in (4, 8, 64, 128, 2240, 3072, 8960)] == [
    (2, 2, 1), (2, 2, 2), (4, 4, 4), (4, 4, 8), (4, 20, 28), (12, 16, 16), (16, 20, 28),
  ]  # fmt: skip
  with pytest.raises(ConfigError, match='no slice of 100 chips'):
    ahead.torus(100)


def test_targets_are_described():
  assert 'core_count: 108' in gpu_target('A100') and 'memory_bandwidth: 4800000000000' in gpu_target('H200')


def test_mistakes_are_one_line():
  with pytest.raises(ConfigError, match='2048 devices are more than the 1024 that a CPU can emulate'):
    ahead.prepare(tiny.config(MeshConfig(1, 2048, 1)), 'cpu')
  with pytest.raises(ConfigError, match='16 CPU devices are to be emulated, but JAX already runs with 8'):
    ahead.devices('cpu', 16)
