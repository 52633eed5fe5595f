"""Arrays are stored as they lie in memory; any stacking reads any checkpoint, and no state is ever there twice."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lmscale.config import MeshConfig
from lmscale.errors import ConfigError
from lmscale.models.stacking import FILLER, Stack, make_stacking
from lmscale.train import stored
from lmscale.train.checkpoint import Checkpointer
from lmscale.train.program import Program

LAYERS = 'M-M-M-*-*'
SHAPES = {'M': {'in': (16, 24), 'A_log': (8,)}, '-': {'up': (16, 32)}, '*': {'q': (16, 8)}}
DIMS = {'in': ('data', 'tensor'), 'A_log': ('tensor',), 'up': ('data', 'tensor'), 'q': (None, 'tensor')}
TREES = ('params', 'opt/mu', 'opt/nu')


def mesh_of(*shape):
  return jax.make_mesh(shape, ('data', 'tensor'), (AxisType.Auto,) * 2, devices=jax.devices()[: shape[0] * shape[1]])


def form(mesh, mode):
  """(abstract tree, index) of a state whose layers are stacked by `mode`."""
  places = {f'layers/{i}/{j}': s for i, run in enumerate(make_stacking(LAYERS, mode)) for j, s in enumerate(run)}
  leaves, index = {}, {}
  for tree in TREES:
    leaves[f'{tree}/embed/tokens'] = abstract((40, 16), mesh, ('tensor', 'data'))
    for path, stack in places.items():
      index[f'{tree}/{path}'] = stack
      for name, shape in SHAPES[stack.kind].items():
        leaves[f'{tree}/{path}/{name}'] = abstract((len(stack.layers), *shape), mesh, (None, *DIMS[name]))
  return stored.nested(leaves | {'step': abstract((), mesh, (), jnp.int32)}), index


def abstract(shape, mesh, dims, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*dims)))


def filled(tree, index):
  """Random values that depend on the canonical name alone; zeros in a row that holds no layer."""

  def value(name, shape, dtype):
    if not name:
      return np.zeros(shape, dtype)
    draw = np.random.default_rng(list(name.encode())).normal(size=shape)
    return (100 * draw).astype(dtype)

  leaves = {}
  for path, leaf in stored.named(tree).items():
    names, rows = stored.canonical_names(path, index), stored.is_stacked(path, index)
    shape = leaf.shape[1:] if rows else leaf.shape
    values = [value(name, shape, leaf.dtype) for name in names]
    leaves[path] = jax.device_put(np.stack(values) if rows else values[0], leaf.sharding)
  return stored.nested(leaves)


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
    assert (a.dtype, a.sharding) == (b.dtype, b.sharding), path
    np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize('before,after', [('runs', 'runs'), ('runs', 'unrolled'), ('unrolled', 'runs')])
def test_any_stacking_on_any_mesh_reads_any_checkpoint(tmp_path, before, after):
  tree = filled(*form(mesh_of(2, 4), before))
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(3, tree, {'at': 3}, wait=True, index=form(mesh_of(2, 4), before)[1])
  for shape in ((4, 2), (1, 1)):
    asked, index = form(mesh_of(*shape), after)
    with Checkpointer(tmp_path) as checkpoints:
      got, meta = checkpoints.restore(asked, index=index)
    assert meta == {'at': 3}
    assert_same(got, filled(asked, index))


def test_a_wrong_permutation_is_seen(tmp_path):
  """The checksums belong to layers, not to places: rows that come back in another order are damage."""
  asked, index = form(mesh_of(1, 1), 'runs')
  swapped = {path: Stack(s.kind, s.layers[::-1]) for path, s in index.items()}
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, filled(asked, index), {}, wait=True, index=index)
    about = json.loads((tmp_path / '1' / 'meta' / 'metadata').read_text())
    about['index'] = stored.to_json(swapped)
    about.pop('digest')
    (tmp_path / '1' / 'meta' / 'metadata').write_text(json.dumps(about))
    with pytest.raises(ConfigError, match='checksum of .*layers/0/in'):
      checkpoints.restore(asked, 1, index)


@pytest.mark.parametrize('version', [1, 2])
def test_the_formats_of_one_array_per_layer_are_read(tmp_path, version):
  asked, index = form(mesh_of(2, 2), 'runs')
  asked |= {'norms': abstract((4,), mesh_of(2, 2), ()), 'spikes': abstract((), mesh_of(2, 2), (), jnp.int32)}
  values = filled(asked, index)
  old = stored.canonical(values, index)
  if version == 1:
    del old['norms'], old['spikes']
  about = {'format': version, 'user': {'at': version}, 'checksums': stored.checksums(old)}
  with ocp.CheckpointManager(tmp_path) as manager:
    args = ocp.args.Composite(state=ocp.args.StandardSave(old), meta=ocp.args.JsonSave(about))
    manager.save(7, args=args)
  with Checkpointer(tmp_path) as checkpoints:
    got, meta = checkpoints.restore(asked, index=index)
  assert meta == {'at': version}
  assert_same(got, {name: part for name, part in values.items() if name in old})


# Stages of unlike layers, so that all but the first layout have rows that hold none.
PIPES = {
  'one': MeshConfig(1, 1, 1, 0),
  'two': MeshConfig(2, 2, 2, 1),
  'four': MeshConfig(4, 2, 1, 3),
  'two of two': MeshConfig(2, 1, 2, 2, True, 'interleaved', 2),
  'vocabulary': MeshConfig(2, 2, 1, 3, vocab_on_pipe=True),
}


@functools.cache
def pipe_form(name):
  """(abstract tree, index) of the state of a program."""
  mesh = PIPES[name]
  program = Program(tiny.config(mesh, tiny.change(tiny.MODEL, pattern='*-*---*-')), jax.devices()[: mesh.size])
  assert any(FILLER in stack.layers for stack in program.index.values()) is (name != 'one')
  return program.abstract_stored(), program.index


NEXT = {'one': ('two', 'four'), 'two': ('one', 'four'), 'four': ('two', 'two of two'), 'two of two': ('one',), 'vocabulary': ('one',)}
REST = {before: tuple(after for after in PIPES if after not in (before, *NEXT[before])) for before in PIPES}
CASES = [*NEXT.items(), *(pytest.param(*case, marks=pytest.mark.scale) for case in REST.items())]


@pytest.mark.parametrize('before,afters', CASES, ids=str)
def test_any_pipeline_reads_any_checkpoint(tmp_path, before, afters):
  """Optimizer state too: from one, two and four stages, and from two devices of two stages, to each other of them."""
  tree, index = pipe_form(before)
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, filled(tree, index), {}, wait=True, index=index)
    for after in afters:
      asked, index = pipe_form(after)
      got, _ = checkpoints.restore(asked, index=index)
      assert_same(got, filled(asked, index))


def test_a_pipeline_saves_and_restores_without_copies(tmp_path, monkeypatch):
  """As `test_a_save_makes_no_copy_...`, summed over the devices."""
  for name, (before, after) in {'in': ('one', 'vocabulary'), 'out': ('vocabulary', 'one')}.items():
    (asked, index), (other, other_index) = pipe_form(before), pipe_form(after)
    start, alive = live_bytes(), []
    tree = filled(asked, index)
    state = live_bytes() - start
    with Checkpointer(tmp_path / name) as checkpoints, monkeypatch.context() as patch:
      watched(patch, checkpoints._manager, 'save', alive)
      checkpoints.save(1, tree, {}, wait=True, index=index)
      assert max(alive) - start <= 1.02 * state
      alive.clear()
      del tree
      watched(patch, checkpoints, '_read', alive)
      watched(patch, jax, 'block_until_ready', alive)
      got, _ = checkpoints.restore(other, index=other_index)
    largest = 6 * 16 * 32 * 4  # one array of the six rows of MLP layers
    assert len(alive) > 8
    restored = sum(shard.data.nbytes for leaf in jax.tree.leaves(got) for shard in leaf.addressable_shards)
    assert max(alive) - start <= restored + 2 * largest
    del got


def test_parameters_alone(tmp_path, monkeypatch):
  before, after = form(mesh_of(2, 2), 'runs'), form(mesh_of(1, 2), 'unrolled')
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, filled(*before), {}, wait=True, index=before[1])
    read = []
    monkeypatch.setattr(checkpoints, '_read', lambda step, asked, real=checkpoints._read: read.extend(asked) or real(step, asked))
    got, _ = checkpoints.restore({'params': after[0]['params']}, index=after[1], partial=True)
    with pytest.raises(ConfigError, match='step is stored but not in the model'):
      checkpoints.restore({name: part for name, part in after[0].items() if name != 'step'}, index=after[1])
  assert all(path.startswith('params/') for path in read)
  assert_same(got, {'params': filled(*after)['params']})


def test_a_save_makes_no_copy_and_a_restore_only_one_group_at_a_time(tmp_path, monkeypatch):
  """In bytes of the arrays that are alive, at each moment when some are read or made."""
  mesh = mesh_of(1, 1)
  (asked, index), (other, other_index) = form(mesh, 'runs'), form(mesh, 'unrolled')
  alive = []
  before = live_bytes()
  tree = filled(asked, index)
  state = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
  with Checkpointer(tmp_path) as checkpoints:
    watched(monkeypatch, checkpoints._manager, 'save', alive)
    checkpoints.save(1, tree, {}, wait=True, index=index)
    assert live_bytes() - before <= 1.02 * state
    assert max(alive) - before <= 1.02 * state
    program = stored._facts.lower({'in': tree['params']['layers']['0']['0']['in']}, True).compile()
    assert program.memory_analysis().temp_size_in_bytes < 0.02 * state
    alive.clear()
    del tree
    watched(monkeypatch, checkpoints, '_read', alive)
    watched(monkeypatch, jax, 'block_until_ready', alive)
    got, _ = checkpoints.restore(other, index=other_index)
  largest = 3 * 16 * 24 * 4
  assert len(alive) > 8
  assert max(alive) - before <= sum(leaf.nbytes for leaf in jax.tree.leaves(got)) + 2 * largest


def watched(monkeypatch, owner, name, alive):
  """Notes the bytes that are alive before and after each call."""
  real = getattr(owner, name)

  def call(*args, **named):
    alive.append(live_bytes())
    result = real(*args, **named)
    alive.append(live_bytes())
    return result

  monkeypatch.setattr(owner, name, call)


def live_bytes():
  """An array and views of its shards are one buffer."""
  buffers = {s.data.unsafe_buffer_pointer(): s.data.nbytes for x in jax.live_arrays() for s in x.addressable_shards}
  return sum(buffers.values())


def test_large_rows_are_chunks_of_their_own(tmp_path):
  """So that one layer can be read without the others."""
  shape = (4, 512, 1024)
  tree = {'params': {'layers': {'0': {'0': {'w': jnp.ones(shape), 'b': jnp.ones((4, 8))}}}}}
  index = {'params/layers/0/0': Stack('-', (0, 1, 2, 3))}
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, tree, {}, wait=True, index=index)
    metadata = stored.named(checkpoints._manager.item_metadata(1).state.tree)
  chunks = {path.rpartition('/')[2]: leaf.storage.chunk_shape for path, leaf in metadata.items()}
  assert chunks == {'w': (1, 512, 1024), 'b': (4, 8)}


def test_a_flipped_bit_names_its_layer(tmp_path):
  asked, index = form(mesh_of(1, 1), 'runs')
  tree = filled(asked, index)
  bad = np.array(tree['params']['layers']['0']['0']['in'])
  bad.view(np.uint32)[1, 3, 5] ^= 1
  layer = index['params/layers/0/0'].layers[1]
  changed = stored.nested(stored.named(tree) | {'params/layers/0/0/in': bad})
  a, b = stored.checksums(tree, index), stored.checksums(changed, index)
  assert {name for name in a if a[name] != b[name]} == {f'params/layers/{layer}/in'}


def test_facts_are_on_every_device(monkeypatch):
  """One process of several must see those of stages that others hold."""
  found, real = [], jax.device_get
  monkeypatch.setattr(jax, 'device_get', lambda values: found.extend(jax.tree.leaves(values)) or real(values))
  stored.facts(filled(*pipe_form('two')), pipe_form('two')[1])
  assert len(found) > 20 and all(value.sharding.is_fully_replicated for value in found)


def test_index_round_trip():
  index = form(mesh_of(1, 1), 'runs')[1]
  assert stored.from_json(json.loads(json.dumps(stored.to_json(index)))) == index


@pytest.mark.parametrize('dtype', [np.float32, np.float16, jnp.bfloat16, np.float64, np.int32, np.int8])
def test_facts_on_the_host_are_those_on_the_device(dtype, monkeypatch):
  monkeypatch.setattr(stored, 'PIECE', 7)
  values = (100 * np.random.default_rng(0).normal(size=(3, 11))).astype(dtype)
  with jax.enable_x64(True):
    for array in (values, values.T, np.where(values > 120, np.array(np.inf, dtype), values) if np.dtype(dtype).kind == 'f' else values):
      assert stored.host_facts(array) == stored.facts({'x': array})['x']
