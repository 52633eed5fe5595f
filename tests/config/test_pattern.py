"""The allocation rule of hybrid stacks."""

import pytest

from lmscale.config import ConfigError, hybrid_pattern


def test_published_8b_string():
  assert hybrid_pattern(56, 0.08, 0.5) == 'M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-'


@pytest.mark.parametrize('attention_ratio', [0.08, 4 / 48])
def test_published_800m_string(attention_ratio):
  assert hybrid_pattern(48, attention_ratio, 0.5) == 'M-M-M--M-*M-M-M-M--*M-M-M-M-*M--M-M-M-*M-M--M-M-'


@pytest.mark.parametrize('attention_ratio', [0.0, 0.05, 0.08, 0.25, 0.5, 1.0])
@pytest.mark.parametrize('mlp_ratio', [0.0, 0.05, 0.3, 0.5])
def test_counts_are_the_rounded_shares(attention_ratio, mlp_ratio):
  for layers in range(1, 65):
    attention, mlp = round(layers * attention_ratio), round(layers * mlp_ratio)
    if attention + mlp <= layers:
      pattern = hybrid_pattern(layers, attention_ratio, mlp_ratio)
      assert (len(pattern), pattern.count('*'), pattern.count('-')) == (layers, attention, mlp)


def test_other_mixer_and_no_attention_at_the_ends():
  pattern = hybrid_pattern(24, 0.25, 0.25, mixer='m')
  assert set(pattern) == {'m', '*', '-'}
  assert '*' not in (pattern[0], pattern[-1])


@pytest.mark.parametrize(
  ('arguments', 'detail'),
  [
    ((0, 0.1, 0.5), 'layers: 0'),
    ((8, -0.1, 0.5), 'attention_ratio: -0.1'),
    ((8, 0.1, float('nan')), 'mlp_ratio: nan'),
    ((8, 0.75, 0.5), '6 attention \\+ 4 MLP layers = 10 exceed layers 8'),
  ],
)
def test_impossible_shares_are_rejected(arguments, detail):
  with pytest.raises(ConfigError, match=detail):
    hybrid_pattern(*arguments)
