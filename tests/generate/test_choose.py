"""How a token is chosen, against NumPy: the distribution that is left after temperature, top_k and top_p, and what is drawn from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmscale.generate.choose import Sampling, make_choose, row_keys

LOGITS = np.array([1.0, 3.0, 2.0, 3.0, -1.0, 9.0, 9.5], np.float32)  # the last two are beyond the tokenizer's five ids
IDS = 5
DRAWS = 4000


def expected(sampling):
  """The probabilities of ids 0..4, by the definition."""
  order = sorted(range(IDS), key=lambda i: (-LOGITS[i], i))[: sampling.top_k or IDS]
  weights = np.exp((LOGITS[order] - LOGITS[order].max()) / sampling.temperature, dtype=np.float64)
  share = weights / weights.sum()
  kept = [i for i in range(len(order)) if i == 0 or share[:i].sum() < sampling.top_p]
  probabilities = np.zeros(IDS)
  probabilities[np.array(order)[kept]] = share[kept] / share[kept].sum()
  return probabilities


def draw(sampling, rows=DRAWS, seed=0):
  keys = row_keys(jnp.int32(seed), jnp.arange(rows), jnp.zeros(rows, jnp.int32))
  return np.asarray(jax.jit(make_choose(sampling, IDS))(jnp.tile(LOGITS, (rows, 1)), keys))


@pytest.mark.parametrize(
  'sampling',
  [Sampling(1.0), Sampling(0.5), Sampling(1.0, top_k=3), Sampling(1.0, top_p=0.7), Sampling(2.0, top_k=4, top_p=0.6),
   Sampling(1.0, top_k=99), Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-9), Sampling(1.0, top_p=0.43)],
  ids=str,
)  # fmt: skip
def test_what_is_drawn_has_the_distribution_of_the_definition(sampling):
  want = expected(sampling)
  counts = np.bincount(draw(sampling), minlength=IDS)
  assert len(counts) == IDS, 'an id beyond the tokenizer'
  assert not counts[want == 0].any(), 'an id that top_k or top_p leaves out'
  np.testing.assert_allclose(counts / DRAWS, want, atol=4 * 0.5 / np.sqrt(DRAWS))


def test_temperature_0_is_the_first_of_the_most_likely():
  assert set(draw(Sampling(0.0), 8)) == {1}
  assert set(draw(Sampling(1e-30), 64)) == {1, 3}, 'equals, drawn from in equal shares, and no NaN'
  assert set(draw(Sampling(1e-30, top_k=1), 8)) == {1}


def test_a_draw_depends_on_the_seed_the_prompt_and_the_number_alone():
  def key(seed, prompt, number, beside):
    keys = row_keys(jnp.int32(seed), jnp.asarray([*beside, prompt]), jnp.asarray([*beside, number]))
    return tuple(np.asarray(jax.random.key_data(keys))[-1].tolist())

  assert key(1, 2, 3, []) == key(1, 2, 3, [9, 7])
  assert len({key(s, p, n, []) for s in (0, 1) for p in (0, 1) for n in (0, 1)}) == 8
