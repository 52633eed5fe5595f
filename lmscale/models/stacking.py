"""Which layer lies in which row: the pattern cut into runs, and the layers of a run stacked by their place in its unit.

For instance `M-M-M-*-*-` is cut into (`M-`, 3 rows) and (`*-`, 2 rows). The parameters of each place of a unit lie in one
array per name, with a leading dim of rows. `Stack` says which layers those are; the runs that are executed, the sharding
of the leading dim and the index of a checkpoint all follow from it.
In memory: runs[i][j] is the dict of parameters of place j of run i. In canonical order there is one dict per layer;
`to_layers` and `from_layers` are exact inverses.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Stack:
  """Layers of one kind whose parameters lie in one array per name: row r holds layer `layers[r]` in canonical order.

  A row may hold none, FILLER: its numbers are zeros. (Pipeline stages need not have equally many layers of a kind.)
  """

  kind: str
  layers: tuple[int, ...]

  def rows(self) -> Iterator[tuple[int, int]]:
    """(row, layer) of those that hold one."""
    return ((row, layer) for row, layer in enumerate(self.layers) if layer != FILLER)


Run = tuple[Stack, ...]  # executed row by row: row 0 of each of its stacks, then row 1, ...
Stacking = tuple[Run, ...]

FILLER = -1
MANY = 1 << 16  # more than there are layers


def make_stacking(layers: str, mode: str) -> Stacking:
  """The stacking of a pattern (one symbol per layer): mode 'runs', or 'unrolled' for one run per layer."""
  return find_runs(layers) if mode == 'runs' else _stacking([(kind, 1) for kind in layers])


@functools.cache
def find_runs(layers: str) -> Stacking:
  """Cuts a pattern into runs with the fewest distinct layer bodies, then the fewest runs, then the longest last run.

  Dynamic programming over prefixes in O(n^2), all unit lengths at once. A cut is one integer of three digits to the base
  MANY: the summed length of its units, the number of its runs, the start of its last run.
  """
  kinds = np.frombuffer(layers.encode(), np.uint8)
  n = len(kinds)
  best = np.zeros(n + 1, np.int64)  # [end]: the best cut of layers[:end]
  last = np.zeros((n + 1, n + 1), np.int64)  # [p, end]: the best one whose last run has a unit of length p
  equal = np.zeros(n + 1, np.int64)  # [p]: how many symbols in a row, up to `end`, equal the one p before
  units = np.zeros(n + 1, np.int64)  # [end]: the unit length of the last run of the best cut
  for end in range(1, n + 1):
    p = np.arange(1, end + 1)
    start = end - p
    begun = best[start] // MANY * MANY + p * MANY**2 + MANY + start
    equal[p] = np.where((kinds[end - 1 - p] == kinds[end - 1]) & (p < end), equal[p] + 1, 0)
    last[p, end] = np.where(equal[p] >= p, np.minimum(begun, last[p, start]), begun)
    units[end] = p[np.argmin(last[p, end])]
    best[end] = last[units[end], end]
  runs, end = [], n
  while end:
    start = int(best[end]) % MANY
    runs.append((layers[start : start + units[end]], (end - start) // int(units[end])))
    end = start
  return _stacking(runs[::-1])


def _stacking(runs: list[tuple[str, int]]) -> Stacking:
  """From (unit, repeats) of each run."""
  stacking, start = [], 0
  for unit, repeats in runs:
    stop = start + len(unit) * repeats
    stacking.append(tuple(Stack(kind, tuple(range(start + j, stop, len(unit)))) for j, kind in enumerate(unit)))
    start = stop
  return tuple(stacking)


def map_stacks(function: Any, stacking: Stacking, *trees: Any) -> tuple:
  """function(stack, part of each tree) for every stack, in the structure of `stacking`."""
  return tuple(
    tuple(function(stack, *parts) for stack, *parts in zip(run, *rest, strict=True))
    for run, *rest in zip(stacking, *trees, strict=True)
  )


def from_layers(layers: list[Any], stacking: Stacking) -> tuple:
  """Canonical order -> runs: stacks the layers of each place. Inverse of `to_layers`."""

  def stacked(stack: Stack) -> Any:
    nothing = jax.tree.map(jnp.zeros_like, layers[max(stack.layers)])
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[nothing if i == FILLER else layers[i] for i in stack.layers])

  return map_stacks(stacked, stacking)


def to_layers(runs: tuple, stacking: Stacking) -> list[Any]:
  """Runs -> canonical order, one tree per layer. Inverse of `from_layers`."""
  layers: dict[int, Any] = {}
  for run, stacks in zip(runs, stacking, strict=True):
    for part, stack in zip(run, stacks, strict=True):
      for row, index in stack.rows():
        layers[index] = jax.tree.map(lambda leaf, row=row: leaf[row], part)
  return [layers[i] for i in range(len(layers))]
