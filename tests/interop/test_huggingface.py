"""The models against Hugging Face transformers: committed weights and logits, see tools/make_goldens.py."""

import dataclasses
import functools
import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from lmscale.config import ModelConfig, RopeScalingConfig
from lmscale.errors import ConfigError
from lmscale.interop import huggingface
from lmscale.models import model as model_lib
from lmscale.models.context import Context, plain_context

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens'
NAMES = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())
RECURRENT = [name for name in NAMES if 'mamba' in name or 'bamba' in name or 'nemotron_h' in name]
FLOORS = {'nemotron_h_floor': 0.06}  # of dt: time_step_min, which its plain path goes by
TOLERANCE = 1e-4  # maximum absolute difference of logits whose standard deviation is 0.75


def config_values(name: str) -> dict:
  return json.loads((GOLDENS / name / 'config.json').read_text())


def load(name: str) -> tuple[ModelConfig, dict]:
  """As transformers computes it without its fused kernels, with which the goldens were made."""
  return huggingface.load(GOLDENS / name, FLOORS.get(name))


def tensors(name: str) -> dict[str, np.ndarray]:
  return load_file(GOLDENS / name / 'model.safetensors')


def expected(name: str) -> tuple[np.ndarray, np.ndarray]:
  """Tokens [2, t] and logits [2, t, vocab] of transformers."""
  io = load_file(GOLDENS / name / 'io.safetensors')
  return io['tokens'], io['logits']


def with_chunk(config: ModelConfig, chunk: int) -> ModelConfig:
  return dataclasses.replace(
    config,
    mamba2=dataclasses.replace(config.mamba2, chunk=chunk),
    mamba=dataclasses.replace(config.mamba, chunk=chunk),
  )


@functools.partial(jax.jit, static_argnums=0)
def run(config: ModelConfig, params: dict, tokens: np.ndarray, ctx: Context) -> jax.Array:
  hidden, _ = model_lib.forward(config, params, tokens, ctx)
  return model_lib.logits(config, params, hidden)


def difference(ours: jax.Array, theirs: np.ndarray, what: str) -> float:
  worst = float(np.abs(np.asarray(ours) - theirs).max())
  print(f'{what}: max |difference| {worst:.2e}, logits std {theirs.std():.2f}')
  return worst


def test_every_family_has_a_golden():
  kinds = {config_values(name)['model_type'] for name in NAMES}
  assert kinds == {'nemotron', 'nemotron_h', 'mamba', 'mamba2', 'llama', 'bamba'}


@pytest.mark.parametrize('name', NAMES)
def test_logits_equal(name):
  config, params = load(name)
  tokens, logits = expected(name)
  assert difference(run(config, params, tokens, plain_context(tokens)), logits, name) <= TOLERANCE


@pytest.mark.parametrize('name', NAMES)
def test_greedy_generation_agrees(name):
  config, params = load(name)
  want = load_file(GOLDENS / name / 'io.safetensors')['greedy']
  tokens, steps = expected(name)[0].copy(), want.shape[1]
  for at in range(tokens.shape[1] - steps, tokens.shape[1]):  # one program for all lengths: later tokens do not matter
    tokens[:, at] = np.argmax(run(config, params, tokens, plain_context(tokens))[:, at - 1], axis=-1)
  np.testing.assert_array_equal(tokens[:, -steps:], want)


@pytest.mark.parametrize(
  ('name', 'off'),
  [
    ('llama_scaled', {'rope_scaling': RopeScalingConfig()}),
    ('bamba', {'rope_fraction': 1.0}),
  ],
)
def test_what_the_positions_say_matters(name, off):
  config, params = load(name)
  tokens, logits = expected(name)
  ours = run(dataclasses.replace(config, **off), params, tokens, plain_context(tokens))
  assert difference(ours, logits, name) > 50 * TOLERANCE


@pytest.mark.parametrize('name', FLOORS)
def test_the_other_limit_of_dt_matters(name):
  config, params = huggingface.load(GOLDENS / name)
  tokens, logits = expected(name)
  assert difference(run(config, params, tokens, plain_context(tokens)), logits, name) > 50 * TOLERANCE


@pytest.mark.parametrize('chunk', [5, 16])
@pytest.mark.parametrize('name', RECURRENT)
def test_logits_equal_at_chunks_that_do_not_divide_the_length(name, chunk):
  config, params = load(name)
  tokens, logits = expected(name)
  assert tokens.shape[1] % chunk and tokens.shape[1] > chunk
  ours = run(with_chunk(config, chunk), params, tokens, plain_context(tokens))
  assert difference(ours, logits, f'{name}, chunk {chunk}') <= TOLERANCE


@pytest.mark.parametrize('name', NAMES)
def test_packed_documents_equal_the_documents_alone(name):
  config, params = load(name)
  tokens, logits = expected(name)
  first, second, padding = 7, 9, 2  # the border falls inside a chunk of 5
  lengths = (first, second, padding)
  row = np.concatenate([tokens[0, :first], tokens[1, :second], np.zeros(padding, np.int32)])[None]
  segments = np.repeat(np.array([1, 2, 0], np.int32), lengths)[None]
  positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None]
  ours = run(with_chunk(config, 5), params, row, Context(positions, segments))[0]
  assert difference(ours[:first], logits[0, :first], f'{name}, first document') <= TOLERANCE
  assert difference(ours[first : first + second], logits[1, :second], f'{name}, second') <= TOLERANCE


@pytest.mark.parametrize('name', NAMES)
def test_tree_is_the_canonical_one(name):
  config, params = load(name)
  specs = model_lib.param_specs(config)
  assert jax.tree.map(lambda a: a.shape, params) == jax.tree.map(lambda s: s.shape, specs)
  assert {a.dtype for a in jax.tree.leaves(params)} == {np.dtype(np.float32)}
  stored = sum(array.size for array in tensors(name).values())
  assert sum(a.size for a in jax.tree.leaves(params)) == stored


def test_mamba2_parts_put_together_again_are_the_packed_tensors():
  stored = tensors('mamba2')
  _, params = huggingface.load(GOLDENS / 'mamba2')
  layer = params['layers'][1]
  packed = np.concatenate([layer[f'{part}_kernel'] for part in ('z', 'x', 'B', 'C', 'dt')], axis=1)
  np.testing.assert_array_equal(packed.T, stored['backbone.layers.1.mixer.in_proj.weight'])
  kernel = np.concatenate([layer[f'conv_{part}_kernel'] for part in 'xBC'], axis=1)
  np.testing.assert_array_equal(kernel.T[:, None], stored['backbone.layers.1.mixer.conv1d.weight'])
  bias = np.concatenate([layer[f'conv_{part}_bias'] for part in 'xBC'])
  np.testing.assert_array_equal(bias, stored['backbone.layers.1.mixer.conv1d.bias'])


def test_nemotron_norms_keep_the_stored_offset():
  config, params = huggingface.load(GOLDENS / 'nemotron')
  assert config.norm == 'layernorm1p'
  np.testing.assert_array_equal(params['final_norm']['norm_scale'], tensors('nemotron')['model.norm.weight'])
  np.testing.assert_array_equal(
    params['layers'][3]['norm_bias'], tensors('nemotron')['model.layers.1.post_attention_layernorm.bias']
  )


@pytest.mark.parametrize('prefix', ['model.', 'backbone.', ''])
def test_prefix_makes_no_difference(prefix):
  renamed = {name.replace('backbone.', prefix): array for name, array in tensors('nemotron_h').items()}
  _, params = huggingface.load_weights(renamed, config_values('nemotron_h'))
  _, same = huggingface.load(GOLDENS / 'nemotron_h')
  jax.tree.map(np.testing.assert_array_equal, params, same)


def test_half_precision_becomes_float32():
  half = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors('mamba').items()}
  _, params = huggingface.load_weights(half, config_values('mamba'))
  tokens = params['embed']['tokens']
  assert tokens.dtype == np.float32
  np.testing.assert_array_equal(tokens, half['backbone.embeddings.weight'].astype(np.float32))


def test_constant_of_older_llama_files_is_ignored():
  stored = tensors('llama') | {'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(5, np.float32)}
  huggingface.load_weights(stored, config_values('llama'))


def test_head_beside_a_tied_embedding():
  stored = tensors('mamba')
  head = stored['backbone.embeddings.weight']
  _, params = huggingface.load_weights(stored | {'lm_head.weight': head}, config_values('mamba'))
  assert 'head' not in params
  with pytest.raises(ConfigError, match='tie_word_embeddings: .*lm_head.weight differs'):
    huggingface.load_weights(stored | {'lm_head.weight': head + 1}, config_values('mamba'))


@pytest.mark.parametrize('name', NAMES)
def test_each_missing_tensor_is_named(name):
  stored, values = tensors(name), config_values(name)
  for missing in stored:
    short = missing.removeprefix('model.').removeprefix('backbone.')
    with pytest.raises(ConfigError, match=f"missing '{short}'$"):
      huggingface.load_weights({k: v for k, v in stored.items() if k != missing}, values)


def test_missing_and_unused_tensors_are_listed_on_one_line():
  stored = tensors('llama')
  stored['model.layers.0.mlp.extra\n\x1b[31m'] = stored.pop('model.norm.weight')
  for i in range(7):
    stored[f'more.{i}'] = np.zeros(1, np.float32)
  with pytest.raises(ConfigError) as error:
    huggingface.load_weights(stored, config_values('llama'))
  line = str(error.value)
  assert "missing 'norm.weight'; unused 'layers.0.mlp.extra\\n\\x1b[31m'" in line and 'and 3 more' in line
  assert line.isprintable()


def test_tensor_under_two_prefixes():
  stored = tensors('mamba2')
  stored['model.norm_f.weight'] = stored['backbone.norm_f.weight']
  with pytest.raises(ConfigError, match="'norm_f.weight' occurs under two prefixes"):
    huggingface.load_weights(stored, config_values('mamba2'))


def test_wrong_shape_and_values_that_are_not_finite():
  stored, values = tensors('mamba2'), config_values('mamba2')
  with pytest.raises(ConfigError, match=r'lm_head.weight has shape \[97, 27\], but config.json gives \[98, 27\]'):
    huggingface.load_weights(
      stored | {'backbone.embeddings.weight': np.zeros((98, 27), np.float32)}, values | {'vocab_size': 98}
    )
  broken = stored['backbone.layers.0.mixer.D'].copy()
  broken[2] = np.nan
  with pytest.raises(ConfigError, match='layers.0.mixer.D has values that are not finite'):
    huggingface.load_weights(stored | {'backbone.layers.0.mixer.D': broken}, values)


def test_missing_tensors_of_a_huge_config_take_no_memory():
  huge = dict.fromkeys(('vocab_size', 'mamba_num_heads', 'mamba_head_dim', 'n_groups', 'intermediate_size'), 1 << 26)
  with pytest.raises(ConfigError, match='missing'):
    huggingface.load_weights({}, config_values('nemotron_h') | huge)
