"""Checkpoints of Megatron-LM, in the layout that its mixer, attention and MLP give a rank: put together they are the whole model."""

import argparse
import enum
import pathlib
import sys
import types

import convert_hf
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lmscale.config import Config, ModelConfig
from lmscale.data.tokenizer import ByteTokenizer
from lmscale.errors import ConfigError
from lmscale.interop import tokenizer_folder
from lmscale.interop.megatron import import_megatron
from lmscale.interop.shards import ToWrite, write_shards
from lmscale.models import model as model_lib
from lmscale.train import stored
from lmscale.train.model_folder import open_model

HYBRID = tiny.change(tiny.MODEL, pattern='M-m*', positions='none', mlp=tiny.change(tiny.MODEL.mlp, activation='gelu'))
GPT = tiny.change(tiny.MODEL, pattern='*-*-', norm='layernorm1p', bias=True, mlp=tiny.change(tiny.MODEL.mlp, activation='relu2'))
GATED = tiny.change(GPT, norm='rmsnorm', bias=False, tied=True, mlp=tiny.MODEL.mlp)


def values_of(model: ModelConfig) -> dict:
  """Canonical parameters, every number different."""
  specs = model_lib.param_specs(model)
  tree = stored.named({**specs, 'layers': {str(i): layer for i, layer in enumerate(specs['layers'])}})
  return {name: np.random.default_rng(list(name.encode())).normal(size=spec.shape).astype(np.float32) for name, spec in tree.items()}


def column(parts: list[np.ndarray], rank: int, ranks: int) -> np.ndarray:
  """Each part cut by itself along its first dim."""
  return np.concatenate([np.split(part, ranks)[rank] for part in parts])


def qkv(model: ModelConfig, q: np.ndarray, k: np.ndarray, v: np.ndarray, rank: int, ranks: int) -> np.ndarray:
  """Megatron's: for each query group its queries, its key, its value; groups are cut over the ranks."""
  c = model.attention
  each = [part.reshape(c.kv_heads, -1, *part.shape[1:]) for part in (q, k, v)]
  return np.split(np.concatenate(each, axis=1), ranks)[rank].reshape(-1, *q.shape[1:])


def mixer2(p: dict, rank: int, ranks: int) -> dict:
  def cut(*names, turn=lambda a: a):
    return column([turn(p[name]) for name in names], rank, ranks)

  in_proj = [p[f'{name}_kernel'].T for name in ('z', 'x', 'B', 'C', 'dt')]
  return {
    'in_proj.weight': column(in_proj, rank, ranks),
    'conv1d.weight': cut(*(f'conv_{n}_kernel' for n in 'xBC'), turn=lambda a: a.T[:, None]),
    'conv1d.bias': cut(*(f'conv_{n}_bias' for n in 'xBC')),
    'dt_bias': cut('dt_bias'), 'A_log': cut('A_log'), 'D': cut('D'), 'norm.weight': cut('gate_norm_scale'),
    'out_proj.weight': np.split(p['out_kernel'].T, ranks, axis=1)[rank],
  }  # fmt: skip


def mixer1(p: dict, rank: int, ranks: int) -> dict:
  return {
    'in_proj.weight': column([p['x_kernel'].T, p['z_kernel'].T], rank, ranks),
    'conv1d.weight': column([p['conv_kernel'].T[:, None]], rank, ranks),
    'conv1d.bias': column([p['conv_bias']], rank, ranks),
    'x_proj.weight': np.split(p['bcdt_kernel'].T, ranks, axis=1)[rank],
    'dt_proj.weight': column([p['dt_kernel'].T], rank, ranks),
    'dt_proj.bias': column([p['dt_bias']], rank, ranks),
    'A_log': column([p['A_log']], rank, ranks), 'D': column([p['D']], rank, ranks),
    'out_proj.weight': np.split(p['out_kernel'].T, ranks, axis=1)[rank],
  }  # fmt: skip


def attention(model: ModelConfig, p: dict, rank: int, ranks: int) -> dict:
  made = {
    'linear_qkv.weight': qkv(model, p['q_kernel'].T, p['k_kernel'].T, p['v_kernel'].T, rank, ranks),
    'linear_proj.weight': np.split(p['out_kernel'].T, ranks, axis=1)[rank],
    'linear_qkv._extra_state': np.zeros(3, np.float32),
  }
  if model.bias:
    made |= {'linear_qkv.bias': qkv(model, p['q_bias'], p['k_bias'], p['v_bias'], rank, ranks), 'linear_proj.bias': p['out_bias']}
  return made


def mlp(model: ModelConfig, p: dict, rank: int, ranks: int) -> dict:
  first = [name for name in ('gate', 'up') if f'{name}_kernel' in p]
  made = {
    'linear_fc1.weight': column([p[f'{name}_kernel'].T for name in first], rank, ranks),
    'linear_fc2.weight': np.split(p['down_kernel'].T, ranks, axis=1)[rank],
  }
  if model.bias:
    made |= {'linear_fc1.bias': column([p[f'{name}_bias'] for name in first], rank, ranks), 'linear_fc2.bias': p['down_bias']}
  return made


def rank_of(model: ModelConfig, values: dict, rank: int, ranks: int, stage: range, fused: bool, padding: int = 0) -> dict:
  """The tensors of one rank. stage: the layers of theirs; fused: norms lie with the projection behind them."""
  blocks = '-' in model.layers and '*' in model.layers and len(model.layers) == 2 * model.layers.count('-')
  outer = {}

  def vocabulary(a):
    return np.split(np.concatenate([a, np.full((padding, a.shape[1]), 7, np.float32)]), ranks)[rank]

  depth = len(model.layers) // (2 if blocks else 1)
  if stage.start == 0:
    outer['embedding.word_embeddings.weight'] = vocabulary(values['embed/tokens'])
  if stage.stop == depth:
    final = 'final_layernorm' if blocks else 'final_norm'
    outer |= {f'decoder.{final}.{end}': values[f'final_norm/norm_{name}'] for end, name in (('weight', 'scale'), ('bias', 'bias'))
              if f'final_norm/norm_{name}' in values}  # fmt: skip
    if 'head/kernel' in values:
      outer['output_layer.weight'] = vocabulary(values['head/kernel'].T)
  for index, kind in enumerate(model.layers):
    theirs = index // 2 if blocks else index
    if theirs not in stage:
      continue
    p = {name.split('/')[2]: a for name, a in values.items() if name.startswith(f'layers/{index}/')}
    make, place, alone, inner = {
      'M': (lambda: mixer2(p, rank, ranks), 'mixer', 'norm.', 'mixer.in_proj.layer_norm_'),  # noqa: B023 (called at once)
      'm': (lambda: mixer1(p, rank, ranks), 'mixer', 'norm.', 'mixer.in_proj.layer_norm_'),  # noqa: B023
      '*': (lambda: attention(model, p, rank, ranks), 'self_attention', 'input_layernorm.', 'self_attention.linear_qkv.layer_norm_'),  # noqa: B023
      '-': (lambda: mlp(model, p, rank, ranks), 'mlp', 'pre_mlp_layernorm.', 'mlp.linear_fc1.layer_norm_'),  # noqa: B023
    }[kind]
    prefix = f'decoder.layers.{theirs - stage.start}.'
    outer |= {f'{prefix}{place}.{name}': a for name, a in make().items()}
    outer |= {f'{prefix}{inner if fused else alone}{end}': p[f'norm_{name}'] for end, name in (('weight', 'scale'), ('bias', 'bias'))
              if f'norm_{name}' in p}  # fmt: skip
  return outer


def write_safe(folder: pathlib.Path, tensors: dict) -> None:
  folder.mkdir(parents=True)
  write_shards(folder, [ToWrite(a.shape, a.dtype, lambda a=a: a, name) for name, a in tensors.items()], 10**9)


def write_all(folder, model, ranks, stages, fused=True, padding=0, write=write_safe):
  """A checkpoint of `ranks` tensor-parallel ranks and stages of so many layers of theirs; returns the values."""
  values, start = values_of(model), 0
  for p, size in enumerate(stages):
    for t in range(ranks):
      name = f'mp_rank_{t:02}' + f'_{p:03}' * (len(stages) > 1)
      write(folder / name, rank_of(model, values, t, ranks, range(start, start + size), fused, padding))
    start += size
  return values


def assert_imported(folder, values) -> None:
  with open_model(folder).rows() as rows:
    assert rows.shapes.keys() == values.keys()
    for name, value in values.items():
      np.testing.assert_array_equal(rows.read(name), value, name)


@pytest.mark.parametrize(
  ('model', 'ranks', 'stages', 'fused'),
  [
    (HYBRID, 1, (4,), True), (HYBRID, 2, (4,), False), (HYBRID, 2, (1, 3), True), (GPT, 2, (2,), True), (GPT, 1, (1, 1), False), (GATED, 2, (2,), False),
  ],
)  # fmt: skip
def test_the_shares_of_all_ranks_are_the_whole_model(tmp_path, model, ranks, stages, fused):
  values = write_all(tmp_path / 'theirs', model, ranks, stages, fused)
  config, notes = import_megatron(tmp_path / 'theirs', tmp_path / 'run', Config(model=model))
  assert config.model == model and len(notes) == 1
  assert_imported(tmp_path / 'run', values)


def test_a_release_is_found_and_its_vocabulary_and_tokenizer_fit(tmp_path):
  model = tiny.change(HYBRID, vocab=260)
  values = write_all(tmp_path / 'theirs' / 'release', model, 2, (4,), padding=12)
  (tmp_path / 'theirs' / 'latest_checkpointed_iteration.txt').write_text('release\n')
  (tmp_path / 'words').mkdir()
  tokenizer_folder.write(Config(), ByteTokenizer(), tmp_path / 'words')
  words = tmp_path / 'words' / 'mine.json'
  (tmp_path / 'words' / 'tokenizer.json').rename(words)
  config, notes = import_megatron(tmp_path / 'theirs', tmp_path / 'run', Config(model=model), dtype='bf16', tokenizer=str(words))
  assert notes == [f'{name}: 12 rows beyond model.vocab 260 are left out' for name in ('embedding.word_embeddings.weight', 'output_layer.weight')]
  assert config.data.tokenizer == str(tmp_path / 'run' / 'tokenizer' / 'mine.json')
  assert open_model(tmp_path / 'run').config.data.tokenizer == config.data.tokenizer
  kept = {name: a.astype(jnp.bfloat16) for name, a in values.items() if 'norm' not in name and name.rpartition('/')[2] not in ('A_log', 'D', 'dt_bias')}
  assert_imported(tmp_path / 'run', values | kept)


@pytest.mark.parametrize(
  ('spoil', 'says'),
  [
    (lambda f: (f / 'mp_rank_01' / 'model.safetensors').unlink(), 'mp_rank_01: neither model.safetensors nor model_optim_rng.pt'),
    (lambda f: (f / 'mp_rank_01').rename(f / 'mp_rank_02'), 'expected mp_rank_00, mp_rank_01, ... of all ranks'),
    (lambda f: (f / 'mp_rank_00' / 'model.safetensors').write_bytes(b'x'), 'damaged or unsupported'),
    (lambda f: [(f / f'mp_rank_0{i}').rename(f / f'x{i}') for i in range(2)], 'neither mp_rank_00 nor a readable latest'),
    (lambda f: (f / 'mp_rank_01' / 'model.safetensors').rename(f / 'mp_rank_01' / 'model_optim_rng.pt'), 'a pickle is not read unless --torch'),
  ],
)
def test_what_is_no_checkpoint_is_one_line(tmp_path, spoil, says):
  write_all(tmp_path / 'theirs', HYBRID, 2, (4,))
  spoil(tmp_path / 'theirs')
  with pytest.raises(ConfigError, match=says) as caught:
    import_megatron(tmp_path / 'theirs', tmp_path / 'run', Config(model=HYBRID))
  assert '\n' not in str(caught.value) and not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('changes', 'says'),
  [
    ({'d_model': 24}, r'word_embeddings.weight has shape \[20, 16\] in mp_rank_00; the model of --config gives \[20, 24\]'),
    ({'pattern': 'M-m'}, "unused 'decoder.layers.3.self_attention.linear_proj.weight'"),
    ({'pattern': 'M-m*M'}, "missing 'decoder.layers.4."),
    ({'mamba2': tiny.change(HYBRID.mamba2, groups=1, state=8)}, 'in_proj.weight: 2 ranks do not divide model.mamba2.groups 1'),
  ],
)
def test_another_model_is_refused(tmp_path, changes, says):
  write_all(tmp_path / 'theirs', HYBRID, 2, (4,))
  with pytest.raises(ConfigError, match=says):
    import_megatron(tmp_path / 'theirs', tmp_path / 'run', Config(model=tiny.change(HYBRID, **changes)))


def test_a_tracker_names_no_path(tmp_path):
  (tmp_path / 'latest_checkpointed_iteration.txt').write_text('../../etc')
  with pytest.raises(ConfigError, match="'../../etc' is neither release nor an iteration"):
    import_megatron(tmp_path, tmp_path / 'run', Config(model=HYBRID))


def test_the_command(tmp_path, capsys):
  write_all(tmp_path / 'theirs' / 'iter_0000012', HYBRID, 1, (4,))
  (tmp_path / 'theirs' / 'latest_checkpointed_iteration.txt').write_text('12')
  import json

  from lmscale.config import to_dict

  (tmp_path / 'recipe.json').write_text(json.dumps(to_dict(Config(model=HYBRID))))
  argv = ['megatron', str(tmp_path / 'theirs'), str(tmp_path / 'run'), f'--config={tmp_path / "recipe.json"}']
  assert convert_hf.main(argv) == 0
  assert capsys.readouterr().out.startswith(f'{tmp_path / "run"}: 4 layers, ')
  assert convert_hf.main([*argv[:-1], f'--config={tmp_path / "none.json"}']) == 2


class ModelType(enum.Enum):
  encoder = 1


class Danger:
  def __reduce__(self):
    return print, ('code was run',)


@pytest.fixture
def pickled(monkeypatch):
  """Writes ranks as Megatron does: torch.save of tensors beside arguments and enumerations."""
  torch = pytest.importorskip('torch')
  module = types.ModuleType('megatron.core.enums')
  monkeypatch.setattr(ModelType, '__module__', 'megatron.core.enums')
  module.ModelType = ModelType
  for name, found in (('megatron', types.ModuleType('megatron')), ('megatron.core', types.ModuleType('megatron.core')), ('megatron.core.enums', module)):
    monkeypatch.setitem(sys.modules, name, found)

  def write(folder, tensors, **more):
    folder.mkdir(parents=True)
    model = {name: torch.from_numpy(np.ascontiguousarray(a)).to(torch.bfloat16) for name, a in tensors.items()}
    about = argparse.Namespace(hidden_size=16, model_type=ModelType.encoder, params_dtype=torch.bfloat16)
    torch.save({'args': about, 'checkpoint_version': 3.0, 'iteration': 5, 'model': model, **more}, folder / 'model_optim_rng.pt')

  return write


def test_torch_files_are_read_where_that_is_asked_for(tmp_path, pickled):
  values = write_all(tmp_path / 'theirs', HYBRID, 2, (4,), write=pickled)
  with pytest.raises(ConfigError, match='a pickle is not read unless --torch says so'):
    import_megatron(tmp_path / 'theirs', tmp_path / 'run', Config(model=HYBRID))
  import_megatron(tmp_path / 'theirs', tmp_path / 'run', Config(model=HYBRID), pickled=True)
  assert_imported(tmp_path / 'run', {name: a.astype(jnp.bfloat16) for name, a in values.items()})


def test_code_in_a_torch_file_is_not_run(tmp_path, pickled, capsys):
  pickled(tmp_path / 'theirs' / 'mp_rank_00', {}, danger=Danger())
  with pytest.raises(ConfigError, match='weights-only loading refuses it: .*print') as caught:
    import_megatron(tmp_path / 'theirs', tmp_path / 'run', Config(model=HYBRID), pickled=True)
  assert '\n' not in str(caught.value) and 'code was run' not in capsys.readouterr().out
