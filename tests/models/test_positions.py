"""Rotary positions: plain ones, and those made slower for longer texts, equal to transformers' tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lmscale.config import RopeScalingConfig
from lmscale.models.positions import attention_factor, rope, rope_frequencies

FACTORS = (1.0, 1.25, 1.5, 2.5, 4.0, 8.0)
# What ROPE_INIT_FUNCTIONS of transformers 5.24.0 gives for 12 rotated dimensions and rope_theta 500, in float32: the frequencies, and what
# cosines and sines are multiplied by. `ntk` is its `dynamic` with factor 1 at four times max_position_embeddings.
TABLES = [
  (RopeScalingConfig('linear', 4.0), [0.25, 0.0887384191, 0.0314980261, 0.0111803403, 0.00396850239, 0.00140863482], 1.0),
  (RopeScalingConfig('ntk', 4.0), [1.0, 0.269004554, 0.0723634586, 0.0194661021, 0.00523646967, 0.00140863482], 1.0),
  (RopeScalingConfig('yarn', 8.0, 512, (1.0, 32.0)), [1.0, 0.292836785, 0.0818948746, 0.0212426465, 0.00476220297, 0.000704317412], 1.2079441541679836),
  (RopeScalingConfig('llama3', 8.0, 256, (1.0, 4.0)), [1.0, 0.354953676, 0.125992104, 0.0163135789, 0.0019842512, 0.000704317412], 1.0),
  (RopeScalingConfig('longrope', 16.0, 64, (), FACTORS), [1.0, 0.283962935, 0.0839947388, 0.0178885441, 0.00396850239, 0.000704317412],
   1.2909944487358056),
]  # fmt: skip


def turned(fraction=1.0, **fields):
  return tiny.change(tiny.MODEL, rope_fraction=fraction, **{'rope_base': 100.0} | fields)


@pytest.mark.parametrize(('scaling', 'frequencies', 'factor'), TABLES, ids=[scaling.kind for scaling, _, _ in TABLES])
def test_scaled_frequencies_are_those_of_transformers(scaling, frequencies, factor):
  np.testing.assert_allclose(rope_frequencies(turned(rope_base=500.0, rope_scaling=scaling), 12), frequencies, rtol=2e-7)
  assert attention_factor(scaling) == pytest.approx(factor, rel=1e-14)


def test_llama3_keeps_fast_rotations_slows_slow_ones_and_mixes_those_between():
  scaling = RopeScalingConfig('llama3', 8.0, 64, (1.0, 4.0))
  plain = rope_frequencies(turned(rope_base=500.0), 32)
  want = []
  for f in plain:  # as the paper's code: by wavelengths
    wave = 2 * np.pi / f
    mixed = (64 / wave - 1) / (4 - 1)
    want.append(f if wave < 64 / 4 else f / 8 if wave > 64 / 1 else (1 - mixed) * f / 8 + mixed * f)
  assert len({w / f for w, f in zip(want, plain, strict=True)}) > 4  # all three cases
  np.testing.assert_allclose(rope_frequencies(turned(rope_base=500.0, rope_scaling=scaling), 32), want, rtol=1e-14)


@pytest.mark.parametrize('turns', [(1.0, 32.0), (1.0, 1.5), (200.0, 300.0)])
def test_yarn_in_the_words_of_its_paper(turns):
  """Section 3.2 with 3.4: between the dimensions that turn `high` and `low` times over the trained length, both rounded outwards."""
  factor, length, base, rotary = 8.0, 512, 500.0, 12
  got = rope_frequencies(turned(rope_base=base, rope_scaling=RopeScalingConfig('yarn', factor, length, turns)), rotary)
  edges = [rotary / 2 * np.log(length / (2 * np.pi * n)) / np.log(base) for n in turns]
  start, stop = max(np.floor(edges[1]), 0), min(np.ceil(edges[0]), rotary - 1)
  for i, f in enumerate(got):
    slow = min(max((i - start) / (stop - start or 1e-3), 0), 1)
    assert f == pytest.approx(base ** (-2 * i / rotary) * (slow / factor + 1 - slow), rel=1e-14)


def test_rope_rotates_only_its_fraction_and_depends_on_distance():
  with jax.enable_x64(True):
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8))
    q, k = jnp.asarray(q), jnp.asarray(k)
    np.testing.assert_array_equal(rope(turned(0.5), q, jnp.array([[5]]))[..., 4:], q[..., 4:])

    def score(config, i, j):
      return jnp.vdot(rope(config, q, jnp.array([[i]])), rope(config, k, jnp.array([[j]])))

    np.testing.assert_allclose(score(turned(), 7, 3), score(turned(), 104, 100), rtol=1e-9)
    assert abs(float(score(turned(), 7, 3) - score(turned(), 7, 4))) > 1e-3
    longer = turned(rope_scaling=RopeScalingConfig('linear', 4.0))
    np.testing.assert_allclose(score(longer, 12, 4), score(turned(), 3, 1), rtol=1e-12)
    sharper = turned(rope_scaling=RopeScalingConfig('longrope', 16.0, 64, (), (1.0,) * 4))
    np.testing.assert_allclose(score(sharper, 3, 1), score(turned(), 3, 1) * attention_factor(sharper.rope_scaling) ** 2, rtol=1e-12)
