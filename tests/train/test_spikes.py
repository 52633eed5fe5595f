"""Which gradient norms are spikes."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmscale.train.spikes import ENOUGH, WINDOW, is_spike, keep_norm, no_norms, usual_norm

usual, keep = jax.jit(usual_norm), jax.jit(keep_norm)


def kept(norms):
  state = no_norms()
  for norm in norms:
    state = keep(state, jnp.float32(norm))
  return state


def test_the_usual_norm_is_the_median_of_the_last_steps():
  norms = np.random.default_rng(0).exponential(size=2 * WINDOW).astype(np.float32)
  state = no_norms()
  for i, norm in enumerate(norms, 1):
    state = keep(state, norm)
    want = statistics.median(norms[:i][-WINDOW:].tolist()) if i >= ENOUGH else 0
    assert float(usual(state)) == pytest.approx(want, rel=1e-6)


def test_norms_that_are_not_finite_are_not_kept():
  state = kept([1.0] * ENOUGH)
  for norm in (np.nan, np.inf, 1e300):  # the last is finite in float64 alone
    np.testing.assert_array_equal(keep(state, norm), state)


def test_what_has_become_usual_is_no_spike():
  state = kept([1.0] * WINDOW)
  found = []
  for _ in range(WINDOW):
    found.append(bool(is_spike(jnp.float32(12.0), usual(state), 10.0)))
    state = keep(state, jnp.float32(12.0))
  assert found == [True] * (WINDOW // 2) + [False] * (WINDOW // 2)


@pytest.mark.parametrize(
  ('norms', 'norm', 'times', 'expected'),
  [
    ([1.0] * (ENOUGH - 1), 30.0, 10.0, False),  # too early
    ([1.0] * ENOUGH, 9.9, 10.0, False),
    ([1.0] * ENOUGH, 10.1, 10.0, True),
    ([1.0] * ENOUGH, 10.1, 0.0, False),  # switched off
    ([0.0] * ENOUGH, 1.0, 10.0, False),  # zeros are no measure
    ([3e38] * ENOUGH, 3e38, 10.0, False),
    ([1.0] * ENOUGH, np.nan, 10.0, False),
  ],
)
def test_a_spike_is_far_above_the_usual_norm(norms, norm, times, expected):
  assert bool(is_spike(jnp.float32(norm), usual(kept(norms)), times)) is expected
