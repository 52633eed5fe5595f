"""Which family of transformers can express a model, and that its words read back as the same one."""

import json
import pathlib

import pytest
import tiny

from lmscale.config import AttentionConfig, Config, Mamba2Config, ModelConfig, validate
from lmscale.errors import ConfigError
from lmscale.interop.huggingface_config import read_config
from lmscale.interop.huggingface_write import same_function, write_config

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens'
NAMES = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())
TRANSFORMER = tiny.change(tiny.MODEL, pattern='*-*-', d_model=32)


@pytest.mark.parametrize('name', NAMES)
def test_what_is_written_reads_back_as_the_same_model(name):
  given = json.loads((GOLDENS / name / 'config.json').read_text())
  model = read_config(given)
  written = write_config(model, 64, end=3)
  assert json.loads(json.dumps(written, allow_nan=False)) == written
  assert (written['model_type'], written['architectures'], written['eos_token_id']) == (given['model_type'], given['architectures'], 3)
  assert read_config(written) == model


@pytest.mark.parametrize(
  ('model', 'family'),
  [
    (TRANSFORMER, 'llama'), (tiny.change(TRANSFORMER, norm='layernorm1p', mlp=tiny.change(tiny.MODEL.mlp, activation='relu2')), 'nemotron'),
    (tiny.change(TRANSFORMER, pattern='M-*-M-'), 'bamba'), (tiny.change(TRANSFORMER, pattern='M-M-', positions='none'), 'bamba'),
    (tiny.change(TRANSFORMER, pattern='M|M', bias=True), 'mamba2'), (tiny.change(TRANSFORMER, pattern='mm'), 'mamba'),
    (tiny.change(TRANSFORMER, pattern='M*M', positions='none'), 'nemotron_h'),
    (tiny.change(TRANSFORMER, pattern='*-', positions='none', mlp=tiny.change(tiny.MODEL.mlp, activation='gelu')), 'nemotron_h'),
    (tiny.change(TRANSFORMER, pattern='MM', d_model=24), 'nemotron_h'),
  ],
)  # fmt: skip
def test_the_family_follows_from_the_layers(model, family):
  validate(Config(model=model))
  values = write_config(model, 64)
  assert values['model_type'] == family and same_function(values, model)


@pytest.mark.parametrize(
  ('changes', 'says'),
  [
    ({'pattern': 'mM'}, 'model.pattern: none has layers of the kinds M, m'),
    ({'pattern': 'm*'}, 'none has layers of the kinds'),
    ({'pattern': 'M-M-', 'positions': 'learned', 'max_positions': 300}, 'bamba: model.positions: learned; it has no position table'),
    ({'norm': 'layernorm'}, 'llama: model.norm: layernorm; it has rmsnorm; nemotron: model.norm: layernorm; it has layernorm1p'),
    ({'norm': 'layernorm1p'}, 'nemotron: model.mlp.activation: swiglu; it has relu2'),
    ({'rope_fraction': 0.5}, 'llama: model.rope_fraction: 0.5; it rotates whole heads'),
    ({'attention': AttentionConfig(heads=6, kv_heads=2, head_dim=4)}, 'llama: model.attention.heads: 6 does not divide model.d_model 32'),
    ({'pattern': '*M', 'positions': 'none', 'bias': True}, 'nemotron_h: model.bias: true; its attention has no biases'),
    ({'pattern': '*M', 'positions': 'none', 'tied': True}, 'nemotron_h: model.tied: true; it never ties'),
    ({'pattern': '*M', 'positions': 'none', 'mamba2': Mamba2Config(8, 4, 2, 4, dt_max=0.1)}, 'nemotron_h: model.mamba2.dt_max: 0.1; it has no upper'),
    ({'pattern': 'MM', 'd_model': 24, 'tied': True}, 'mamba2: model.mamba2: heads . head_dim = 32 is no multiple of model.d_model 24'),
    ({'pattern': 'mm', 'd_model': 24}, 'mamba: model.mamba.d_inner: 32 is no multiple'),
    ({'pattern': '*M'}, 'nemotron_h: model.positions: rope; its attention has none'),
  ],
)  # fmt: skip
def test_what_no_family_has_is_refused_with_the_reasons(changes, says):
  model = tiny.change(TRANSFORMER, **changes)
  validate(Config(model=model))
  with pytest.raises(ConfigError, match=says) as caught:
    write_config(model, 64)
  assert '\n' not in str(caught.value)


def test_limits_of_dt_are_left_out_where_there_are_none():
  assert 'time_step_limit' not in write_config(ModelConfig(pattern='MM'), 64)
  limited = tiny.change(ModelConfig(pattern='MM'), mamba2=tiny.change(ModelConfig().mamba2, dt_min=0.01))
  assert write_config(limited, 64)['time_step_limit'] == [0.01, {'__float__': 'Infinity'}]
