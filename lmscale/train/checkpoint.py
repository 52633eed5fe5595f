"""Checkpoints: the file that knows Orbax (`streamed` beside it writes one array at a time).

A checkpoint is a folder `<step>` with two items: `state`, the sharded arrays as they lie in memory, and `meta`, JSON with the
index of their rows (see `stored`). A save never transforms; a restore with the same stacking goes straight into place, with
another it permutes rows, one group of stacks at a time, so that its peak is the state and twice the largest group.

Orbax makes a checkpoint appear atomically: a process killed while writing leaves a temporary folder that nobody reads. Two
things that Orbax does not do are done here. It casts to the dtype that is asked for, so names, shapes and dtypes are
compared with what is stored before anything is read. And it does not notice flipped bits, so `meta` carries a checksum per
array, or per row of a stack.
"""

import contextlib
import functools
import hashlib
import json
import logging
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import multihost

from lmscale import processes
from lmscale.errors import ConfigError
from lmscale.train import stored
from lmscale.train.stored import Index

FORMAT = 3  # raise when older code could not read what is written; 3: arrays as they lie in memory, and an index
READABLE = (1, 2, 3)  # 1 and 2: one array per layer
ADDED = {1: ('spikes', 'norms')}  # what the state did not have in a format
CHUNK = 2**20  # bytes: a larger row is a chunk of its own in the file, so that one layer can be read alone
SHOWN = 6  # differences named in an error
ANNOTATIONS = re.compile(r" \[\w+( \w+)*='.*")  # of TensorStore, behind the reason: error codes, specs of thousands of characters


Check = Callable[[int, dict[str, Any]], None]  # of (step, meta); raises ConfigError


class DamagedCheckpoint(Exception):
  """A checkpoint that is there but cannot be read back as it was written."""


def signed(step: int, meta: dict[str, Any], index: Index, checksums: dict[str, int]) -> dict[str, Any]:
  """What is written about a checkpoint."""
  about = {'format': FORMAT, 'step': step, 'user': meta, 'index': stored.to_json(index), 'checksums': checksums}
  return about | {'digest': _digest(about)}


class Checkpointer:
  """Saves and restores trees in `folder` (nested dicts of arrays, see `stored`); keeps the newest `keep`. Call from every process.

  read_only: for the checkpoints of another run, which may be going on: nothing there is changed or removed.

  Raises:
    ConfigError: a checkpoint's metadata is damaged so that the folder cannot be opened.
  """

  def __init__(self, folder: str | pathlib.Path, keep: int = 3, read_only: bool = False):
    self.folder = pathlib.Path(folder).absolute()
    self._bad: list[int] = []  # steps found damaged, out of the way before the next save
    _check_metadata(self.folder)
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, cleanup_tmp_directories=not read_only, create=not read_only, read_only=read_only
      ),
      item_handlers={'state': ocp.PyTreeCheckpointHandler(), 'meta': ocp.JsonCheckpointHandler()},
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
    try:
      self.close()
    except Exception:
      if error is None:  # otherwise what went wrong first is what is told
        raise

  def steps(self) -> list[int]:
    """Steps with a checkpoint, on disk or on its way, oldest first, without those a restore found damaged."""
    return sorted(set(self._manager.all_steps()) - set(self._bad))

  def latest(self) -> int | None:
    """The newest of `steps`, or None."""
    return max(self.steps(), default=None)

  def save(self, step: int, tree: Any, meta: dict[str, Any], wait: bool = False, index: Index | None = None) -> None:
    """Stores `tree` and `meta` (JSON values) as checkpoint `step`; once only per step. index: of the stacks in `tree`.

    Returns when the arrays are copied off the devices; they are on disk after `wait` or the next save, and may be donated
    at once. (A CPU's memory is not copied: there Orbax holds the arrays themselves, and a step to which they are donated
    takes others.) Write whatever must not be newer than the checkpoint, such as the log, before calling this.

    Raises:
      ConfigError: this or the previous, asynchronous save failed (a full disk, for example).
    """
    with self._writing():
      self._set_bad_aside()
      if step not in self._manager.all_steps():
        index = index or {}
        about = signed(step, meta, index, stored.checksums(tree, index))
        state = ocp.args.PyTreeSave(tree, save_args=_save_args(tree, index))
        args = ocp.args.Composite(state=state, meta=ocp.args.JsonSave(about))
        self._manager.save(step, args=args, force=True)
    if wait:
      self.wait()

  def restore(
    self,
    abstract: Any,
    step: int | None = None,
    index: Index | None = None,
    check: Check = lambda step, meta: None,
    partial: bool = False,
    cast: bool = False,
  ) -> tuple[Any, dict[str, Any]]:
    """(tree, meta) of checkpoint `step`, or of the newest that is whole, on the shardings of `abstract`.

    abstract: nested dicts of `jax.ShapeDtypeStruct` with shardings, on any mesh, stacked as `index` says; what is stored may
    be stacked in another way. partial: a top-level entry that is not asked for is not read. cast: floating numbers may be stored
    in another dtype, and become that of `abstract` one stack of layers at a time. check(step, meta) is called before arrays
    are read, and may refuse the checkpoint by a ConfigError. Without `step`, a damaged checkpoint
    is passed over with a warning; the next save moves its folder to `<step>.damaged`. Of several processes all must find
    it damaged; where one cannot read its part, that is an error.

    Raises:
      ConfigError: no checkpoint, none that is whole, or names, shapes or dtypes differ from `abstract`.
    """
    self.wait()
    wanted = self.steps()[::-1] if step is None else [step]
    for candidate in wanted:
      try:
        check(candidate, self.meta(candidate))
        return self._restore(candidate, abstract, index or {}, partial, cast)
      except DamagedCheckpoint as damage:
        if step is not None:
          raise ConfigError(f'checkpoint {self.folder / str(step)} is damaged: {damage}') from damage
        logging.getLogger(__name__).warning(
          'CHECKPOINT %s IS DAMAGED (%s): going back to an older one', self.folder / str(candidate), damage
        )
        self._bad.append(candidate)
    found = f'all of {len(wanted)} checkpoints are damaged' if wanted else 'no checkpoint'
    raise ConfigError(f'{self.folder}: {found}; start again in another --workdir')

  def meta(self, step: int) -> dict[str, Any]:
    """What was stored with checkpoint `step`, without its arrays.

    Raises:
      DamagedCheckpoint: it is not what was written, or was written as another step.
      ConfigError: a later version of lmscale wrote it.
    """
    return self._about(step)['user']

  def described(self, step: int, part: str) -> tuple[Index, dict[str, int], dict[str, Any]]:
    """(index, checksums by canonical name, {path: shape and dtype}) of a top-level entry of checkpoint `step`, such as `params`.

    Raises:
      DamagedCheckpoint, ConfigError: as `meta`.
    """
    about = self._about(step)
    try:
      return about['index'], about['checksums'], stored.named({part: self._manager.item_metadata(step).state.tree[part]})
    except Exception as error:
      raise DamagedCheckpoint(first_line(error)) from error

  def wait(self) -> None:
    """Returns when every save is on disk. Raises ConfigError if one failed."""
    with self._writing():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then releases Orbax's threads. Raises ConfigError if a save failed."""
    with self._writing():
      self._manager.close()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Tells people in one line that a save failed, and which checkpoint is the last whole one."""
    try:
      yield
    except Exception as error:  # whatever the storage below Orbax raises
      whole = max((int(path.name) for path in self.folder.glob('*') if path.name.isdigit()), default=None)
      kept = 'there is no earlier one' if whole is None else f'the last good one is of step {whole}'
      raise ConfigError(
        f'{self.folder}: a checkpoint could not be saved, {kept}; make room and run the same command again to go on '
        f'from there ({first_line(error)})'
      ) from error

  def _restore(self, step: int, abstract: Any, index: Index, partial: bool, cast: bool) -> tuple[Any, dict[str, Any]]:
    about = self._about(step)
    source = about['index']
    asked = stored.named({name: part for name, part in abstract.items() if name not in ADDED.get(about['format'], ())})
    try:
      tree = self._manager.item_metadata(step).state.tree
      found = stored.named({name: part for name, part in tree.items() if name in abstract or not partial})
      rows = _rows(found, source)
    except Exception as error:
      raise DamagedCheckpoint(first_line(error)) from error
    wanted = _rows(asked, index)
    if differences := _differences(_castable(rows, wanted) if cast else rows, wanted):
      raise ConfigError(f'checkpoint {self.folder / str(step)} does not fit the model: {differences}')
    leaves, facts = {}, {}
    try:
      for part in self._parts(step, asked, index, found, source, cast):
        facts |= stored.facts(stored.nested(part), index)
        leaves |= {path: _cast(leaf, asked[path]) for path, leaf in part.items()}
    except Exception as error:
      if processes.count() > 1:  # perhaps of this one only: then the others wait for it, and cannot go back with it
        raise ConfigError(
          f'checkpoint {self.folder / str(step)} cannot be read here ({first_line(error)}); if it is damaged, move its '
          'folder away to go on from the one before'
        ) from error
      raise DamagedCheckpoint(first_line(error)) from error
    facts = {name: facts[name] for path in asked for name in stored.canonical_names(path, index) if name}
    if wrong := [name for name, (checksum, _) in facts.items() if about['checksums'].get(name) != checksum]:
      raise DamagedCheckpoint(f'checksum of {", ".join(wrong[:SHOWN])} differs')
    if wrong := [name for name, (_, finite) in facts.items() if not finite]:
      raise DamagedCheckpoint(f'{", ".join(wrong[:SHOWN])} holds NaN or infinity')
    return stored.nested({path: leaves[path] for path in asked}), about['user']

  def _parts(
    self, step: int, asked: dict[str, Any], index: Index, found: dict[str, Any], source: Index, cast: bool
  ) -> Iterator[dict[str, jax.Array]]:
    """The arrays that are asked for, in the dtypes in which they are stored: what lies as asked at once, or (`cast`) each stack by
    itself; then what has to be moved, move by move."""
    straight: dict[str, dict[str, Any]] = {}
    for path, like in asked.items():
      if path in found and index.get(_parent(path)) == source.get(_parent(path)):
        straight.setdefault(_parent(path) if cast else '', {})[path] = _as_stored(like, found[path].dtype)
    for part in straight.values():
      yield self._read(step, part)
    done = {path for part in straight.values() for path in part}
    for move in stored.moves([path for path in asked if path not in done], index, found, source):
      yield self._moved(step, move, asked, found, source)

  def _about(self, step: int) -> dict[str, Any]:
    """What is written about a checkpoint: format, user, index, checksums."""
    try:
      about = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
      version, digest = about.get('format', 1), about.pop('digest', None)
    except Exception as error:  # Orbax has no common type for what a damaged file raises
      raise DamagedCheckpoint(first_line(error)) from error
    if digest not in (None, _digest(about)):
      raise DamagedCheckpoint('its metadata has changed')
    if about.get('step', step) != step:
      raise DamagedCheckpoint(f'it is the checkpoint of step {about["step"]}')
    if version not in READABLE:
      raise ConfigError(
        f'checkpoint {self.folder / str(step)} has format {version}, this version of lmscale reads up to {FORMAT}; '
        'update it, or give another --workdir'
      )
    try:
      index = stored.from_json(about.get('index', {}))
      return {'format': version, 'user': about['user'], 'checksums': about['checksums'], 'index': index}
    except Exception as error:
      raise DamagedCheckpoint(first_line(error)) from error

  def _read(self, step: int, asked: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Some arrays of a checkpoint as they were written, by path."""
    if not asked:
      return {}
    tree = stored.nested(asked)
    how = ocp.checkpoint_utils.construct_restore_args(tree)
    args = ocp.args.PyTreeRestore(tree, restore_args=how, partial_restore=True)
    return stored.named(self._manager.restore(step, args=ocp.args.Composite(state=args)).state)

  def _moved(
    self, step: int, move: stored.Move, asked: dict[str, Any], found: dict[str, Any], source: Index
  ) -> dict[str, jax.Array]:
    """The targets of a move, made of its sources, which are let go."""
    like = asked[move.targets[0]]

    def source_like(path: str) -> jax.ShapeDtypeStruct:
      shape = tuple(found[path].shape)
      at = stored.row_sharding(like, stored.is_stacked(path, source), shape[0])
      return jax.ShapeDtypeStruct(shape, found[path].dtype, sharding=at)

    arrays = self._read(step, {path: source_like(path) for path in move.sources})
    take = stored.make_taker(move.places, tuple(asked[path].sharding for path in move.targets))
    made = jax.block_until_ready(take([arrays[path] for path in move.sources]))
    return dict(zip(move.targets, made, strict=True))

  def _set_bad_aside(self) -> None:
    """Renames damaged checkpoints, so that their steps can be saved again and nothing is lost."""
    if not self._bad:
      return
    for step in self._bad if jax.process_index() == 0 else ():
      target, attempt = self.folder / f'{step}.damaged', 1
      while target.exists():
        target, attempt = self.folder / f'{step}.damaged-{attempt}', attempt + 1
      (self.folder / str(step)).rename(target)
    multihost.sync_global_processes('lmscale:damaged-checkpoints-set-aside')
    self._bad.clear()
    self._manager.reload()


def _check_metadata(folder: pathlib.Path) -> None:
  """Orbax reads every checkpoint's own metadata when it opens the folder, and stumbles over JSON that is nested too deep."""
  for path in (step / '_CHECKPOINT_METADATA' for step in folder.glob('*') if step.name.isdigit()):
    try:
      json.loads(path.read_text(encoding='utf-8'))
    except RecursionError as error:
      raise ConfigError(f'{path} is damaged; move {path.parent} away to go on from the other checkpoints') from error
    except (OSError, ValueError):  # which Orbax passes over
      pass


def _save_args(tree: Any, index: Index) -> Any:
  """One chunk per row of a stack where rows are large."""

  def one(leaf: jax.Array, stacked: bool) -> ocp.SaveArgs:
    row = leaf.nbytes // max(leaf.shape[0], 1) if stacked else 0
    return ocp.SaveArgs(chunk_byte_size=row, shard_axes=(0,)) if row >= CHUNK else ocp.SaveArgs()

  return stored.nested({path: one(leaf, stored.is_stacked(path, index)) for path, leaf in stored.named(tree).items()})


def _rows(leaves: dict[str, Any], index: Index) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """{canonical name: (shape, dtype)} of every row."""
  rows = {}
  for path, leaf in leaves.items():
    shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
    names = stored.canonical_names(path, index)
    if stored.is_stacked(path, index):
      if shape[:1] != (len(names),):
        raise ValueError(f'{path} of shape {list(shape)} is no stack of {len(names)} layers')
      shape = shape[1:]
    rows |= dict.fromkeys(filter(None, names), (shape, dtype))
  return rows


def _castable(found: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
  """`found` of `_rows`, with the dtypes that are asked for where the stored ones can be read and become them."""

  def readable(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jax.dtypes.canonicalize_dtype(dtype) == dtype

  return {name: (shape, asked[name][1] if name in asked and readable(dtype) else dtype) for name, (shape, dtype) in found.items()}


def _as_stored(like: jax.ShapeDtypeStruct, dtype: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(like.shape, dtype, sharding=like.sharding)


def _cast(leaf: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
  """`leaf` in the dtype of `like`; the other one is let go when that is there."""
  return leaf if leaf.dtype == like.dtype else jax.block_until_ready(_caster(like.dtype, like.sharding)(leaf))


@functools.cache
def _caster(dtype: Any, sharding: Any) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(lambda leaf: leaf.astype(dtype), out_shardings=sharding)


def _parent(path: str) -> str:
  return path.rpartition('/')[0]


def _digest(values: dict[str, Any]) -> str:
  """Of JSON values, whatever the order of keys."""
  return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _differences(found: dict[str, Any], asked: dict[str, Any]) -> str:
  """What differs between two {name: (shape, dtype)}, as one line; empty if nothing does."""

  def show(entry: tuple[tuple[int, ...], np.dtype]) -> str:
    return f'{entry[1]}{list(entry[0])}'

  lines = []
  for name in sorted(found.keys() | asked.keys()):
    if name not in asked:
      lines.append(f'{name} is stored but not in the model')
    elif name not in found:
      lines.append(f'{name} is in the model but not stored')
    elif found[name] != asked[name]:
      lines.append(f'{name} is stored as {show(found[name])}, the model has {show(asked[name])}')
  more = f'; and {len(lines) - SHOWN} more' if len(lines) > SHOWN else ''
  return '; '.join(lines[:SHOWN]) + more


def first_line(error: Exception) -> str:
  """What an error of Orbax or TensorStore says, in one line of at most 300 characters."""
  line = ANNOTATIONS.sub('', (str(error).splitlines() or [''])[0])
  text = f'{type(error).__name__}: {line}'
  return text if len(text) <= 300 else f'{text[:150]} ... {text[-140:]}'  # the system's own words come last
