"""Checkpoints: the one file that knows Orbax.

A checkpoint is a folder `<step>` with two items: `state`, the canonical tree of sharded arrays, and `meta`, JSON. Orbax
makes it appear atomically: a process killed while writing leaves a temporary folder that nobody reads. Two things that
Orbax does not do are done here. It casts to the dtype that is asked for, so names, shapes and dtypes are compared with
what is stored before anything is read. And it does not notice flipped bits, so `meta` carries a checksum per array.
"""

import contextlib
import hashlib
import json
import logging
import pathlib
import re
from collections.abc import Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import multihost

from lmscale import processes as distributed
from lmscale.errors import ConfigError

FORMAT = 2  # raise when older code could not read what is written; 2: with the norms of the last steps
SHOWN = 6  # differences named in an error
ANNOTATIONS = re.compile(r" \[\w+( \w+)*='.*")  # of TensorStore, behind the reason: error codes, specs of thousands of characters


class DamagedCheckpoint(Exception):
  """A checkpoint that is there but cannot be read back as it was written."""


class Checkpointer:
  """Saves and restores canonical trees in `folder`; keeps the newest `keep`. Call from every process.

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
      item_handlers={'state': ocp.StandardCheckpointHandler(), 'meta': ocp.JsonCheckpointHandler()},
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

  def save(self, step: int, tree: Any, meta: dict[str, Any], wait: bool = False) -> None:
    """Stores `tree` (nested dicts of arrays) and `meta` (JSON values) as checkpoint `step`; once only per step.

    Returns when the arrays are copied off the devices; they are on disk after `wait` or the next save. Write whatever
    must not be newer than the checkpoint, such as the log, before calling this.

    Raises:
      ConfigError: this or the previous, asynchronous save failed (a full disk, for example).
    """
    with self._writing():
      self._set_bad_aside()
      if step not in self._manager.all_steps():
        stored = {'format': FORMAT, 'user': meta, 'checksums': checksums(tree)}
        stored['digest'] = _digest(stored)
        args = ocp.args.Composite(state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(stored))
        self._manager.save(step, args=args, force=True)
    if wait:
      self.wait()

  def restore(self, abstract: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """(tree, meta) of checkpoint `step`, or of the newest that is whole, on the shardings of `abstract`.

    abstract: nested dicts of `jax.ShapeDtypeStruct` with shardings, on any mesh. Without `step`, a damaged checkpoint
    is passed over with a warning; the next save moves its folder to `<step>.damaged`. Of several processes all must find
    it damaged; where one cannot read its part, that is an error.

    Raises:
      ConfigError: no checkpoint, none that is whole, or names, shapes or dtypes differ from `abstract`.
    """
    self.wait()
    wanted = self.steps()[::-1] if step is None else [step]
    for candidate in wanted:
      try:
        return self._restore(candidate, abstract)
      except DamagedCheckpoint as damage:
        if step is not None:
          raise ConfigError(f'checkpoint {self.folder / str(step)} is damaged: {damage}') from damage
        logging.getLogger(__name__).warning(
          'CHECKPOINT %s IS DAMAGED (%s): going back to an older one', self.folder / str(candidate), damage
        )
        self._bad.append(candidate)
    found = f'all of {len(wanted)} checkpoints are damaged' if wanted else 'no checkpoint'
    raise ConfigError(f'{self.folder}: {found}; start again in another --workdir')

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
        f'from there ({_first_line(error)})'
      ) from error

  def _restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
    try:
      about = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
      meta, expected, version = about['user'], about['checksums'], about.get('format', 1)
      digest = about.pop('digest', None)
    except Exception as error:  # Orbax has no common type for what a damaged file raises
      raise DamagedCheckpoint(_first_line(error)) from error
    if digest not in (None, _digest(about)):
      raise DamagedCheckpoint('its metadata has changed')
    if version != FORMAT:
      advice = 'update it' if version > FORMAT else 'go on with the older version that wrote it'
      raise ConfigError(
        f'checkpoint {self.folder / str(step)} has format {version}, this version of lmscale reads format {FORMAT}; '
        f'{advice}, or give another --workdir'
      )
    try:
      metadata = self._manager.item_metadata(step).state
      found = {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in _named(metadata.tree).items()}
    except Exception as error:
      raise DamagedCheckpoint(_first_line(error)) from error
    asked = {name: (leaf.shape, np.dtype(leaf.dtype)) for name, leaf in _named(abstract).items()}
    if differences := _differences(found, asked):
      raise ConfigError(f'checkpoint {self.folder / str(step)} does not fit the model: {differences}')
    try:
      tree = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))).state
      facts = _facts(tree)
    except Exception as error:
      if distributed.count() > 1:  # perhaps of this one only: then the others wait for it, and cannot go back with it
        raise ConfigError(
          f'checkpoint {self.folder / str(step)} cannot be read here ({_first_line(error)}); if it is damaged, move its '
          'folder away to go on from the one before'
        ) from error
      raise DamagedCheckpoint(_first_line(error)) from error
    if wrong := [name for name, (checksum, _) in facts.items() if expected.get(name) != checksum]:
      raise DamagedCheckpoint(f'checksum of {", ".join(wrong[:SHOWN])} differs')
    if wrong := [name for name, (_, finite) in facts.items() if not finite]:
      raise DamagedCheckpoint(f'{", ".join(wrong[:SHOWN])} holds NaN or infinity')
    return tree, meta

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


def checksums(tree: Any) -> dict[str, int]:
  """A checksum per array, by its name `a/b/c`: equal on every mesh. Blocks until the arrays are there."""
  return {name: checksum for name, (checksum, _) in _facts(tree).items()}


def _facts(tree: Any) -> dict[str, tuple[int, bool]]:
  """(checksum, whether every number is finite) per array."""
  groups: dict[str, dict[str, jax.Array]] = {}
  for name, leaf in _named(tree).items():
    groups.setdefault(name.rpartition('/')[0], {})[name.rpartition('/')[2]] = leaf
  found = {}
  for parent, leaves in groups.items():
    # One program at a time: programs with collectives that do not depend on each other deadlock on emulated devices.
    # One per layer: layers of a kind share a compiled one.
    facts = jax.device_get(_layer_facts(leaves))
    found |= {f'{parent}/{name}'.lstrip('/'): (int(bits), bool(finite)) for name, (bits, finite) in facts.items()}
  return found


@jax.jit
def _layer_facts(leaves: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
  """The sums of the arrays' bits as unsigned words, modulo 2^32: any single bit changes its array's. And is it finite."""

  def one(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    finite = jnp.all(jnp.isfinite(x))
    if x.dtype == bool:
      x = x.astype(jnp.uint8)
    words = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jnp.sum(jax.lax.bitcast_convert_type(x, words), dtype=jnp.uint32), finite

  return {name: one(x) for name, x in leaves.items()}


def _digest(values: dict[str, Any]) -> str:
  """Of JSON values, whatever the order of keys."""
  return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _named(tree: Any) -> dict[str, Any]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {'/'.join(str(getattr(key, 'key', key)) for key in path): leaf for path, leaf in leaves}


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


def _first_line(error: Exception) -> str:
  line = ANNOTATIONS.sub('', (str(error).splitlines() or [''])[0])
  text = f'{type(error).__name__}: {line}'
  return text if len(text) <= 300 else f'{text[:150]} ... {text[-140:]}'  # the system's own words come last
