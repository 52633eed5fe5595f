"""The plan of a pipeline: its numbers, its picture, its place in the report."""

import json
import pathlib

import pytest

from lmscale.config import Config, fill_data, from_dict, recipes
from lmscale.parallel.pipeline.schedule import SCHEDULES, make_table
from lmscale.plan.pipeline import pipeline_report
from lmscale.plan.report import format_report, make_report
from lmscale.plan.timetable import WIDTH, draw, timetable

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


def build(mesh: dict, pattern: str = '-' * 8, **train: object) -> Config:
  model = {'pattern': pattern, 'd_model': 64, 'mlp': {'d_ff': 256}, 'vocab': 264}
  return from_dict({'mesh': {'data': 1, 'pipe': 4} | mesh, 'model': model, 'train': {'batch': 8, 'remat': 'none'} | train})


def test_the_config_has_the_schedules_that_there_are():
  for schedule in SCHEDULES[:-1]:
    build({'schedule': schedule})


@pytest.mark.parametrize(
  ('mesh', 'expected'),
  [
    ({}, {'schedule': '1f1b', 'virtual_stages': 1, 'ticks': 14, 'bubble': 3 / 8, 'in_flight': [7, 5, 3, 1]}),
    ({'schedule': 'gpipe'}, {'ticks': 21, 'bubble': 3 / 8, 'in_flight': [8] * 4}),
    ({'schedule': '1f1b_strict'}, {'ticks': 22, 'bubble': 2 / 3, 'bubble_async': 3 / 8, 'in_flight': [4, 3, 2, 1]}),
    ({'schedule': 'interleaved', 'virtual': 2}, {'virtual_stages': 2, 'ticks': 26, 'bubble': 3 / 16, 'in_flight': [11, 9, 7, 5]}),
  ],
)
def test_numbers(mesh, expected):
  report = pipeline_report(build(mesh))
  assert report['stages'] == 4 and report['microbatches'] == 8
  for key, value in expected.items():
    assert report[key] == pytest.approx(value) if isinstance(value, float) else report[key] == value
  assert report['bubble_flops'] > report['bubble']  # the head


def test_the_bubble_of_unequal_stages():
  """Two stages of one and three layers; the head, 2 d vocab, is 2.0625 / 4 layers."""
  report = pipeline_report(build({'pipe': 2}, '-|---', batch=4))
  last = 3 + 33 / 64
  # In all ticks but the first F and the last B the last device works.
  ideal = 4 * 3 * (1 + last) / 2
  assert report['bubble_flops'] == pytest.approx((1 + 4 * 3 * last + 2) / ideal - 1)
  again = pipeline_report(build({'pipe': 2}, '-|---', batch=4, remat='full'))
  ideal = (4 * 4 * 4 + 4 * 3 * 33 / 64) / 2  # layers once more, the head not
  assert again['bubble_flops'] == pytest.approx((1 + 4 * (4 * 3 + 3 * 33 / 64) + 3) / ideal - 1)
  assert report['layers'] == ['-', '---'] and report['cut'] == 'cut at the | of model.pattern'


def test_the_picture():
  assert timetable(make_table('1f1b', 2, 3)) == [
    'tick        0 1 2 3 4',
    'device 0  F 0 1 2 . .',
    '          B . . 0 1 2',
    'device 1  F . 0 1 2 .',
    '          B . 0 1 2 .',
  ]
  assert timetable(make_table('interleaved', 2, 2, 2)) == [
    'tick         0  1  2  3  4  5  6  7',
    'device 0  F a0 a1 b0 b1  .  .  .  .',
    '          B  .  .  .  . b0 b1 a0 a1',
    'device 1  F  . a0 a1 b0 b1  .  .  .',
    '          B  .  .  . b0 b1 a0 a1  .',
  ]
  assert timetable(make_table('forward', 2, 2)) == ['tick        0 1 2', 'device 0  F 0 1 .', 'device 1  F . 0 1']


def test_a_large_picture_is_cut():
  lines = timetable(make_table('1f1b', 16, 512))
  assert len(lines) == 1 + 2 * 7 + 1 and lines.count('..') == 1
  assert max(map(len, lines)) <= WIDTH
  assert ' .. ' in lines[0] and lines[0].endswith(' 541') and lines[1].startswith('device 0   F   0   1   2')
  assert lines[2].endswith('510 511')


def test_the_drawing(tmp_path):
  draw(make_table('interleaved', 2, 2, 2), path := tmp_path / 'a.svg')
  text = path.read_text()
  assert 'interleaved: 2 devices * 2 stages, 2 microbatches, bubble 25.0%' in text and '>backward<' in text
  draw(make_table('1f1b', 30, 290), path)  # cut: not a rectangle for each of 17,400 tasks
  assert 'bubble 10.0%' in path.read_text() and path.stat().st_size < 2_000_000
  assert [p.name for p in tmp_path.iterdir()] == ['a.svg']


def test_report():
  config = fill_data(recipes.load(f'{CONFIGS}/megatron_gpt.py:size=530b'), 8 * 35 * 8)
  report = json.loads(json.dumps(make_report(config)))
  assert {'schedule', 'stages', 'virtual_stages', 'microbatches', 'ticks', 'bubble', 'bubble_flops', 'in_flight'} <= set(report['pipeline'])
  assert report['pipeline']['bubble'] == pytest.approx(34 / 945)  # (p - 1) / (v m) of arXiv 2104.04473, table 1
  assert report['pipeline']['in_flight'][::34] == [139, 71]
  text = format_report(report)
  assert max(map(len, text.splitlines())) < 120
  assert 'by stage 2 (105 times)' in text and 'balanced by FLOPs' in text and 'interleaved  35 stages * 3 a device, 315 microbatches' in text
  assert 'pipeline' not in make_report(build({'pipe': 1}))
  strict = format_report(make_report(build({'schedule': '1f1b_strict'})))
  assert '66.7%  over the ideal time, a backward pass being 2 forward; 37.5% without lock step' in strict
