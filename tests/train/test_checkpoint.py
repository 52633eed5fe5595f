"""What is stored comes back bit for bit on any mesh, or not at all."""

import logging
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lmscale import processes
from lmscale.errors import ConfigError
from lmscale.train.checkpoint import Checkpointer
from lmscale.train.stored import checksums

SPECS = {'w': PartitionSpec('data', 'tensor'), 'b': PartitionSpec('tensor'), 'half': PartitionSpec(None, 'data')}


def mesh_of(*shape):
  return jax.make_mesh(shape, ('data', 'tensor'), (AxisType.Auto,) * 2, devices=jax.devices()[: shape[0] * shape[1]])


def make_tree(mesh, seed=0):
  rng = np.random.default_rng(seed)
  values = {
    'w': rng.normal(size=(16, 8)).astype(np.float32),
    'b': rng.normal(size=(8,)).astype(np.float32),
    'half': rng.normal(size=(8, 8)).astype(jnp.bfloat16),
  }
  layers = {name: jax.device_put(x, NamedSharding(mesh, SPECS[name])) for name, x in values.items()}
  count = jax.device_put(np.int32(seed), NamedSharding(mesh, PartitionSpec()))
  return {'params': {'layers': {'0': layers, '10': layers, '2': layers}}, 'opt': {'count': count}, 'step': count}


def abstract(tree, mesh=None):
  def one(x):
    sharding = NamedSharding(mesh, x.sharding.spec) if mesh else x.sharding
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(one, tree)


def assert_bitwise(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_one_mesh_to_another(tmp_path):
  tree = make_tree(mesh_of(2, 4))
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(3, tree, {'samples': 12})
  for shape in ((4, 2), (1, 1)):
    mesh = mesh_of(*shape)
    with Checkpointer(tmp_path) as checkpoints:
      got, meta = checkpoints.restore(abstract(tree, mesh))
    assert meta == {'samples': 12}
    assert_bitwise(got, tree)
    assert got['params']['layers']['10']['w'].sharding == NamedSharding(mesh, SPECS['w'])


def test_arrays_may_be_donated_right_after_an_asynchronous_save(tmp_path):
  advance = jax.jit(lambda x: x * 1.5 + 1, donate_argnums=0)
  tree = {'w': jax.device_put(np.arange(2**20, dtype=np.float32))}
  kept = np.array(tree['w'])
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, tree, {})
    for _ in range(20):
      tree = {'w': advance(tree['w'])}
    jax.block_until_ready(tree)
    checkpoints.wait()
    got, _ = checkpoints.restore(abstract(tree))
  np.testing.assert_array_equal(got['w'], kept)


def test_keep_latest_and_saving_a_step_twice(tmp_path):
  tree = make_tree(mesh_of(1, 1))
  with Checkpointer(tmp_path, keep=2) as checkpoints:
    assert checkpoints.latest() is None
    for step in (5, 10, 15):
      checkpoints.save(step, tree, {'at': step})
    checkpoints.save(15, tree, {'at': 'again'}, wait=True)
    assert (checkpoints.steps(), checkpoints.latest()) == ([10, 15], 15)
    assert checkpoints.restore(abstract(tree))[1] == {'at': 15}
    assert checkpoints.restore(abstract(tree), step=10)[1] == {'at': 10}


def test_reading_another_run_changes_nothing_there(tmp_path):
  tree = make_tree(mesh_of(4, 2))
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(5, tree, {}, wait=True)
  unfinished = tmp_path / '10.orbax-checkpoint-tmp'
  unfinished.mkdir()
  with Checkpointer(tmp_path, read_only=True) as checkpoints:
    assert_bitwise(checkpoints.restore(abstract(tree))[0], tree)
  time.sleep(0.5)  # Orbax would clean up in a thread
  assert unfinished.exists()


@pytest.mark.parametrize('name', ['.zarray', 'x' * 400])
def test_the_system_s_own_words_are_shown(tmp_path, name):
  """TensorStore says what it was doing before them, and behind them everything about the array."""
  tree = make_tree(mesh_of(1, 1))
  words = f'''OUT_OF_RANGE: Error writing "{name}": Failed to write 99 bytes: File too large [os_error_code='27']'''
  spec = ''' [tensorstore_spec='{"context":{"cache_pool":{}},"chunks":[],"open":true,"more":"''' + 'x' * 500 + '''"}']'''
  with pytest.raises(ConfigError, match=r'could not be saved.*OUT_OF_RANGE: .*File too large\)$') as caught, Checkpointer(tmp_path) as c:
    c._manager.save = lambda *_, **__: (_ for _ in ()).throw(ValueError(words + spec + '\nmore'))
    c.save(5, tree, {})
  assert len(str(caught.value)) < 600


def test_no_checkpoint(tmp_path):
  with Checkpointer(tmp_path) as checkpoints, pytest.raises(ConfigError, match='no checkpoint'):
    checkpoints.restore({'w': jax.ShapeDtypeStruct((1,), jnp.float32)})


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      lambda t: {**t, 'step': jax.ShapeDtypeStruct((), jnp.float32, sharding=t['step'].sharding)},
      r'step is stored as int32\[\], the model has float32\[\]',
    ),
    (
      lambda t: {**t, 'opt': {'count': jax.ShapeDtypeStruct((2,), jnp.int32, sharding=t['step'].sharding)}},
      r'opt/count is stored as int32\[\], the model has int32\[2\]',
    ),
    (lambda t: {**t, 'opt': {'other': t['step']}}, 'opt/count is stored but not in the model; opt/other is in the model but not stored'),
    (lambda t: {**t, 'more': t['step']}, 'more is in the model but not stored'),
  ],
)
def test_differences_are_refused_not_cast(tmp_path, change, message):
  tree = make_tree(mesh_of(1, 1))
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, tree, {}, wait=True)
  with Checkpointer(tmp_path) as checkpoints, pytest.raises(ConfigError, match=message) as caught:
    checkpoints.restore(change(abstract(tree)))
  assert '\n' not in str(caught.value)


def biggest(folder: pathlib.Path) -> pathlib.Path:
  return max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(folder):
  path = biggest(folder / 'state')
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)


DAMAGE = {
  'bit': flip_a_bit,
  'metadata': lambda folder: (folder / 'state' / '_METADATA').write_text('{'),
  'meta': lambda folder: (folder / 'meta' / 'metadata').unlink(),
  'state': lambda folder: shutil.rmtree(folder / 'state'),
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_damage_falls_back_loudly_and_is_kept(tmp_path, caplog, kind):
  old, new = ({'w': jax.device_put(np.random.default_rng(s).normal(size=(64, 64)))} for s in (0, 1))
  with Checkpointer(tmp_path, keep=3) as checkpoints:
    checkpoints.save(10, old, {'at': 10})
    checkpoints.save(20, new, {'at': 20})
  DAMAGE[kind](tmp_path / '20')
  with Checkpointer(tmp_path, keep=3) as checkpoints:
    with caplog.at_level(logging.WARNING):
      got, meta = checkpoints.restore(abstract(old))
    assert '20 IS DAMAGED' in caplog.text
    assert meta == {'at': 10}
    assert_bitwise(got, old)
    assert (tmp_path / '20').exists() and checkpoints.latest() == 10
    checkpoints.save(15, new, {'at': 15})
    checkpoints.save(20, new, {'at': 'second'})
    checkpoints.wait()
    assert (tmp_path / '20.damaged').exists()
    assert checkpoints.restore(abstract(new), step=20)[1] == {'at': 'second'}
    with pytest.raises(ConfigError, match='20 is damaged'):
      DAMAGE[kind](tmp_path / '20')
      Checkpointer(tmp_path).restore(abstract(new), step=20)


def test_where_one_of_several_processes_cannot_read_none_goes_back(tmp_path, monkeypatch):
  """The others would wait for it, each in another collective."""
  tree = {'w': jnp.ones((4, 4))}
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, tree, {})
    checkpoints.save(2, tree, {}, wait=True)
    restore = checkpoints._manager.restore

    def unreadable(step, args):
      if args.get('state') is not None:
        raise OSError('no such shard')
      return restore(step, args=args)

    monkeypatch.setattr(checkpoints._manager, 'restore', unreadable)
    monkeypatch.setattr(processes, 'count', lambda: 2)
    with pytest.raises(ConfigError, match='2 cannot be read here .*no such shard.* move its folder away'):
      checkpoints.restore(abstract(tree))


def test_all_damaged(tmp_path):
  tree = {'w': jnp.ones((4, 4))}
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, tree, {}, wait=True)
  DAMAGE['meta'](tmp_path / '1')
  with Checkpointer(tmp_path) as checkpoints, pytest.raises(ConfigError, match='all of 1 checkpoints are damaged'):
    checkpoints.restore(abstract(tree))


def test_metadata_that_orbax_stumbles_over(tmp_path):
  tree = {'w': jnp.ones((4, 4))}
  with Checkpointer(tmp_path) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, tree, {}, wait=True)
  (tmp_path / '1' / '_CHECKPOINT_METADATA').write_text('[' * 100_000)
  with pytest.raises(ConfigError, match=r'1/_CHECKPOINT_METADATA is damaged; move .*/1 away to go on') as error:
    Checkpointer(tmp_path)
  assert '\n' not in str(error.value)
  (tmp_path / '1').rename(tmp_path / 'aside')
  with Checkpointer(tmp_path) as checkpoints:
    assert checkpoints.restore(abstract(tree))[0]['w'].shape == (4, 4)


def test_checksum_sees_one_bit_and_not_the_mesh():
  a, b = make_tree(mesh_of(2, 4)), make_tree(mesh_of(4, 1))
  assert checksums(a) == checksums(b)
  bits = np.arange(8, dtype=np.float32)
  other = bits.copy()
  other.view(np.uint32)[3] ^= 1 << 31
  assert checksums({'x': bits}) != checksums({'x': other})
  assert checksums({'x': np.array([True])}) == {'x': 1}


def test_what_a_killed_process_left_is_removed_without_a_word(tmp_path, caplog):
  tree = make_tree(mesh_of(1, 1))
  for step in (3, 4):
    (tmp_path / f'{step}.orbax-checkpoint-tmp' / 'state').mkdir(parents=True)
  with caplog.at_level(logging.WARNING), Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(3, tree, {})
  assert not caplog.records
  assert [p.name for p in tmp_path.iterdir()] == ['3']
