"""The stored form of a state: its arrays as they lie in memory, and an index that says which layer lies in which row.

A tree of nested dicts; its leaves are named by their paths, `params/layers/0/1/x_kernel`. Under a path that the index holds
(`params/layers/0/1`) each leaf has a leading dim of rows, one per layer of a `Stack`. Every row has a canonical name
(`params/layers/4/x_kernel`) that no stacking changes: by it checksums are kept, shapes compared, and rows found again for a
model that is stacked in another way. `canonical` is the same tree by layer, a view for reading.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lmscale.models.stacking import FILLER, Stack, Stacking

Index = dict[str, Stack]
PIECE = 1 << 22  # numbers looked at at a time


def named(tree: Any) -> dict[str, Any]:
  """{path: leaf} of nested dicts."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {'/'.join(str(getattr(key, 'key', key)) for key in path): leaf for path, leaf in leaves}


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
  """Inverse of `named`."""
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *parents, name = path.split('/')
    at = tree
    for parent in parents:
      at = at.setdefault(parent, {})
    at[name] = leaf
  return tree


def unstacked(params: Any) -> dict[str, Any]:
  """Parameters as they lie in memory, `layers` a tuple of runs, as nested dicts `layers/<run>/<place>`."""
  return {**params, 'layers': {str(i): {str(j): p for j, p in enumerate(run)} for i, run in enumerate(params['layers'])}}


def stacked(tree: dict[str, Any], stacking: Stacking) -> dict[str, Any]:
  """Inverse of `unstacked`."""
  layers = tuple(tuple(tree['layers'][str(i)][str(j)] for j in range(len(run))) for i, run in enumerate(stacking))
  return {**tree, 'layers': layers}


def index_of(stacking: Stacking, trees: Iterable[str]) -> Index:
  """Which layer lies in which row of the stacks of each tree, such as `params`."""
  places = [(i, j, stack) for i, run in enumerate(stacking) for j, stack in enumerate(run)]
  return {f'{tree}/layers/{i}/{j}': stack for tree in trees for i, j, stack in places}


def canonical_names(path: str, index: Index) -> list[str]:
  """The canonical name of each row of the leaf at `path`, '' for one that holds no layer; of one that is no stack, its path."""
  parent, _, name = path.rpartition('/')
  if parent not in index:
    return [path]
  family = parent.partition('/layers/')[0]
  return ['' if layer == FILLER else f'{family}/layers/{layer}/{name}' for layer in index[parent].layers]


def is_stacked(path: str, index: Index) -> bool:
  """Whether the leaf at `path` has a leading dim of rows."""
  return path.rpartition('/')[0] in index


def canonical(tree: Any, index: Index) -> dict[str, Any]:
  """The tree by layer, `layers/<canonical index>/<name>`: rows are cut out of the stacks. For reading, not for storing."""
  view = {}
  for path, leaf in named(tree).items():
    names = canonical_names(path, index)
    view |= {name: leaf[row] for row, name in enumerate(names) if name} if is_stacked(path, index) else {path: leaf}
  return nested(view)


def to_json(index: Index) -> dict[str, Any]:
  """The index as JSON values."""
  return {path: {'kind': stack.kind, 'layers': list(stack.layers)} for path, stack in index.items()}


def from_json(values: dict[str, Any]) -> Index:
  """Inverse of `to_json`."""
  return {path: Stack(value['kind'], tuple(value['layers'])) for path, value in values.items()}


@dataclasses.dataclass(frozen=True)
class Move:
  """Stacks that are made of the rows of others. places: for each target, (which source, which of its rows) of every row;
  row None: the source is one layer's array and no stack; None in place of both: a row of zeros."""

  sources: tuple[str, ...]
  targets: tuple[str, ...]
  places: tuple[tuple[tuple[int, int | None] | None, ...], ...]


def moves(asked: Iterable[str], index: Index, found: Iterable[str], source: Index) -> list[Move]:
  """How the stacks at paths `asked` come from the arrays at paths `found`, which are stacked in another way.

  One move per tree, layer kind and name, so that what exists twice at a time is small.
  """
  where: dict[str, tuple[str, int | None]] = {}
  for path in found:
    stacked = is_stacked(path, source)
    where |= {name: (path, row if stacked else None) for row, name in enumerate(canonical_names(path, source)) if name}
  groups: dict[tuple[str, str, str], list[str]] = {}
  for path in asked:
    parent, _, name = path.rpartition('/')
    groups.setdefault((parent.partition('/layers/')[0], index[parent].kind, name), []).append(path)
  return [_move(targets, index, where) for targets in groups.values()]


def _move(targets: list[str], index: Index, where: dict[str, tuple[str, int | None]]) -> Move:
  rows = [[where[name] if name else None for name in canonical_names(target, index)] for target in targets]
  sources = list(dict.fromkeys(place[0] for row in rows for place in row if place))
  places = tuple(tuple(place and (sources.index(place[0]), place[1]) for place in row) for row in rows)
  return Move(tuple(sources), tuple(targets), places)


def row_sharding(like: jax.ShapeDtypeStruct, stacked: bool, rows: int) -> Any:
  """How an array is placed whose rows become those of `like`, a stack: as `like`, but for its leading dim.

  rows: of the array, which the mesh may not divide as it divides those of `like`; not `stacked`: it has no leading dim.
  """
  if not isinstance(like.sharding, NamedSharding):
    return like.sharding
  mesh, (first, *rest) = like.sharding.mesh, (*like.sharding.spec, *[None] * (len(like.shape) - len(like.sharding.spec)))
  leading = [first if first is not None and rows % mesh.shape[first] == 0 else None] if stacked else []
  return NamedSharding(mesh, PartitionSpec(*leading, *rest))


@functools.cache
def make_taker(places: tuple, shardings: tuple) -> Callable[[list[jax.Array]], list[jax.Array]]:
  """The sources of a `Move` -> its targets, jitted. Reads what one device holds of a row from that device alone."""

  def row(sources: list[jax.Array], place: tuple[int, int | None] | None) -> jax.Array | None:
    if place is None:
      return None
    source, at = place
    return sources[source] if at is None else sources[source][at]

  def target(rows: list[jax.Array | None]) -> jax.Array:
    like = next(r for r in rows if r is not None)
    return jnp.stack([jnp.zeros_like(like) if r is None else r for r in rows])

  def take(sources: list[jax.Array]) -> list[jax.Array]:
    return [target([row(sources, place) for place in rows]) for rows in places]

  return jax.jit(take, out_shardings=list(shardings))


def checksums(tree: Any, index: Index | None = None) -> dict[str, int]:
  """A checksum per canonical name, equal on every mesh and in every stacking. Blocks until the arrays are there."""
  return {name: checksum for name, (checksum, _) in facts(tree, index).items()}


def fingerprint(checksums: dict[str, int]) -> str:
  """Of the parameters among the arrays with these checksums: equal where all parameters are, to the bit."""
  params = sorted(item for item in checksums.items() if item[0].startswith('params/'))
  return hashlib.sha256(repr(params).encode()).hexdigest()


def facts(tree: Any, index: Index | None = None) -> dict[str, tuple[int, bool]]:
  """(checksum, whether every number is finite) per canonical name.

  A checksum is the sum of the bits as unsigned words, modulo 2^32: any single bit changes it.
  """
  index = index or {}
  siblings: dict[str, dict[str, jax.Array]] = {}
  for path, leaf in named(tree).items():
    siblings.setdefault(path.rpartition('/')[0], {})[path] = leaf
  found = {}
  for parent, leaves in siblings.items():
    # One program at a time: programs with collectives that do not depend on each other deadlock on emulated devices.
    named_leaves = {path.rpartition('/')[2]: leaf for path, leaf in leaves.items()}
    values = jax.device_get(_facts(named_leaves, parent in index, _whole(next(iter(leaves.values())))))
    for path in leaves:
      bits, finite = values[path.rpartition('/')[2]]
      rows = zip(canonical_names(path, index), bits.reshape(-1), finite.reshape(-1), strict=True)
      found |= {name: (int(b), bool(f)) for name, b, f in rows if name}
  return found


def host_facts(array: np.ndarray) -> tuple[int, bool]:
  """`facts` of one array in the host's memory; nothing of its size is made beside it."""
  flat = np.ascontiguousarray(array).reshape(-1)
  words = flat.view({1: np.uint8, 2: np.uint16}.get(flat.itemsize, np.uint32))
  total = int(np.sum(words, dtype=np.uint64))  # of 2^32 words at most 2^64
  finite = all(bool(np.isfinite(flat[i : i + PIECE]).all()) for i in range(0, flat.size, PIECE))
  return total % 2**32, finite


def _whole(leaf: Any) -> NamedSharding | None:
  """On every device of the leaf's mesh: each of several processes can read that, though rows may be cut over `pipe`."""
  sharding = getattr(leaf, 'sharding', None)
  return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None


@functools.partial(jax.jit, static_argnums=(1, 2))
def _facts(
  leaves: dict[str, jax.Array], stacked: bool, at: NamedSharding | None = None
) -> dict[str, tuple[jax.Array, jax.Array]]:
  """(sum of the bits, all finite) of each array, or of each of its rows, placed `at`."""

  def one(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    dims = tuple(range(stacked, x.ndim))
    finite = jnp.all(jnp.isfinite(x), dims)
    if x.dtype == bool:
      x = x.astype(jnp.uint8)
    words = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, words)  # an 8-byte number becomes two words, in a last dim
    return jnp.sum(bits, tuple(range(stacked, bits.ndim)), dtype=jnp.uint32), finite

  found = {name: one(x) for name, x in leaves.items()}
  return found if at is None else jax.lax.with_sharding_constraint(found, at)
