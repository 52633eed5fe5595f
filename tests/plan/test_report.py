"""The plan that scripts and people read."""

import json
import pathlib
import time

from lmscale.config import field_types, fill_data, recipes
from lmscale.plan.report import format_report, make_report, short, size

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


def test_keys_that_scripts_rely_on():
  config = fill_data(recipes.load(f'{CONFIGS}/quickstart.py'), 8)
  report = json.loads(json.dumps(make_report(config)))
  assert report['parameters']['total'] == sum(report['parameters']['by_kind'].values())
  assert set(report['bytes_per_device']) >= {'parameters', 'gradients', 'optimizer', 'activations'}
  assert 0 < report['flops_per_token'] < report['flops_per_token_paper']
  assert report['devices'] == 8
  assert set(report['mesh']) == set(field_types(type(config.mesh)))
  text = format_report(report)
  assert max(map(len, text.splitlines())) < 120
  assert f'{report["parameters"]["total"]:,}' in text


def test_one_trillion_parameters_take_seconds():
  start = time.monotonic()
  config = recipes.load(f'{CONFIGS}/megatron_gpt.py:size=1t')
  report = make_report(fill_data(config, 8 * 64 * 6))
  assert report['mesh']['data'] == 6
  assert report['devices'] == 3072
  assert time.monotonic() - start < 10


def test_what_zero_does_not_cut_is_said():
  """1T on six data ranks: nothing divides, and every stage plans the same bytes."""
  config = recipes.load(f'{CONFIGS}/megatron_gpt.py:size=1t')
  report = make_report(fill_data(config, 8 * 64 * 6))
  assert report['zero_share'] == 0
  assert 'cut by ZeRO                  0.0%  no dim of the rest divides by data 6, mesh.data 5 or 4 would' in format_report(report)
  report = make_report(fill_data(config, 8 * 64 * 8))
  assert report['zero_share'] > 0.999 and report['zero_advice'] == ''


def test_units():
  assert [short(n) for n in (12, 1_500, 8_655_000_000, 1.008e12)] == ['12', '1.500 K', '8.655 B', '1.008 T']
  assert [size(n) for n in (12, 2048, 3 * 2**30, 2**41)] == ['12 B', '2.00 KiB', '3.00 GiB', '2.00 TiB']
