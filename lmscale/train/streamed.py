"""A checkpoint written and read a few arrays at a time: what is imported or exported need not fit in memory.

It is written as `checkpoint.Checkpointer` writes one and read by it; nothing else knows the difference.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from lmscale.errors import ConfigError
from lmscale.train import stored
from lmscale.train.checkpoint import Checkpointer, DamagedCheckpoint, first_line, signed
from lmscale.train.stored import Index

TOGETHER = 1 << 25  # bytes: every write of its own leaves a copy of the file's directory behind
Done = Callable[[str, np.ndarray], None]


@dataclasses.dataclass(frozen=True)
class Pending:
  """An array that is made when it is written: load() gives it, of this shape and dtype."""

  shape: tuple[int, ...]
  dtype: np.dtype
  load: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


class _PendingHandler(ocp.type_handlers.NumpyHandler):
  """Writes arrays that are pending a few at a time; tells `done` of (path, array) before."""

  def __init__(self, done: Done):
    super().__init__(deepcopy_host_arrays=False)
    self._done = done

  async def serialize(self, values: Sequence[Pending], infos: Sequence[Any], args: Sequence[Any] | None = None) -> list[Any]:
    batch: list[tuple] = []
    for value, info, arg in zip(values, infos, args, strict=True):
      batch.append((value.load(), info, arg))
      self._done('/'.join(str(key.key) for key in info.keypath), batch[-1][0])
      if sum(array.nbytes for array, *_ in batch) >= TOGETHER or value is values[-1]:
        for future in await super().serialize(*map(list, zip(*batch, strict=True))):
          future.result()
        batch = []
    return []


def write_once(folder: pathlib.Path, step: int, leaves: dict[str, Pending], meta: dict[str, Any], index: Index) -> None:
  """The only checkpoint of a new folder, as `Checkpointer.save` would write it, with few arrays at a time in memory.

  leaves: {path: array to come}; see `stored` for paths and index. By one process. The caller makes it appear at once.
  """
  checksums: dict[str, int] = {}

  def done(path: str, array: np.ndarray) -> None:
    rows = zip(stored.canonical_names(path, index), array if stored.is_stacked(path, index) else [array], strict=True)
    for name, row in rows:
      checksums[name], finite = stored.host_facts(row)
      if not finite:
        raise ConfigError(f'{name} holds NaN or infinity')

  try:
    _write(folder, step, leaves, meta, index, done, checksums)
  except (ConfigError, OSError):
    raise
  except Exception as error:  # whatever the storage below Orbax raises
    raise ConfigError(f'{folder}: cannot be written ({first_line(error)}); give another folder, or make room') from error


def _write(
  folder: pathlib.Path, step: int, leaves: dict[str, Pending], meta: dict[str, Any], index: Index, done: Done, checksums: dict[str, int]
) -> None:
  registry = ocp.type_handlers.create_type_handler_registry((Pending, _PendingHandler(done)))
  folder = folder.absolute() / str(step)
  folder.mkdir(parents=True)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as arrays:
    arrays.save(folder / 'state', args=ocp.args.PyTreeSave(stored.nested(leaves)))
  about = signed(step, meta, index, checksums)
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as texts:
    texts.save(folder / 'meta', args=ocp.args.JsonSave(about))


class Rows:
  """The parameters of a checkpoint, one layer's at a time, by their canonical names without `params/`: `layers/3/q_kernel`.

  shapes, dtypes: {name: ...}. Nothing but the rows that are read is in memory.

  Raises:
    DamagedCheckpoint: here or in `read`, where it is not what was written.
  """

  def __init__(self, checkpoints: Checkpointer, step: int):
    self._folder = checkpoints.folder / str(step) / 'state'
    index, self._checksums, found = checkpoints.described(step, 'params')
    self._places: dict[str, tuple[str, int | None]] = {}
    self.shapes, self.dtypes = {}, {}
    for path, leaf in found.items():
      stacked = stored.is_stacked(path, index)
      for row, name in enumerate(stored.canonical_names(path, index)):
        if short := name.removeprefix('params/'):
          self._places[short] = (path, row if stacked else None)
          self.shapes[short], self.dtypes[short] = tuple(leaf.shape)[stacked:], np.dtype(leaf.dtype)

  def read(self, name: str) -> np.ndarray:
    """The parameter, after its checksum was compared."""
    path, row = self._places[name]
    at = {'driver': 'ocdbt', 'base': f'file://{self._folder}/', 'path': path.replace('/', '.') + '/'}
    try:
      array = tensorstore.open({'driver': 'auto', 'kvstore': at}, open=True, read=True).result()
      value = np.asarray((array if row is None else array[row]).read().result())
      checksum, finite = stored.host_facts(value)
    except Exception as error:
      raise DamagedCheckpoint(first_line(error)) from error
    if self._checksums.get(f'params/{name}') != checksum:
      raise DamagedCheckpoint(f'checksum of {name} differs')
    if not finite:
      raise DamagedCheckpoint(f'{name} holds NaN or infinity')
    return value
