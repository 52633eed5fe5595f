"""Batches on the mesh: a process reads only the rows that its devices hold."""

from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmscale.batch import ROWS
from lmscale.config import Config


class Rows(Protocol):
  """What is needed of a loader: samples first_sample + rows as int32 arrays [rows, seq_len]."""

  def batch(self, first_sample: int, rows: range) -> dict[str, np.ndarray]: ...


class Feed:
  """Puts samples on `mesh` as the batches of `parallel.gradients`."""

  def __init__(self, config: Config, mesh: Mesh):
    self.rows_per_microbatch = config.train.microbatch * config.mesh.data
    self.rows = NamedSharding(mesh, PartitionSpec(None, 'data'))
    self.whole = NamedSharding(mesh, PartitionSpec())
    self._seq_len = config.train.seq_len

  def shape(self, microbatches: int) -> tuple[int, int, int]:
    """Of each array of a batch: (microbatches, rows, seq_len)."""
    return microbatches, self.rows_per_microbatch, self._seq_len

  def put(self, loader: Rows, first_sample: int, rows: int, microbatches: int) -> dict[str, jax.Array]:
    """Samples first_sample .. first_sample + rows - 1 in the first rows of `microbatches`; the others have no labels."""
    per, shape = self.rows_per_microbatch, self.shape(microbatches)
    host = {name: np.zeros((microbatches * per, self._seq_len), np.int32) for name in ROWS}
    host['labels'][:] = -1
    for wanted in self._local_rows(rows):
      for name, values in loader.batch(first_sample, wanted).items():
        host[name][wanted.start : wanted.stop] = values
    arrays = {
      name: jax.make_array_from_callback(shape, self.rows, lambda index, name=name: host[name].reshape(shape)[index])
      for name in ROWS
    }
    return arrays | {'microbatches': self.scalar(np.int32(-(-rows // per)))}

  def scalar(self, value: np.generic) -> jax.Array:
    """On every device. `device_put` would compare the processes' values, in a collective."""
    return jax.make_array_from_callback((), self.whole, lambda _: np.asarray(value))

  def _local_rows(self, rows: int) -> list[range]:
    """The rows of a batch that this process's devices hold, as ranges."""
    per = self.rows_per_microbatch
    slices: set[Any] = {
      index[1].indices(per)[:2] for index in self.rows.addressable_devices_indices_map((1, per, 1)).values()
    }
    start, stop = min(s for s, _ in slices), max(s for _, s in slices)
    if (start, stop) == (0, per):
      return [range(rows)]
    ranges = [range(i + s, min(i + e, rows)) for i in range(0, rows, per) for s, e in sorted(slices)]
    return [r for r in ranges if len(r)]
