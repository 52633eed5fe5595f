"""What is exported, in transformers itself. Skipped where it is not installed (the extra `hf`); the goldens stand for it there."""

import json
import pathlib

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from lmscale.config import AttentionConfig, Config, RopeScalingConfig, recipes, validate
from lmscale.interop import huggingface
from lmscale.interop.exporting import export_model
from lmscale.interop.huggingface_write import same_function, write_config
from lmscale.interop.importing import import_model
from lmscale.models import model as model_lib
from lmscale.models.context import plain_context
from lmscale.models.positions import attention_factor, rope_frequencies
from lmscale.train import stored
from lmscale.train.changes import changed_function
from lmscale.train.model_folder import open_model, write_model
from lmscale.train.streamed import Pending

ROOT = pathlib.Path(__file__).parents[2]
GOLDENS = ROOT / 'tests' / 'goldens'
NAMES = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())
FLOORS = {'nemotron_h_floor': 0.06}  # of dt: time_step_min, which its plain path goes by
TOLERANCE = 1e-4


def load(folder: pathlib.Path):
  """The model as transformers reads it; no tensor may be missing or left over."""
  loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation='eager', output_loading_info=True, local_files_only=True
  )
  assert not any(info.values()), info
  return loaded.eval()


def logits_of(loaded, tokens: np.ndarray) -> np.ndarray:
  with torch.no_grad():
    return loaded(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()


def write_run(folder: pathlib.Path, config: Config, params: dict, tokenizer: str | None = None) -> None:
  """A folder as of a run that was trained here: nothing in it knows of transformers."""
  tree = {'params': {**params, 'layers': {str(i): layer for i, layer in enumerate(params['layers'])}}}
  leaves = {name: np.asarray(array) for name, array in stored.named(tree).items()}
  write_model(folder, config, {n: Pending(a.shape, a.dtype, lambda a=a: a) for n, a in leaves.items()}, {}, tokenizer)


@pytest.mark.parametrize('name', NAMES)
def test_an_export_of_our_own_has_equal_logits_and_generates_the_same(tmp_path, name):
  model, params = huggingface.load(GOLDENS / name, FLOORS.get(name))
  write_run(tmp_path / 'run', Config(model=model), params)
  values, _ = export_model(tmp_path / 'run', tmp_path / 'out', tokenizer=False, shard_size=20_000)
  assert 'transformers_version' not in values
  loaded, io = load(tmp_path / 'out'), load_file(GOLDENS / name / 'io.safetensors')
  assert np.abs(logits_of(loaded, io['tokens']) - io['logits']).max() <= TOLERANCE
  prompt = torch.from_numpy(io['tokens'][:, : -io['greedy'].shape[1]]).long()
  options = {'do_sample': False, 'use_cache': False, 'max_new_tokens': io['greedy'].shape[1], 'pad_token_id': 0, 'eos_token_id': None}
  whole = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), **options).numpy()
  np.testing.assert_array_equal(whole[:, prompt.shape[1] :], io['greedy'])


@pytest.mark.parametrize('name', NAMES)
def test_an_import_that_is_exported_again_loads_in_half_precision(tmp_path, name):
  import_model(GOLDENS / name, tmp_path / 'run', dtype='bf16')
  export_model(tmp_path / 'run', tmp_path / 'out', dtype='bf16')
  loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out', output_loading_info=True, local_files_only=True)
  assert not any(info.values()) and loaded.dtype == torch.bfloat16


BASE = tiny.change(tiny.MODEL, d_model=24, vocab=61, init_std=0.4)
GELU = tiny.change(tiny.MODEL.mlp, activation='gelu_tanh')
SSD = tiny.MODEL.mamba2
LLAMA3 = RopeScalingConfig('llama3', 4.0, 16, (1.0, 3.0))
SCALED = (RopeScalingConfig('linear', 4.0), RopeScalingConfig('ntk', 4.0), RopeScalingConfig('yarn', 4.0, 16, (1.0, 3.0)),
          RopeScalingConfig('longrope', 4.0, 16, (), (1.0, 1.5, 2.0, 2.5, 4.0)))


@pytest.mark.parametrize(
  'model',
  [
    tiny.change(BASE, pattern='*-*-', bias=True, tied=True, mlp=tiny.change(tiny.MODEL.mlp, activation='geglu')),
    tiny.change(BASE, pattern='*-', attention=AttentionConfig(3, 1, 10), rope_base=77.0),
    tiny.change(BASE, pattern='*-', norm='layernorm1p', mlp=GELU, attention=AttentionConfig(3, 3, 10), rope_fraction=0.6, bias=True,
                rope_scaling=LLAMA3),
    tiny.change(BASE, pattern='M-*-', attention=AttentionConfig(3, 1, 10), rope_fraction=0.6, bias=True, tied=True,
                mamba2=tiny.change(SSD, heads=6, head_dim=8, groups=6)),
    tiny.change(BASE, pattern='M-M-', positions='none', mamba2=tiny.change(SSD, heads=6, groups=1, dt_max=0.5)),
    tiny.change(BASE, pattern='*-', rope_fraction=1.0, rope_scaling=LLAMA3),
    *(tiny.change(BASE, pattern='*-', attention=AttentionConfig(3, 1, 10), rope_scaling=scaling) for scaling in SCALED),
    tiny.change(BASE, pattern='MM*--*', positions='none', mlp=GELU, attention=AttentionConfig(3, 1, 10), mamba2=tiny.change(SSD, dt_min=0.7)),
    tiny.change(BASE, pattern='-M', positions='none', mlp=GELU), tiny.change(BASE, pattern='M', tied=True, mamba2=tiny.change(SSD, heads=12, head_dim=4, groups=3, conv=2)),
    tiny.change(BASE, pattern='mm', tied=True, mamba=tiny.change(tiny.MODEL.mamba, d_inner=72, dt_rank=5, conv=2)),
  ],
  ids=lambda model: model.pattern,
)  # fmt: skip
def test_odd_models_of_our_own_have_equal_logits(tmp_path, model):
  validate(Config(model=model))
  params = jax.tree.map(lambda a: a + 0.2 * np.random.default_rng(a.size).standard_normal(a.shape, np.float32), model_lib.init_layers(model, seed=5))
  write_run(tmp_path / 'run', Config(model=model), params)
  export_model(tmp_path / 'run', tmp_path / 'out', tokenizer=False)
  tokens = np.random.default_rng(0).integers(0, model.vocab, (2, 27), dtype=np.int32)
  hidden, _ = model_lib.forward(model, params, tokens, plain_context(tokens))
  ours = np.asarray(model_lib.logits(model, params, hidden))
  assert np.abs(logits_of(load(tmp_path / 'out'), tokens) - ours).max() <= TOLERANCE * max(1.0, ours.std())
  again, notes = import_model(tmp_path / 'out', tmp_path / 'back')
  assert changed_function(Config(model=model), again) == [] and len(notes) == 1


def test_scaled_frequencies_are_those_of_transformers():
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

  random = np.random.default_rng(0)
  for i in range(60):
    kind, pairs = ('linear', 'yarn', 'llama3', 'longrope')[i % 4], int(random.integers(2, 33))
    low, length = random.uniform(0.5, 4), int(random.integers(16, 9000))
    turns = (low, low * random.uniform(1.2, 40)) if kind in ('yarn', 'llama3') else ()
    factors = tuple(random.uniform(1, 60, pairs).tolist()) if kind == 'longrope' else ()
    scaling = RopeScalingConfig(kind, random.uniform(1.5, 40), 0 if kind == 'linear' else length, turns, factors)
    model = tiny.change(BASE, pattern='*-', attention=AttentionConfig(3, 1, 2 * pairs), rope_base=10 ** random.uniform(2, 6), rope_scaling=scaling)
    validate(Config(model=model))
    theirs = transformers.LlamaConfig(**write_config(model, length=10_000))
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](theirs, seq_len=2 * length)
    np.testing.assert_allclose(rope_frequencies(model, 2 * pairs), frequencies.numpy(), rtol=2e-6)
    assert factor == attention_factor(scaling)


@pytest.mark.parametrize('arch', ['transformer', 'mamba', 'mamba2', 'hybrid'])
def test_the_architectures_of_the_study_go_to_transformers_and_back(tmp_path, arch):
  config = recipes.load(f'{ROOT}/configs/mamba_study.py:arch={arch},size=tiny', [])
  model = config.model
  params = model_lib.init_layers(model, seed=3)
  write_run(tmp_path / 'run', config, params, 'bytes-v1')
  values, notes = export_model(tmp_path / 'run', tmp_path / 'out')
  assert values['vocab_size'] == model.vocab and values['eos_token_id'] == 256
  loaded, tokens = load(tmp_path / 'out'), np.random.default_rng(0).integers(0, 257, (2, 19), dtype=np.int32)
  hidden, _ = model_lib.forward(model, params, tokens, plain_context(tokens))
  assert np.abs(logits_of(loaded, tokens) - np.asarray(model_lib.logits(model, params, hidden))).max() <= TOLERANCE
  words = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out', local_files_only=True)
  text = 'def é(): 你\n\t"""x"""  '
  assert words(text)['input_ids'] == list(text.encode()) and words.decode(list(text.encode())) == text
  assert words.eos_token_id == 256
  loaded.save_pretrained(tmp_path / 'theirs')
  words.save_pretrained(tmp_path / 'theirs')
  again, notes = import_model(tmp_path / 'theirs', tmp_path / 'back')
  assert notes == [] and again.data.tokenizer == 'bytes' and open_model(tmp_path / 'back').tokenizer == 'bytes-v1'
  assert same_function(json.loads((tmp_path / 'theirs' / 'config.json').read_text()), model)
  assert changed_function(config, again) == []
  export_model(tmp_path / 'back', tmp_path / 'again', tokenizer=False)
  a, b = (load_file(tmp_path / folder / 'model.safetensors') for folder in ('out', 'again'))
  assert {n.partition('.')[2]: x.tobytes() for n, x in a.items()} == {n.partition('.')[2]: x.tobytes() for n, x in b.items()}
