"""Parameter counts: the papers' figures, and closed formulas against the layers' own declarations."""

import pathlib

import pytest

from lmscale.config import Config, ModelConfig, from_dict, recipes
from lmscale.plan.parameters import KINDS, parameter_count, parameters_by_kind

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


def load(spec: str) -> Config:
  return recipes.load(f'{CONFIGS}/{spec}')


def by_formula(m: ModelConfig) -> dict[str, int]:
  """Parameters by kind, written out by hand for every option."""
  d, a, s, b = m.d_model, m.attention, m.mamba2, m.mamba
  inner, grouped = s.heads * s.head_dim, s.groups * s.state
  norm = d * (1 if m.norm == 'rmsnorm' else 2)
  gates = 1 if m.mlp.activation in ('swiglu', 'geglu') else 0
  q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
  layer = {
    '*': 2 * d * q + 2 * d * kv + (q + 2 * kv + d if m.bias else 0),
    '-': (2 + gates) * d * m.mlp.d_ff + ((1 + gates) * m.mlp.d_ff + d if m.bias else 0),
    'M': d * (3 * inner + 2 * grouped + s.heads) + (s.conv + 1) * (inner + 2 * grouped) + 3 * s.heads + inner,
    'm': b.d_inner * (3 * d + b.conv + 1 + 2 * b.dt_rank + 2 * b.state + 1 + b.state + 1),
  }
  count = {kind: m.layers.count(kind) * n for kind, n in layer.items()}
  return {
    'embedding': m.vocab * d,
    'positions': m.max_positions * d,
    'attention': count['*'],
    'mlp': count['-'],
    'mamba2': count['M'],
    'mamba': count['m'],
    'norms': (len(m.layers) + 1) * norm,
    'head': 0 if m.tied else m.vocab * d,
  }


@pytest.mark.parametrize(
  ('arch', 'billions'), [('transformer', 8.540), ('mamba', 8.149), ('mamba2', 8.237), ('hybrid', 8.655)]
)
def test_8b_models_of_the_mamba_study(arch, billions):
  config = load(f'mamba_study.py:arch={arch},size=8b')
  assert config.model.vocab == 256_000
  assert parameter_count(config.model) / 1e9 == pytest.approx(billions, abs=5e-4)


@pytest.mark.parametrize(
  ('size', 'billions', 'tolerance'),
  [
    ('1.7b', 1.7, 0.05),
    ('3.6b', 3.6, 0.05),
    ('7.5b', 7.5, 0.05),
    ('18b', 18.4, 0.05),
    ('39b', 39.1, 0.05),
    ('76b', 76.1, 0.05),
    ('145b', 145.6, 0.05),
    ('310b', 310.1, 0.05),
    ('530b', 529.6, 0.05),
    ('1t', 1008.0, 0.05),
    ('22b', 22, 0.5),
    ('175b', 175, 0.5),
    ('mtnlg', 529.6, 0.05),
  ],
)
def test_megatron_models(size, billions, tolerance):
  config = load(f'megatron_gpt.py:size={size}')
  total = parameter_count(config.model)
  assert total / 1e9 == pytest.approx(billions, abs=tolerance)
  layers, h, vocab, s = len(config.model.layers) // 2, config.model.d_model, config.model.vocab, config.train.seq_len
  formula = 12 * layers * h**2 * (1 + 13 / (12 * h) + (vocab + s) / (12 * layers * h))  # arXiv 2104.04473, eq. 2
  assert total == pytest.approx(formula, rel=1e-3)


@pytest.mark.parametrize(
  'model',
  [
    {'pattern': 'Mm*-', 'mamba2': {'heads': 6, 'groups': 3, 'conv': 3}, 'mamba': {'dt_rank': 5, 'conv': 2}},
    {'pattern': '*-M', 'norm': 'layernorm', 'bias': True, 'tied': True, 'mlp': {'activation': 'swiglu'}},
    {
      'pattern': '*-',
      'norm': 'layernorm1p',
      'positions': 'learned',
      'max_positions': 512,
      'attention': {'kv_heads': 1},
    },
    {'pattern': '-m', 'bias': True, 'mlp': {'activation': 'geglu'}},
  ],
)
def test_every_kind_equals_its_closed_formula(model):
  config = from_dict({'model': model}).model
  counts = parameters_by_kind(config)
  assert tuple(counts) == KINDS
  assert counts == by_formula(config)
