"""A checkpoint of arrays that come one at a time: what is imported need not fit in memory.

It is written as `checkpoint.Checkpointer` writes one and read by it; nothing else knows the difference.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from lmscale.errors import ConfigError
from lmscale.train import stored
from lmscale.train.checkpoint import SHOWN, first_line, signed
from lmscale.train.stored import Index

Done = Callable[[str, dict[str, tuple[int, bool]]], None]  # of (path, its facts), see `stored`


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
  """Writes arrays that are pending one after another; tells `done` of (path, its facts, see `stored`)."""

  def __init__(self, index: Index, done: Done):
    super().__init__(deepcopy_host_arrays=False)
    self._index, self._done = index, done

  async def serialize(self, values: Sequence[Pending], infos: Sequence[Any], args: Sequence[Any] | None = None) -> list[Any]:
    for value, info, arg in zip(values, infos, args, strict=True):
      array = value.load()
      path = '/'.join(str(key.key) for key in info.keypath)
      self._done(path, stored.facts(stored.nested({path: array}), self._index))
      for future in await super().serialize([array], [info], [arg]):
        future.result()
    return []


def write_once(folder: pathlib.Path, step: int, leaves: dict[str, Pending], meta: dict[str, Any], index: Index) -> None:
  """The only checkpoint of a new folder, as `Checkpointer.save` would write it, with one array at a time in memory.

  leaves: {path: array to come}; see `stored` for paths and index. By one process. The caller makes it appear at once.
  """
  checksums: dict[str, int] = {}

  def done(path: str, facts: dict[str, tuple[int, bool]]) -> None:
    if wrong := [name for name, (_, finite) in facts.items() if not finite]:
      raise ConfigError(f'{", ".join(wrong[:SHOWN])} holds NaN or infinity')
    checksums.update({name: checksum for name, (checksum, _) in facts.items()})

  try:
    _write(folder, step, leaves, meta, index, done, checksums)
  except (ConfigError, OSError):
    raise
  except Exception as error:  # whatever the storage below Orbax raises
    raise ConfigError(f'{folder}: cannot be written ({first_line(error)}); give another folder, or make room') from error


def _write(
  folder: pathlib.Path, step: int, leaves: dict[str, Pending], meta: dict[str, Any], index: Index, done: Done, checksums: dict[str, int]
) -> None:
  registry = ocp.type_handlers.create_type_handler_registry((Pending, _PendingHandler(index, done)))
  folder = folder.absolute() / str(step)
  folder.mkdir(parents=True)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as arrays:
    arrays.save(folder / 'state', args=ocp.args.PyTreeSave(stored.nested(leaves)))
  about = signed(step, meta, index, checksums)
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as texts:
    texts.save(folder / 'meta', args=ocp.args.JsonSave(about))
