"""What a layer keeps for its backward pass."""

import pytest

from lmscale.config import Config, ConfigError, from_dict
from lmscale.plan.activations import check_kernels, layer_activations

S, D, F, H = 64, 32, 128, 4


def build(mesh: dict | None = None, **train: object) -> Config:
  attention = {'heads': H, 'kv_heads': H, 'head_dim': 12}
  model = {'pattern': 'Mm*-', 'd_model': D, 'attention': attention, 'mlp': {'d_ff': F, 'activation': 'relu2'}}
  return from_dict({'model': model, 'mesh': mesh or {}, 'train': {'seq_len': S, **train}})


def test_mlp_keeps_its_inputs():
  """At least the normed input and both sides of the activation; not the weights."""
  kept = layer_activations(build(), '-', 'none')
  least = 4 * S * (D + 2 * F)
  assert least <= kept < 3 * least


def test_selective_keeps_what_the_projections_give():
  for kind in 'Mm*-':
    assert layer_activations(build(), kind, 'selective') < layer_activations(build(), kind, 'none')
  assert layer_activations(build(), '-', 'selective') == 4 * S * (D + F)  # the input and the activation's argument


def test_nothing_grows_with_the_square_of_the_sequence():
  long = build(seq_len=4 * S)
  for kind in 'Mm*-':
    assert layer_activations(long, kind, 'none') < 4.2 * layer_activations(build(), kind, 'none')


def test_no_layer_keeps_a_state_per_token():
  state, tokens = 128, 256
  model = {'mamba2': {'groups': 1, 'state': state, 'chunk': 32}, 'mamba': {'state': state}}  # 256 channels each
  config = from_dict({'model': {'pattern': 'Mm', 'd_model': D, **model}, 'train': {'seq_len': tokens}})
  for kind in 'Mm':
    assert layer_activations(config, kind, 'none') < 4 * tokens * 256 * state / 2


def test_tensor_cuts_the_mixer_and_sequence_parallel_the_stream():
  for kind in 'Mm*-':
    whole, cut, sequence = (
      layer_activations(build(mesh), kind, 'none')
      for mesh in ({}, {'tensor': 4}, {'tensor': 4, 'sequence_parallel': True})
    )
    assert whole / 4 <= sequence < cut < whole


def test_twice_the_bytes_in_float64():
  for kind in 'Mm*-':
    single, double = (layer_activations(build(compute_dtype=dtype), kind, 'none') for dtype in ('float32', 'float64'))
    assert 1.9 * single < double <= 2 * single


def test_half_the_bytes_in_bfloat16_except_for_accumulators():
  for kind in 'Mm*-':
    single, half = (layer_activations(build(compute_dtype=dtype), kind, 'none') for dtype in ('float32', 'bfloat16'))
    assert single / 2 <= half < single


@pytest.mark.parametrize(
  'model,backend,message',
  [
    ({'mamba2': {'implementation': 'pallas_mosaic'}}, None, r'model.mamba2.implementation: ssd: .* wgmma takes bfloat16'),
    ({'mamba2': {'implementation': 'pallas_triton'}}, 'cpu', "runs on an NVIDIA GPU, and the devices here are of kind 'cpu'"),
    ({'mamba2': {'implementation': 'pallas_triton', 'head_dim': 256}}, None, 'ssd: .* head_dim 256'),
  ],
)
def test_a_kernel_that_cannot_do_it_is_refused_by_its_field(model, backend, message):
  with pytest.raises(ConfigError, match=message):
    check_kernels(from_dict({'model': {'pattern': 'M', **model}}), backend)
