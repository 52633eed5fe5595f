"""A model goes in and comes out again: equal to the bit, whole or not at all, with its tokenizer."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from lmscale.config import Config, resolve_mesh
from lmscale.data.tokenizer import ByteTokenizer, get_tokenizer
from lmscale.errors import ConfigError
from lmscale.interop import huggingface, tokenizer_folder
from lmscale.interop.exporting import export_model
from lmscale.interop.folder import INDEX, SUMS, check_sums, open_tensors
from lmscale.interop.importing import import_model
from lmscale.interop.shards import ToWrite, write_shards
from lmscale.parallel.mesh import make_mesh
from lmscale.parallel.setup import make_setup
from lmscale.train import stored
from lmscale.train.model_folder import open_model

ROOT = pathlib.Path(__file__).parents[2]
GOLDENS = ROOT / 'tests' / 'goldens'
NAMES = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())
NO_TOKENIZER = 'no tokenizer: data.tokenizer is bytes, which is not what the model was trained with'


def tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
  return {name: array for path in folder.glob('model*.safetensors') for name, array in load_file(path).items()}


def write(folder: pathlib.Path, arrays: dict[str, np.ndarray], size: int) -> dict[str, str]:
  return write_shards(folder, [ToWrite(a.shape, a.dtype, lambda a=a: a, name) for name, a in arrays.items()], size)


def assert_same_bits(found: pathlib.Path, wanted: pathlib.Path) -> None:
  a, b = tensors(found), tensors(wanted)
  assert a.keys() == b.keys()
  for name in b:
    assert (a[name].dtype, a[name].shape, a[name].tobytes()) == (b[name].dtype, b[name].shape, b[name].tobytes()), name


@pytest.fixture
def golden(tmp_path) -> pathlib.Path:
  return shutil.copytree(GOLDENS / 'mamba', tmp_path / 'hf')


ONE_FILE = ('llama', 'nemotron_bias', 'bamba_limits', 'nemotron_h', 'mamba', 'mamba2_limits')  # in float32, tied and not


@pytest.mark.parametrize(
  ('name', 'half'),
  [*(pytest.param(n, False, id=f'{n}-one-file') for n in ONE_FILE), *(pytest.param(n, True, id=f'{n}-bf16-shards') for n in NAMES)],
)
def test_what_is_imported_is_exported_bit_for_bit(tmp_path, name, half):
  source, size = GOLDENS / name, 10**9
  if half:
    source, size = tmp_path / 'hf', 6_000
    source.mkdir()
    shutil.copyfile(GOLDENS / name / 'config.json', source / 'config.json')
    write(source, {n: a.astype(ml_dtypes.bfloat16) for n, a in tensors(GOLDENS / name).items()}, size)
  config, _ = import_model(source, tmp_path / 'run')
  assert open_model(tmp_path / 'run').config == config
  values, notes = export_model(tmp_path / 'run', tmp_path / 'out', shard_size=size)
  assert notes == ['no tokenizer: the model came without one']
  assert_same_bits(tmp_path / 'out', source)
  assert (tmp_path / 'out' / INDEX).exists() == half
  given = json.loads((source / 'config.json').read_text())
  dtype = 'bfloat16' if half else 'float32'
  assert json.loads((tmp_path / 'out' / 'config.json').read_text()) == values | given | {'dtype': dtype, 'torch_dtype': dtype}
  sums = (tmp_path / 'out' / SUMS).read_text().splitlines()
  assert len(sums) == len(list((tmp_path / 'out').iterdir())) - 1
  check_sums(tmp_path / 'out', [line.split()[1] for line in sums])


def test_parameters_are_those_of_the_whole_tree(tmp_path):
  import_model(GOLDENS / 'mamba_untied', tmp_path / 'run')
  model = open_model(tmp_path / 'run')
  config = resolve_mesh(model.config, 1)
  setup = make_setup(config, make_mesh(config.mesh, jax.devices()[:1]))
  tree, index = stored.unstacked(model.params(setup)), stored.index_of(setup.stacking, ('params',))
  found = stored.canonical({'params': tree}, index)['params']
  _, want = huggingface.load(GOLDENS / 'mamba_untied')
  want |= {'layers': {str(i): layer for i, layer in enumerate(want['layers'])}}
  jax.tree.map(np.testing.assert_array_equal, found, want)


def test_dtypes_that_are_asked_for(tmp_path):
  import_model(GOLDENS / 'mamba2', tmp_path / 'run', dtype='bf16')
  with open_model(tmp_path / 'run').rows() as rows:
    kinds = {name: dtype.name for name, dtype in rows.dtypes.items()}
  assert kinds['layers/1/x_kernel'] == kinds['embed/tokens'] == 'bfloat16'
  assert kinds['layers/1/A_log'] == kinds['layers/1/norm_scale'] == kinds['final_norm/norm_scale'] == 'float32'
  export_model(tmp_path / 'run', tmp_path / 'mixed')
  found = tensors(tmp_path / 'mixed')
  assert found['backbone.layers.0.mixer.in_proj.weight'].dtype == ml_dtypes.bfloat16
  assert found['backbone.layers.0.mixer.A_log'].dtype == np.float32
  export_model(tmp_path / 'run', tmp_path / 'half', dtype='fp16')
  assert {a.dtype.name for a in tensors(tmp_path / 'half').values()} == {'float16'}
  with pytest.raises(ConfigError, match="--dtype: 'int8' is not one of fp32, bf16, fp16"):
    export_model(tmp_path / 'run', tmp_path / 'no', dtype='int8')


def test_float64_becomes_float32_and_what_is_beyond_a_dtype_is_refused(golden, tmp_path):
  arrays = {n: a.astype(np.float64) for n, a in tensors(golden).items()}
  arrays['backbone.layers.1.mixer.D'][3] = 1e6
  write(golden, arrays, 10**9)
  import_model(golden, tmp_path / 'run')
  export_model(tmp_path / 'run', tmp_path / 'out')
  assert {a.dtype.name for a in tensors(tmp_path / 'out').values()} == {'float32'}
  with pytest.raises(ConfigError, match='mixer.D: a value of layers/1/D is beyond float16; export with --dtype=fp32'):
    export_model(tmp_path / 'run', tmp_path / 'half', dtype='fp16')
  assert not (tmp_path / 'half').exists()


def test_the_lower_limit_of_dt_can_be_chosen(golden, tmp_path):
  source = shutil.copytree(GOLDENS / 'nemotron_h', tmp_path / 'floor')
  values = json.loads((source / 'config.json').read_text()) | {'time_step_min': 0.001}
  (source / 'config.json').write_text(json.dumps(values))
  config, notes = import_model(source, tmp_path / 'fused')
  assert config.model.mamba2.dt_min == 0 and '--dt_min=0.001 follows the plain one' in notes[0]
  config, notes = import_model(source, tmp_path / 'plain', dt_min=0.001)
  assert config.model.mamba2.dt_min == 0.001 and notes == [NO_TOKENIZER]
  assert export_model(tmp_path / 'plain', tmp_path / 'out')[0]['time_step_limit'] == [0.001, {'__float__': 'Infinity'}]


# The tokenizer.


def test_a_tokenizer_goes_along_and_is_found_where_the_folder_is(golden, tmp_path):
  tokenizer_folder.write(Config(), ByteTokenizer(), golden)
  raw = json.loads((golden / 'tokenizer.json').read_text())
  raw['model']['vocab'] = {name: i for i, name in enumerate(list(raw['model']['vocab'])[:90])}
  raw['added_tokens'][0]['id'] = 90
  (golden / 'tokenizer.json').write_text(json.dumps(raw))
  (golden / 'chat_template.jinja').write_text('{{ hello }}')
  config, notes = import_model(golden, tmp_path / 'run')
  assert notes == [] and config.data.tokenizer == str(tmp_path / 'run' / 'tokenizer' / 'tokenizer.json')
  moved = (tmp_path / 'run').rename(tmp_path / 'moved')
  model = open_model(moved)
  assert get_tokenizer(model.config.data.tokenizer).identity == model.tokenizer and model.tokenizer.startswith('tokenizer.json-v')
  _, notes = export_model(moved, tmp_path / 'out')
  assert notes == ['vocab_size 97: 6 rows beyond the 91 ids of the tokenizer are kept; --vocab=91 cuts them']
  for name in ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja'):
    assert (tmp_path / 'out' / name).read_bytes() == (golden / name).read_bytes()
  values, _ = export_model(moved, tmp_path / 'cut', vocab=91)
  assert values['vocab_size'] == 91 and tensors(tmp_path / 'cut')['backbone.embeddings.weight'].shape == (91, 25)
  (moved / 'tokenizer' / 'tokenizer.json').write_text(json.dumps(raw | {'decoder': None}))
  with pytest.raises(ConfigError, match='is not the tokenizer the model was trained with'):
    export_model(moved, tmp_path / 'other')


def test_the_byte_tokenizer_is_written_as_one_that_others_read(tmp_path):
  tokenizer_folder.write(Config(), ByteTokenizer(), tmp_path)
  read = get_tokenizer(str(tmp_path / 'tokenizer.json'))
  text = ''.join(map(chr, range(0x800))) + '你\U0010ffff <|endoftext|>\n'
  np.testing.assert_array_equal(read.encode(text), ByteTokenizer().encode(text))
  assert (read.size, read.end, read.decode(read.encode(text))) == (257, 256, text)
  found = tokenizer_folder.find(tmp_path, 257)
  assert (found.name, found.tokenizer.identity) == ('bytes', 'bytes-v1')


def test_a_tokenizer_of_more_ids_than_rows_or_a_damaged_one_is_refused(golden, tmp_path):
  tokenizer_folder.write(Config(), ByteTokenizer(), golden)
  path = golden / 'tokenizer.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'decoder': None}))
  with pytest.raises(ConfigError, match='tokenizer.json: 257 ids, but vocab_size is 97; --no_tokenizer leaves the tokenizer out'):
    import_model(golden, tmp_path / 'run')
  (golden / 'tokenizer.json').write_text('{')
  with pytest.raises(ConfigError, match='damaged or no tokenizer.*--no_tokenizer'):
    import_model(golden, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
  assert import_model(golden, tmp_path / 'run', tokenizer=False)[1] == [NO_TOKENIZER]


# Whole, or not there.


def test_a_damaged_checkpoint_is_passed_over_and_an_only_one_refused(tmp_path, caplog):
  import_model(GOLDENS / 'mamba', tmp_path / 'run')
  checkpoints = tmp_path / 'run' / 'checkpoints'
  shutil.copytree(checkpoints / '0', checkpoints / '3')
  meta = json.loads((checkpoints / '3' / 'meta' / 'metadata').read_text())
  del meta['digest'], meta['step']
  meta['checksums']['params/layers/2/D'] += 1
  (checkpoints / '3' / 'meta' / 'metadata').write_text(json.dumps(meta))
  export_model(tmp_path / 'run', tmp_path / 'out')
  assert '3 IS DAMAGED (checksum of layers/2/D differs)' in caplog.text
  assert_same_bits(tmp_path / 'out', GOLDENS / 'mamba')
  shutil.rmtree(checkpoints / '0')
  with pytest.raises(ConfigError, match='3 is damaged .*no older one'):
    export_model(tmp_path / 'run', tmp_path / 'none')
  assert not (tmp_path / 'none').exists() and not list(tmp_path.glob('.*'))


def test_what_was_damaged_on_its_way_is_seen(tmp_path):
  import_model(GOLDENS / 'mamba', tmp_path / 'run')
  export_model(tmp_path / 'run', tmp_path / 'out')
  path = tmp_path / 'out' / 'model.safetensors'
  raw = bytearray(path.read_bytes())
  raw[-3] ^= 1
  path.write_bytes(raw)
  with pytest.raises(ConfigError, match='model.safetensors: damaged: its SHA-256 is not the one in SHA256SUMS'):
    import_model(tmp_path / 'out', tmp_path / 'back')
  (tmp_path / 'out' / SUMS).write_text('x  ../../etc/passwd\n')
  with pytest.raises(ConfigError, match='SHA256SUMS: not lines of a SHA-256 and a plain file name'):
    import_model(tmp_path / 'out', tmp_path / 'back')


@pytest.mark.parametrize('what', ['import', 'export'])
def test_killed_halfway_nothing_looks_finished(tmp_path, what):
  if what == 'export':
    import_model(GOLDENS / 'mamba', tmp_path / 'source')
  source = tmp_path / 'source' if what == 'export' else GOLDENS / 'mamba'
  code = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}]
from lmscale.interop import exporting, huggingface, importing
from lmscale.train import streamed
count = [0]
def late(read):
  def wrapped(*args):
    count[0] += 1
    if count[0] == 9:
      os.kill(os.getpid(), signal.SIGKILL)
    return read(*args)
  return wrapped
huggingface.Source.read = late(huggingface.Source.read)
streamed.Rows.read = late(streamed.Rows.read)
{'importing.import' if what == 'import' else 'exporting.export'}_model({str(source)!r}, {str(tmp_path / 'target')!r})
"""
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert not (tmp_path / 'target').exists()
  (left,) = tmp_path.glob('.*')
  assert left.name.startswith('.target.unfinished-')
  with pytest.raises(ConfigError):
    open_model(left)
  assert what == 'import' or not (left / 'config.json').exists()
  with pytest.raises(ConfigError):
    open_tensors(left)
