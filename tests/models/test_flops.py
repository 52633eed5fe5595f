"""FLOPs per token against the papers' formulas and hand-made figures."""

import dataclasses

import pytest

from lmscale.config import Mamba2Config, MambaConfig, ModelConfig, from_dict
from lmscale.models.flops import flops_per_token, flops_per_token_paper


def gpt(layers: int, h: int, heads: int, vocab: int = 51_200) -> ModelConfig:
  attention = {'heads': heads, 'kv_heads': heads, 'head_dim': h // heads}
  return from_dict(
    {
      'model': {
        'pattern': '*-' * layers,
        'd_model': h,
        'vocab': vocab,
        'attention': attention,
        'mlp': {'d_ff': 4 * h},
      }
    }
  ).model


MTNLG = gpt(105, 20480, 128)


@pytest.mark.parametrize(('layers', 'h', 'heads'), [(24, 2304, 24), (105, 20480, 128), (128, 25600, 160)])
def test_megatron_formula(layers, h, heads):
  """arXiv 2205.05198, equation 7: 72 B L s h^2 (1 + s / 6h + V / 12hL), per token."""
  s, vocab = 2048, 51_200
  formula = 72 * layers * h**2 * (1 + s / (6 * h) + vocab / (12 * h * layers))
  model = gpt(layers, h, heads)
  assert flops_per_token_paper(model, s) == pytest.approx(formula, rel=1e-12)
  assert flops_per_token_paper(model, s) - flops_per_token(model, s) == 6 * layers * s * h


def test_mtnlg_row_of_palm():
  """arXiv 2204.02311, table 3: 65.43k tokens/s on 2240 A100 is 29.7 % without attention and 30.2 % with it.

  PaLM counts 6 FLOPs per parameter; 6 N here leaves out the position table and the biases (0.01 %).
  """
  rate, peak = 65_430, 2240 * 312e12
  assert flops_per_token_paper(MTNLG, 2048) * rate / peak == pytest.approx(0.302, abs=5e-4)
  assert flops_per_token_paper(MTNLG, 0) * rate / peak == pytest.approx(0.297, abs=5e-4)


def test_ssd_of_the_8b_layer():
  """Projections 219.2 MFLOP per token; the SSD 5.37 at chunk 64, 6.55 at 128 and 8.91 at 256."""
  convolutions = 2 * 4 * (8192 + 2 * 1024)
  for chunk, ssd in ((64, 5.37), (128, 6.55), (256, 8.91)):
    mixer = Mamba2Config(heads=128, head_dim=64, groups=8, state=128, conv=4, chunk=chunk)
    model = ModelConfig(pattern='M', d_model=4096, vocab=2, mamba2=mixer)
    forward = flops_per_token(model, 4096) / 3 - 2 * 4096 * 2 - convolutions
    assert forward / 1e6 == pytest.approx(219.2 + ssd, abs=0.06)  # rounded figures
  short = dataclasses.replace(model, mamba2=dataclasses.replace(mixer, chunk=64))
  assert flops_per_token(model, 64) == flops_per_token(short, 64)


def test_mamba1_by_hand():
  mixer = MambaConfig(d_inner=6, state=3, dt_rank=2, conv=4)
  model = ModelConfig(pattern='mm', d_model=5, vocab=7, mamba=mixer)
  products = 5 * 6 * 2 + 6 * (2 + 2 * 3) + 2 * 6 + 6 * 5
  layer = 2 * products + 2 * 4 * 6 + 9 * 6 * 3
  assert flops_per_token(model, 64) == 3 * (2 * layer + 2 * 5 * 7)


def test_gated_mlp_has_three_products():
  plain = from_dict({'model': {'pattern': '-', 'vocab': 2}}).model
  gated = from_dict({'model': {'pattern': '-', 'vocab': 2, 'mlp': {'activation': 'swiglu'}}}).model
  head = 6 * 128 * 2
  assert (flops_per_token(gated, 8) - head) * 2 == (flops_per_token(plain, 8) - head) * 3
