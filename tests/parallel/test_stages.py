"""Which layers are in which stage."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.parallel.pipeline.stages import balance, cut_layers, cut_text, device_layers


def test_cuts_of_the_pattern_are_used_where_they_fit():
  costs = [5, 1, 1, 1]
  assert cut_layers('M-*|-', 2, costs) == [range(3), range(3, 4)]
  assert cut_text('M-*|-', 2) == 'cut at the | of model.pattern'
  assert cut_layers('M-*|-', 3, costs) == [range(1), range(1, 2), range(2, 4)]  # fewer in front
  assert cut_text('M-*|-', 3) == 'balanced by FLOPs; the | of model.pattern make 2 parts, not 3, and are not used'
  assert cut_text('M-*-', 3) == 'balanced by FLOPs'


def test_the_head_is_in_the_last_stage():
  assert cut_layers('--------', 2, [1] * 8) == [range(4), range(4, 8)]
  assert cut_layers('--------', 2, [1] * 8, last=2) == [range(5), range(5, 8)]
  assert cut_layers('----', 4, [1] * 4, last=100) == [range(i, i + 1) for i in range(4)]


def test_stages_go_round_the_devices():
  stages = cut_layers('-' * 8, 4, [1] * 8)
  assert device_layers(stages, 2) == [[0, 1, 4, 5], [2, 3, 6, 7]]
  assert device_layers(stages, 4) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def by_trying(costs: list[int], parts: int) -> tuple[int, int]:
  """The least maximum, and the least sum of squares that goes with it."""
  ways = ((0, *cuts, len(costs)) for cuts in itertools.combinations(range(1, len(costs)), parts - 1))
  sums = [[sum(costs[a:b]) for a, b in itertools.pairwise(way)] for way in ways]
  return min((max(s), sum(x * x for x in s)) for s in sums)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_the_balance_is_the_best_there_is(costs, parts):
  parts = min(parts, len(costs))
  sizes = balance(costs, parts)
  assert len(sizes) == parts and min(sizes) > 0 and sum(sizes) == len(costs)
  ends = [0, *itertools.accumulate(sizes)]
  sums = [sum(costs[a:b]) for a, b in itertools.pairwise(ends)]
  assert (max(sums), sum(x * x for x in sums)) == by_trying(costs, parts)


@pytest.mark.parametrize('layers,parts', [(256, 64), (1024, 32), (1024, 1024)])
def test_large_stacks(layers, parts):
  start = time.process_time()
  sizes = balance([24 * 25600**2 * 2048] * layers, parts)
  assert sizes == [layers // parts] * parts
  assert time.process_time() - start < 3
