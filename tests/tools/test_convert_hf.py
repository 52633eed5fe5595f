"""The command: what it says, and every malformed folder that it refuses in one line with nothing written."""

import json
import pathlib
import pickle
import shutil
import struct

import convert_hf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lmscale.interop import folder as folder_lib

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens'


@pytest.fixture
def source(tmp_path) -> pathlib.Path:
  return shutil.copytree(GOLDENS / 'mamba', tmp_path / 'hf')


def change_config(**changes):
  def spoil(folder):
    path = folder / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

  return spoil


def text(name, content):
  return lambda folder: (folder / name).write_text(content)


def remove(name):
  return lambda folder: (folder / name).unlink()


def raw(change):
  def spoil(folder):
    path = folder / 'model.safetensors'
    path.write_bytes(change(path.read_bytes()))

  return spoil


def tensors(change):
  def spoil(folder):
    arrays = load_file(folder / 'model.safetensors')
    change(arrays)
    save_file(arrays, folder / 'model.safetensors')

  return spoil


def header(change):
  """Rewrites the JSON header of the file."""

  def rewrite(data):
    size = struct.unpack('<Q', data[:8])[0]
    values = json.loads(data[8 : 8 + size])
    change(values)
    new = json.dumps(values).encode()
    return struct.pack('<Q', len(new)) + new + data[8 + size :]

  return raw(rewrite)


def index(weight_map):
  def spoil(folder):
    arrays = load_file(folder / 'model.safetensors')
    (folder / 'model.safetensors').rename(folder / 'one.safetensors')
    names = weight_map(arrays) if callable(weight_map) else weight_map
    (folder / folder_lib.INDEX).write_text(json.dumps({'weight_map': names}))

  return spoil


def link(name):
  def spoil(folder):
    shutil.move(folder / name, folder.parent / 'outside')
    (folder / name).symlink_to(folder.parent / 'outside')

  return spoil


def nan(arrays):
  arrays['backbone.layers.1.mixer.out_proj.weight'][2, 3] = np.nan


def pickled(folder):
  (folder / 'model.safetensors').unlink()
  (folder / 'pytorch_model.bin').write_bytes(pickle.dumps({'a': 1}))


def pickled_in_place(folder):
  (folder / 'model.safetensors').write_bytes(pickle.dumps({'a': list(range(99))}))


def sums(folder):
  (folder / 'SHA256SUMS').write_text(f'{"0" * 64}  model.safetensors\n')


def long_name(arrays):
  arrays['backbone.' + 'x\n\x1b[31m' * 99] = np.zeros(1, np.float32)


CASES = [
  # 12: the tokenizer
  ('tokenizer cut', text('tokenizer.json', '{"version": "1.0", "mod'), 'tokenizer.json is damaged or no tokenizer'),
  ('tokenizer is an array', text('tokenizer.json', '[]'), 'tokenizer.json is damaged or no tokenizer'),
  ('tokenizer empty', text('tokenizer.model', ''), 'tokenizer.model is damaged or no tokenizer'),
  ('tokenizer outside', lambda f: (text('tokenizer.json', '{}')(f), link('tokenizer.json')(f)), 'a link out of the folder'),
  # 13: the weights
  ('file empty', raw(lambda data: b''), 'model.safetensors: damaged'),
  ('file cut', raw(lambda data: data[:-1]), 'model.safetensors: damaged'),
  ('file longer', raw(lambda data: data + b'x'), 'model.safetensors: damaged'),
  ('header too long', raw(lambda data: b'\xff' * 8 + data[8:]), 'model.safetensors: damaged'),
  ('header no JSON', raw(lambda data: data[:8] + b'[' * 40 + data[48:]), 'model.safetensors: damaged'),
  ('shape beyond the file', header(lambda h: h['backbone.norm_f.weight'].update(shape=[2**40])), 'model.safetensors: damaged'),
  ('offsets overlap', header(lambda h: h['backbone.norm_f.weight'].update(data_offsets=[0, 100])), 'model.safetensors: damaged'),
  ('dtype unknown', header(lambda h: h['backbone.norm_f.weight'].update(dtype='I32')), "'backbone.norm_f.weight' is I32; supported: float16"),
  ('bit flipped', sums, 'its SHA-256 is not the one in SHA256SUMS'),
  ('sums damaged', text('SHA256SUMS', 'x'), 'SHA256SUMS: not lines of a SHA-256'),
  ('file missing', remove('model.safetensors'), 'neither model.safetensors nor model.safetensors.index.json'),
  ('shard missing', index({'backbone.norm_f.weight': 'two.safetensors'}), 'two.safetensors: no such file, but model.safetensors.index.json names it'),
  ('shard a folder', lambda f: (index({'a': 'x.safetensors'})(f), (f / 'x.safetensors').mkdir()), 'x.safetensors'),
  ('not where the index says', index(lambda arrays: {**dict.fromkeys(arrays, 'one.safetensors'), 'more': 'one.safetensors'}), "'more' is not in one"),
  ('tensor missing', tensors(lambda a: a.pop('backbone.norm_f.weight')), "missing 'norm_f.weight'"),
  ('tensor more', tensors(lambda a: a.update({'../../x': np.ones(3, np.float32)})), "unused '../../x'"),
  ('tensor with a wild name', tensors(long_name), 'unused'),
  ('shape', tensors(lambda a: a.update({'backbone.norm_f.weight': np.ones(26, np.float32)})), 'norm_f.weight has shape [26], but config.json gives [25]'),
  ('NaN', tensors(nan), 'params/layers/1/out_kernel holds NaN'),
  # 14: another model, or a newer one
  ('config missing', remove('config.json'), 'config.json: No such file'),
  ('config no JSON', text('config.json', '{'), 'config.json: not JSON'),
  ('config an array', text('config.json', '[1]'), 'config.json: expected an object'),
  ('config nested', text('config.json', '[' * 100_000), 'config.json: not JSON'),
  ('type unknown', change_config(model_type='gpt2'), "model_type: 'gpt2' is not supported; supported: llama"),
  ('type a list', change_config(model_type=['mamba']), 'model_type: '),
  ('code of its own', change_config(model_type=None, auto_map={'AutoModel': 'x.Y'}), 'model_type: None is not supported'),
  ('width of another model', change_config(hidden_size=26), 'embeddings.weight has shape'),
  ('depth of another model', change_config(num_hidden_layers=2), "unused 'layers.2."),
  ('depth without end', change_config(num_hidden_layers=10**9), 'num_hidden_layers: 1000000000 is not an integer from 1'),
  ('width without end', change_config(hidden_size=2**27), 'd_model: 134217728 is more than'),
  ('quantised', change_config(quantization_config={'quant_method': 'fp8'}), 'quantization_config: '),
  # 15: paths
  ('index with ..', index({'a': '../one.safetensors'}), "'../one.safetensors' is not the plain name"),
  ('index absolute', index({'a': '/etc/one.safetensors'}), 'is not the plain name'),
  ('index no map', lambda f: (index({})(f)), 'weight_map: expected'),
  ('index no JSON', lambda f: (index({})(f), text(folder_lib.INDEX, '{')(f)), 'not JSON'),
  ('weights a link', link('model.safetensors'), 'a link out of the folder'),
  ('config a link', link('config.json'), 'a link out of the folder'),
  # 16: pickles
  ('pickle beside', pickled, 'only safetensors are read (a .bin or .pt file can run code'),
  ('pickle in place', pickled_in_place, 'model.safetensors: damaged'),
]


@pytest.mark.parametrize(('spoil', 'says'), [case[1:] for case in CASES], ids=[case[0].replace(' ', '-') for case in CASES])
def test_a_malformed_folder_is_refused_in_one_line_and_nothing_is_written(source, tmp_path, capsys, spoil, says):
  spoil(source)
  before = sorted(tmp_path.rglob('*'))
  assert convert_hf.main(['import', str(source), str(tmp_path / 'run')]) == 2
  out, err = capsys.readouterr()
  line = err.splitlines()[-1]
  assert line.startswith('error: ') and says in line and out == '' and 'Traceback' not in err
  assert line.isprintable() and len(line) < 700
  assert sorted(tmp_path.rglob('*')) == before


def test_there_and_back(source, tmp_path, capsys):
  assert convert_hf.main(['import', str(source), str(tmp_path / 'run')]) == 0
  assert convert_hf.main(['export', str(tmp_path / 'run'), str(tmp_path / 'out'), '--shard_size=20KB', '--dtype', 'bf16']) == 0
  out = capsys.readouterr().out
  assert f'{tmp_path / "run"}: 3 layers, ' in out and ' parameters, tokenizer bytes\n' in out
  assert f'{tmp_path / "out"}: MambaForCausalLM, vocabulary 97\n' in out
  assert len(list((tmp_path / 'out').glob('model-*-of-*.safetensors'))) > 1


@pytest.mark.parametrize(
  ('argv', 'says'),
  [
    ([], 'required'), (['convert', 'a', 'b'], 'invalid choice'), (['import', '{hf}'], 'RUN_FOLDER'), (['import', '{hf}', '{new}', 'x'], 'unrecognized'),
    (['import', '{hf}', '{hf}'], 'hf: exists already'), (['import', '{tmp}/none', '{new}'], 'none: no such folder'),
    (['import', '{hf}/model.safetensors', '{new}'], 'is a file; give the folder'), (['import', '{hf}', '{new}', '--dtype=int4'], "--dtype: 'int4'"),
    (['import', '{hf}', '{new}', '--dt_min=0.1'], '--dt_min: the model has no Mamba-2 layer'), (['import', '{hf}', '{new}', '--dt_min=x'], 'dt_min'),
    (['import', '{hf}', '{hf}/config.json/x'], 'cannot be written'),
    (['export', '{hf}', '{new}'], 'hf has no checkpoints'), (['export', '{tmp}/none', '{new}'], 'none: no such folder'),
    (['export', '{hf}', '{new}', '--shard_size=0'], "'0' is no size"), (['export', '{hf}', '{new}', '--shard_size=1TB'], 'is no size'),
  ],
)  # fmt: skip
def test_a_wrong_command_is_one_line(source, tmp_path, capsys, argv, says):
  places = {'hf': source, 'tmp': tmp_path, 'new': tmp_path / 'new'}
  before = sorted(tmp_path.rglob('*'))
  assert convert_hf.main([word.format(**places) for word in argv]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ') and says in line
  assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.parametrize(('said', 'size'), [('7', 7), ('5GB', 5 * 10**9), ('2MiB', 2**21), ('500mb', 5 * 10**8)])
def test_sizes(said, size):
  assert convert_hf.parse_size(said) == size


def metadata(change):
  def spoil(run):
    path = run / 'checkpoints' / '0' / 'meta' / 'metadata'
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))

  return spoil


def newer(values):
  del values['digest']
  values['format'] = 99


def flipped(run):
  for path in (run / 'checkpoints' / '0' / 'state').rglob('d/*'):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope='module')
def imported(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('imported') / 'run'
  assert convert_hf.main(['import', str(GOLDENS / 'mamba'), str(folder)]) == 0
  return folder


@pytest.mark.parametrize(
  ('spoil', 'says'),
  [
    (metadata(newer), 'has format 99, this version of lmscale reads up to'),
    (metadata(lambda values: values['checksums'].update({'params/layers/0/D': 1})), 'all of 1 checkpoints are damaged'),
    (text('checkpoints/0/meta/metadata', '{'), 'all of 1 checkpoints are damaged'),
    (flipped, '0 is damaged ('),
    (text('config.json', '{'), 'config.json: written by another version of lmscale or damaged'),
    (text('config.json', '{"model": {"pattern": "mm"}}'), 'config.json is of another model than the checkpoint of step 0: model.pattern: "mmm" -> "mm"'),
    (lambda run: shutil.rmtree(run / 'checkpoints' / '0'), 'no checkpoint; give the folder of a run'),
    (lambda run: shutil.rmtree(run / 'checkpoints'), 'has no checkpoints'),
    (lambda run: (shutil.rmtree(run), run.write_bytes(pickle.dumps({}))), 'is a file; give the folder of a run (a pickle'),
  ],
)
def test_a_damaged_run_is_refused_in_one_line_and_nothing_is_written(imported, tmp_path, capsys, spoil, says):
  run = shutil.copytree(imported, tmp_path / 'run')
  spoil(run)
  before = sorted(tmp_path.rglob('*'))
  assert convert_hf.main(['export', str(run), str(tmp_path / 'out')]) == 2
  out, err = capsys.readouterr()
  line = err.splitlines()[-1]
  assert line.startswith('error: ') and says in line and line.isprintable() and out == ''
  assert sorted(tmp_path.rglob('*')) == before
