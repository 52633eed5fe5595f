"""A model is the folder of a run: what is written is what is read, on any mesh, in any stacking, in any dtype."""

import dataclasses
import json
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny

from lmscale import config as config_lib
from lmscale.config import MeshConfig, ModelConfig
from lmscale.data import atomic_folder
from lmscale.errors import ConfigError
from lmscale.models import model as model_lib
from lmscale.models.stacking import FILLER, from_layers
from lmscale.parallel.mesh import make_mesh
from lmscale.parallel.setup import make_setup
from lmscale.train import stored
from lmscale.train.checkpoint import Checkpointer
from lmscale.train.model_folder import abstract_params, open_model, param_shapes, write_model
from lmscale.train.program import Program
from lmscale.train.resume import begin, check_run, check_source
from lmscale.train.streamed import Pending
from lmscale.train.workdir import Workdir

MODEL = ModelConfig(pattern='--*-', d_model=8, vocab=12, mlp=config_lib.MLPConfig(d_ff=8),
                    attention=config_lib.AttentionConfig(heads=2, kv_heads=1, head_dim=4))  # fmt: skip
CONFIG = tiny.config(model=MODEL)
TREE = model_lib.param_specs(MODEL)
SPECS = stored.named({'params': {**TREE, 'layers': {str(i): layer for i, layer in enumerate(TREE['layers'])}}})


def leaves_of(values):
  return {name: Pending(x.shape, x.dtype, lambda x=x: x) for name, x in values.items()}


def values_of(dtype=np.float32, seed=0):
  rng = np.random.default_rng(seed)
  return {name: rng.normal(size=shape).astype(dtype) for name, shape in param_shapes(MODEL).items()}


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """A folder of float32 parameters, and one whose matrices are bfloat16."""
  folder = tmp_path_factory.mktemp('written')
  values = values_of()
  write_model(folder / 'whole', CONFIG, leaves_of(values), {'from': 'a test'}, tokenizer='bytes-v1', step=7)
  half = {name: x if SPECS[name].full_precision else x.astype(ml_dtypes.bfloat16) for name, x in values.items()}
  write_model(folder / 'half', CONFIG, leaves_of(half), {})
  return folder


@pytest.fixture
def copy(written, tmp_path):
  return shutil.copytree(written / 'whole', tmp_path / 'model')


def setup_of(mesh=tiny.ONE, **train):
  config = tiny.config(mesh=mesh, model=MODEL, **train)
  return make_setup(config, make_mesh(config.mesh))


@pytest.mark.parametrize(
  ('kept', 'mesh', 'stack'),
  [
    ('whole', tiny.ONE, 'runs'), ('half', tiny.ONE, 'unrolled'), ('half', MeshConfig(1, 2, 2, 3), 'runs'),
    ('half', MeshConfig(2, 2, 2, 1), 'runs'),
  ],
)  # fmt: skip
def test_every_parameter_comes_back_on_any_mesh_in_any_dtype(written, kept, mesh, stack):
  setup, model, values = setup_of(mesh, stack=stack), open_model(written / kept), values_of()
  abstract, index = abstract_params(setup, jnp.float32)
  for dtype in (None, jnp.bfloat16):
    params = model.params(setup, dtype)
    flat = stored.named({'params': stored.unstacked(params)})
    assert all(flat[path].sharding == like.sharding for path, like in stored.named(abstract).items())
    seen = stored.named(stored.canonical(stored.nested(flat), index))
    assert seen.keys() == SPECS.keys()
    for name, x in seen.items():
      whole = SPECS[name].full_precision
      assert x.dtype == (jnp.bfloat16 if dtype and not whole else jnp.float32), name
      value = values[name] if whole or (kept == 'whole' and not dtype) else values[name].astype(ml_dtypes.bfloat16)
      np.testing.assert_array_equal(np.asarray(x, np.float32), value.astype(np.float32), name)


def test_what_is_said_of_a_model(written):
  model = open_model(written / 'whole')
  assert (model.config, model.step, model.tokenizer, model.about) == (CONFIG, 7, 'bytes-v1', {'from': 'a test'})
  assert model.notes == [] and open_model(written / 'half').tokenizer is None
  assert {p.name for p in (written / 'whole').iterdir()} == {'config.json', 'checkpoints'}
  assert {p.name for p in written.iterdir()} == {'whole', 'half'}


def test_the_tokenizer_is_found_where_the_folder_is_now(written, tmp_path):
  config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, tokenizer='/away/tokenizer.json'))

  def beside(folder):
    (folder / 'tokenizer').mkdir()
    (folder / 'tokenizer' / 'tokenizer.json').write_text('{}')

  write_model(tmp_path / 'model', config, leaves_of(values_of()), {}, beside=beside)
  moved = (tmp_path / 'model').rename(tmp_path / 'moved')
  assert open_model(moved).config.data.tokenizer == str(moved / 'tokenizer' / 'tokenizer.json')


def no_folder(folder):
  shutil.rmtree(folder)


def a_pickle(folder):
  shutil.rmtree(folder)
  folder.write_bytes(b'\x80\x04.')


def no_checkpoints(folder):
  shutil.rmtree(folder / 'checkpoints')


def no_checkpoint(folder):
  shutil.rmtree(folder / 'checkpoints' / '7')


def damaged_meta(folder):
  (folder / 'checkpoints' / '7' / 'meta' / 'metadata').write_text('{')


def damaged_config(folder):
  (folder / 'config.json').write_text('{"flux": 1}')


def other_config(folder):
  path = folder / 'config.json'
  path.write_text(path.read_text().replace('"norm": "rmsnorm"', '"norm": "layernorm"'))


@pytest.mark.parametrize(
  ('spoil', 'says'),
  [
    (no_folder, 'model: no such folder'), (a_pickle, 'model is a file; .*never read'), (no_checkpoints, 'model has no checkpoints'),
    (no_checkpoint, 'model: no checkpoint; give'), (damaged_meta, 'model: all of 1 checkpoints are damaged'),
    (damaged_config, 'config.json: written by another version'),
    (other_config, 'config.json is of another model .* step 7: model.norm: "rmsnorm" -> "layernorm"'),
  ],
)  # fmt: skip
def test_what_is_no_model_is_one_line(copy, spoil, says):
  spoil(copy)
  with pytest.raises(ConfigError, match=says) as caught:
    open_model(copy)
  assert '\n' not in str(caught.value)


def test_a_lost_config_is_taken_from_the_checkpoint(copy):
  (copy / 'config.json').unlink()
  model = open_model(copy)
  assert model.config == CONFIG and 'config.json is missing' in model.notes[0]


def test_what_may_be_meant_is_taken_from_the_config_and_told(copy):
  path = copy / 'config.json'
  path.write_text(path.read_text().replace('"rope_base": 10000.0', '"rope_base": 500.0'))
  model = open_model(copy)
  assert model.config.model.rope_base == 500.0 and model.notes[0].endswith('model.rope_base: 10000.0 -> 500.0')


def flip(path: pathlib.Path) -> None:
  for file in path.rglob('d/*'):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_and_an_only_one_refused(copy, written, caplog):
  shutil.copytree(written / 'whole' / 'checkpoints' / '7', copy / 'checkpoints' / '9')
  meta = copy / 'checkpoints' / '9' / 'meta' / 'metadata'
  about = json.loads(meta.read_text())
  del about['digest'], about['step']
  meta.write_text(json.dumps(about))
  flip(copy / 'checkpoints' / '9')
  model = open_model(copy)
  assert model.step == 9
  model.params(setup_of())
  assert model.step == 7 and '9 IS DAMAGED' in caplog.text
  flip(copy / 'checkpoints' / '7')
  with pytest.raises(ConfigError, match='all of 2 checkpoints are damaged'):
    model.params(setup_of())


def test_a_setup_of_another_function_is_refused(written):
  setup = setup_of()
  other = dataclasses.replace(setup, config=tiny.config(model=dataclasses.replace(MODEL, norm_eps=1e-3)))
  with pytest.raises(ConfigError, match='of another model: model.norm_eps: 1e-05 -> 0.001'):
    open_model(written / 'whole').params(other)


@pytest.mark.parametrize('spoil', ['missing', 'shape', 'nan', 'there'])
def test_what_cannot_be_written_leaves_nothing(tmp_path, spoil):
  values = values_of()
  name = 'params/layers/1/up_kernel'
  if spoil == 'missing':
    del values[name]
  elif spoil == 'shape':
    values[name] = values[name][:-1]
  elif spoil == 'nan':
    values[name][0, 0] = np.nan
  else:
    (tmp_path / 'model').mkdir()
    (tmp_path / 'model' / 'mine').write_text('')
  before = sorted(tmp_path.rglob('*'))
  says = {'nan': 'up_kernel holds NaN', 'there': 'model: exists already'}.get(spoil, f'not the parameters of this model: {name}')
  with pytest.raises(ConfigError, match=says):
    write_model(tmp_path / 'model', CONFIG, leaves_of(values), {})
  assert sorted(tmp_path.rglob('*')) == before


KILLED = """
import os, pathlib, signal, sys
sys.path[:0] = [{root!r}, {tests!r}, {train!r}]
import test_model_folder as t
leaves = t.leaves_of(t.values_of())
last = list(leaves)[-1]
def die():
  os.kill(os.getpid(), signal.SIGKILL)
leaves[last] = t.Pending(leaves[last].shape, leaves[last].dtype, die)
t.write_model(pathlib.Path({folder!r}), t.CONFIG, leaves, {{}})
"""


def test_killed_halfway_nothing_looks_finished_and_the_next_call_cleans_up(tmp_path):
  here = pathlib.Path(__file__).parent
  code = KILLED.format(root=str(here.parents[1]), tests=str(here.parent), train=str(here), folder=str(tmp_path / 'model'))
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert not (tmp_path / 'model').exists()
  left = [p.name for p in tmp_path.iterdir()]
  assert len(left) == 1 and left[0].startswith('.model.unfinished-')
  with pytest.raises(ConfigError):
    open_model(tmp_path / left[0])
  write_model(tmp_path / 'model', CONFIG, leaves_of(values_of()), {})
  assert [p.name for p in tmp_path.iterdir()] == ['model']


def test_two_processes_do_not_remove_each_other_s_work(tmp_path):
  def other(folder):
    (folder / 'x').write_text('')
    with pytest.raises(ConfigError):
      atomic_folder.make(tmp_path / 'f', lambda inner: (_ for _ in ()).throw(ConfigError('enough')))
    assert (folder / 'x').exists()

  atomic_folder.make(tmp_path / 'f', other)
  assert [p.name for p in (tmp_path / 'f').iterdir()] == ['x']


def test_checkpoint_is_an_ordinary_one(written):
  with Checkpointer(written / 'whole' / 'checkpoints', read_only=True) as source:
    assert source.steps() == [7] and source.meta(7)['params_only']


def test_a_model_without_optimizer_state_is_no_run_that_goes_on(written):
  model, workdir = open_model(written / 'whole'), Workdir(written / 'whole', CONFIG)
  with pytest.raises(ConfigError, match=r'without optimizer state, .*another --workdir with --config.train.init_from=.*whole$'):
    check_run(CONFIG, {'tokenizer': 'bytes-v1'}, model.step, model.meta, workdir)


@pytest.mark.parametrize(('kept', 'told'), [('whole', []), ('half', ['with which tokenizer they were trained is not known'])])
def test_a_new_run_starts_from_it(written, kept, told):
  config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, init_from=str(written / kept)))
  check_source(config, 'bytes-v1')
  program = Program(config)
  state, steps, notes = begin(config, program, {'tokenizer': 'bytes-v1'}, None, Nothing())
  assert (steps, notes[1:]) == (0, told)
  want = open_model(written / kept).params(program.setup)
  jax.tree.map(np.testing.assert_array_equal, state.params, want)


class Nothing:
  """A run that has saved nothing."""

  @staticmethod
  def latest():
    return None


@pytest.mark.parametrize('mesh', [tiny.ONE, MeshConfig(2, 2, 2, 1)])
def test_rows_are_found_in_any_stacking(tmp_path, mesh):
  """As an export reads a run: out of stacks of runs, or of stages, some rows of which hold no layer."""
  setup, values = setup_of(mesh), values_of()
  _, index = abstract_params(setup, jnp.float32)
  tree = stored.nested(values)['params']
  layers = [tree['layers'][str(i)] for i in range(len(MODEL.layers))]
  params = stored.unstacked({**tree, 'layers': from_layers(layers, setup.stacking)})
  if mesh != tiny.ONE:
    assert any(FILLER in stack.layers for stack in index.values())
  with Checkpointer(tmp_path / 'checkpoints') as checkpoints:
    checkpoints.save(3, {'params': params, 'step': jnp.int32(3)}, {'data': {}, 'config': config_lib.to_dict(CONFIG)}, wait=True, index=index)
  with open_model(tmp_path).rows() as rows:
    assert {f'params/{name}': shape for name, shape in rows.shapes.items()} == param_shapes(MODEL)
    for name in rows.shapes:
      np.testing.assert_array_equal(rows.read(name), values[f'params/{name}'], name)
