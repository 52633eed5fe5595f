"""The least time of a step on named hardware, and what is sent, by hand."""

import pathlib

import pytest

from lmscale.config import ConfigError, fill_data, from_dict, recipes
from lmscale.plan.bounds import axis_link, bounds_report, memory_traffic
from lmscale.plan.hardware import HARDWARE, find_hardware
from lmscale.plan.parameters import parameter_count
from lmscale.plan.report import format_report, make_report
from lmscale.plan.traffic import step_traffic

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'
D, SEQ, VOCAB = 64, 256, 264


def build(mesh, pattern='-' * 8, **train):
  model = {'pattern': pattern, 'd_model': D, 'mlp': {'d_ff': 256}, 'vocab': VOCAB}
  train = {'batch': 16, 'compute_dtype': 'bfloat16', 'remat': 'none', **train}
  return from_dict({'mesh': {'data': 1, 'pipe': 1, 'zero': 0} | mesh, 'model': model, 'train': train})


def test_tensor_parallelism():
  """arXiv 2104.04473, section 3.2: 4 b s h (t - 1) / t elements a mixer and microbatch without recomputation, here of 2 bytes."""
  stream, head = 16 * SEQ * D, 16 * SEQ * 3
  ends = 2 * (2 * stream + head) * 4  # embedding and head, all-reduces in float32
  assert step_traffic(build({'tensor': 4})) == {'tensor': {'all-reduce': (8 * 4 * stream * 2 + ends) * 3 / 4}}
  cut = step_traffic(build({'tensor': 4, 'sequence_parallel': True}))['tensor']
  assert cut['all-gather'] == (8 * 3 * 2 + 2 + 2) * stream * 3 / 4  # the mixer's input again in the backward pass
  assert cut['reduce-scatter'] == (8 * 2 * 2 + 4) * stream * 3 / 4
  sequence = {'tensor': 4, 'sequence_parallel': True}
  once, again = (step_traffic(build(sequence, '*-' * 4, remat=remat))['tensor'] for remat in ('selective', 'full'))
  assert again['all-gather'] == once['all-gather']
  assert again['reduce-scatter'] - once['reduce-scatter'] == 4 * 2 * stream * 3 / 4  # what attention gives to the MLP of its block


@pytest.mark.parametrize(
  ('zero', 'per_parameter'),  # in units of (n - 1) / n: gradients of 4 bytes twice or once, copies of 2; two microbatches
  [(0, {'all-reduce': 8}), (1, {'all-gather': 2, 'all-reduce': 8}), (2, {'all-gather': 2, 'reduce-scatter': 4}),
   (3, {'all-gather': 2 * 2 * 2, 'reduce-scatter': 2 * 4})],
)  # fmt: skip
def test_data_parallelism(zero, per_parameter):
  sent = step_traffic(build({'data': 8, 'zero': zero}, '-' * 400))['data']
  count = parameter_count(build({}, '-' * 400).model)
  assert set(sent) <= {*per_parameter, 'all-reduce'}
  for kind, n in per_parameter.items():
    assert sent[kind] == pytest.approx(n * count * 7 / 8, rel=0.005)  # norms differ, and what is read once


def test_pipelines_send_in_every_tick():
  """Microbatches and the ticks in which the pipeline fills and empties, activations and gradients; once a step the gradients of
  embedding, final norm and head, which all stages have."""
  ticks, outer = 16 + 2 * 3, (2 * VOCAB + 1) * D * 4
  assert step_traffic(build({'pipe': 4})) == {'pipe': {'collective-permute': 2 * ticks * SEQ * D * 2, 'all-reduce': 2 * outer * 3 / 4}}
  both = step_traffic(build({'pipe': 4, 'tensor': 2, 'sequence_parallel': True}))
  assert both['pipe']['collective-permute'] == ticks * SEQ * D * 2
  assert both['tensor']['all-reduce'] == 16 * SEQ * (D + 3) * 4  # of the last device's head


def test_links():
  h100 = HARDWARE['H100']
  mesh = {'pipe': 4, 'data': 2, 'tensor': 4}
  assert [axis_link(build(mesh), h100, axis) for axis in ('tensor', 'data', 'pipe')] == [450e9, 450e9, 50e9]
  assert axis_link(build({'tensor': 16}), h100, 'tensor') == 50e9
  assert axis_link(build(mesh), HARDWARE['v5p'], 'pipe') == 200e9


def test_memory_traffic():
  count = parameter_count(build({}).model)
  norms = 9 * D
  update = 4 + 2 * (4 + 8)
  assert memory_traffic(build({})) == 16 * (count * (2 * 2 + 4 * 2) + 2 * 2 * norms) + count * update
  assert memory_traffic(build({}, microbatch=16)) == count * (2 * 2 + 4) + 2 * 2 * norms + count * update


def test_the_longest_is_the_bound():
  config = build({'data': 4}, microbatch=4)
  tokens, peak = 16 * SEQ, 312e12
  found = bounds_report(config, HARDWARE['A100'], 81e9, {'data': {'all-reduce': 3e9, 'all-gather': 1e9}}, 0.5)
  per_token = 3 * (8 * 2 * 2 * D * 256 + 2 * D * VOCAB)
  assert found['flops'] == pytest.approx(per_token * tokens / 4 / peak * 1.5)
  assert (found['sent'], found['bound'], found['seconds'], found['fits']) == ({'data': 4 / 300}, 'data', 4 / 300, False)
  assert found['mfu'] == pytest.approx(per_token * tokens / 4 / peak / (4 / 300))


def test_a_published_run():
  """arXiv 2104.04473, table 1: 530B at 163 TFLOP/s a GPU took 64 s a step; at the peak of 312, bubble included, about half of that."""
  config = fill_data(recipes.load(f'{CONFIGS}/megatron_gpt.py:size=530b'), 8 * 35 * 9)
  found = bounds_report(config, HARDWARE['A100'], 40e9, step_traffic(config), 34 / 840)
  assert (found['bound'], found['fits']) == ('flops', True)
  assert found['seconds'] == pytest.approx(64 * 163 / 312 * (1 + 34 / 840), rel=0.2)
  assert max(found['sent'].values()) < found['seconds'] / 4  # three stages a device send three times as much over `pipe`


def test_report():
  report = make_report(build({'pipe': 2}), find_hardware(['H100', 'A100']))
  assert [b['hardware'] for b in report['bounds']] == ['A100', 'H100']
  text = format_report(report)
  assert 'time of a step' in text and '  A100' in text and '  pipe' in text and '% MFU' in text
  assert make_report(build({}, compute_dtype='float32'), find_hardware([]))['bounds'] == []
  with pytest.raises(ConfigError, match="--hardware: 'V100' is not one of A100, H100, H200, v5p, all"):
    find_hardware(['V100'])
