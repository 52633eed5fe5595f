"""Which gradient norms are spikes."""

import math

from lmscale.train.spikes import ENOUGH, WINDOW, SpikeWatch


def test_only_what_is_far_above_the_steps_before_is_a_spike():
  watch = SpikeWatch()
  assert [watch.add(norm) for norm in (50.0, *[1.0] * (ENOUGH - 2))] == [None] * (ENOUGH - 1)
  assert watch.add(30.0) is None  # too early
  assert watch.add(9.0) is None
  assert watch.add(math.nan) is None and watch.add(math.inf) is None
  assert watch.add(12.0) == 12.0
  assert [watch.add(12.0) for _ in range(WINDOW)][-1] is None  # the usual has changed


def test_zero_gradients_are_no_measure():
  watch = SpikeWatch()
  assert [watch.add(0.0) for _ in range(2 * ENOUGH)][-1] is None and watch.add(1.0) is None
