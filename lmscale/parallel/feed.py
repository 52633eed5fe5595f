"""Batches on the mesh: a process reads only the rows that its devices hold."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmscale.batch import ROWS
from lmscale.config import Config
from lmscale.parallel.pipeline.layout import forward_table, step_table
from lmscale.parallel.pipeline.table import NOTHING


class Rows(Protocol):
  """What is needed of a loader: samples first_sample + rows as int32 arrays [rows, seq_len]."""

  def batch(self, first_sample: int, rows: range) -> dict[str, np.ndarray]: ...


def batch_specs(config: Config) -> dict[str, PartitionSpec]:
  """How each array of a batch is cut over the mesh."""
  specs = dict.fromkeys(ROWS, PartitionSpec(None, 'data')) | {'microbatches': PartitionSpec()}
  return specs | ({'table': PartitionSpec(), 'ticks': PartitionSpec()} if config.mesh.pipe > 1 else {})


class Feed:
  """Puts samples on `mesh` as the batches of `parallel.gradients`."""

  def __init__(self, config: Config, mesh: Mesh):
    self._config, self._mesh = config, mesh
    self.rows_per_microbatch = config.train.microbatch * config.mesh.data
    self.rows = NamedSharding(mesh, PartitionSpec(None, 'data'))
    self.whole = NamedSharding(mesh, PartitionSpec())
    self._seq_len = config.train.seq_len
    self._tables: dict[tuple[int, bool], dict[str, jax.Array]] = {}

  def abstract(self, microbatches: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a training batch."""
    shapes = dict.fromkeys(ROWS, self.shape(microbatches)) | {'microbatches': ()}
    if self._config.mesh.pipe > 1:
      shapes |= {'table': step_table(self._config).cells.shape, 'ticks': ()}
    at = {name: NamedSharding(self._mesh, spec) for name, spec in batch_specs(self._config).items()}
    return {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=at[name]) for name, shape in shapes.items()}

  def shape(self, microbatches: int) -> tuple[int, int, int]:
    """Of each array of a batch: (microbatches, rows, seq_len)."""
    return microbatches, self.rows_per_microbatch, self._seq_len

  def put(
    self, loader: Rows, first_sample: int, rows: int, microbatches: int, trains: bool = True
  ) -> dict[str, jax.Array]:
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
    count = -(-rows // per)
    return arrays | {'microbatches': self.scalar(np.int32(count))} | self._table(count, trains)

  def _table(self, count: int, trains: bool) -> dict[str, jax.Array]:
    """The timetable of `count` microbatches, with room for that of a full batch."""
    config, key = self._config, (count, trains)
    if config.mesh.pipe > 1 and key not in self._tables:
      make = step_table if trains else forward_table
      cells, room = make(config, count).cells, len(make(config).cells)
      padded = np.full((room, *cells.shape[1:]), NOTHING, np.int32)
      padded[: len(cells)] = cells
      at = NamedSharding(self._mesh, batch_specs(config)['table'])
      table = jax.make_array_from_callback(padded.shape, at, lambda index: padded[index])
      self._tables[key] = {'table': table, 'ticks': self.scalar(np.int32(len(cells)))}
    return self._tables.get(key, {})

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
