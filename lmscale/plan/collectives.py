"""Reads the collectives out of a compiled program's text: which, over which mesh axis, how large, and how often."""

import dataclasses
import math
import re
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
_OP = re.compile(rf'= (?P<type>.*?) (?P<kind>{"|".join(KINDS)})(?P<start>-start)?\(')
_COMPUTATION = re.compile(r'^(?:ENTRY )?%?(?P<name>[\w.\-]+) .*\{$')
_CALLED = re.compile(r'(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'(?:branch_computations|called_computations|calls)=\{([^}]*)\}')
_IOTA = re.compile(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")
_MESH_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_LISTED = re.compile(r'(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective instruction.

  axes: the mesh axes over which it talks; ranks: devices in a group; elements, bytes: of its result, on one device; times: how often
  it runs in the program; in_loop: whether that is in a loop; sometimes: it may run less often, because it is in a branch.
  """

  kind: str
  axes: tuple[str, ...]
  ranks: int
  elements: int
  bytes: int
  times: int
  in_loop: bool
  sometimes: bool
  line: str

  @property
  def received(self) -> float:
    """Bytes that a device receives, all times together, where the group is a ring: the least that there is."""
    whole = self.bytes * self.ranks if self.kind == 'reduce-scatter' else self.bytes
    return self.times * ring_bytes(self.kind, whole, self.ranks)


def ring_bytes(kind: str, size: float, ranks: int) -> float:
  """Bytes that each of `ranks` devices receives in a ring, of an array of `size` bytes before it is scattered or once it is gathered.

  An all-reduce is a reduce-scatter and an all-gather.
  """
  return size if kind == 'collective-permute' else size * (ranks - 1) / ranks * (2 if kind == 'all-reduce' else 1)


def read_collectives(text: str, mesh: Mesh, unknown: int = 1) -> list[Collective]:
  """The collectives of `compiled.as_text()`.

  mesh: names the device groups; its devices must be in id order. unknown: how often a loop runs whose end is not in the text; one
  within such a one runs once or not at all.
  """
  computations = split_computations(text)
  runs = count_runs(computations, unknown)
  found = []
  for name, lines in computations.items():
    for line in lines:
      match = _OP.search(line)
      if match:
        groups = _groups(line)
        sizes = _results(match['kind'] if match['start'] else '', match['type'])
        elements, size = sum(n for n, _ in sizes), sum(n * width for n, width in sizes)
        what = match['kind'], _axes(line, groups, mesh), len(groups[0]) if groups else 0
        how = runs[name]
        found.append(Collective(*what, elements, size, how.times, how.in_loop, how.sometimes, line.strip()))
  return [c for c in found if c.axes]


def split_computations(text: str) -> dict[str, list[str]]:
  """{name: lines} of the computations of a compiled program's text."""
  computations: dict[str, list[str]] = {}
  current: list[str] = []
  for line in text.splitlines():
    match = _COMPUTATION.match(line)
    if match:
      current = computations.setdefault(match['name'], [])
    else:
      current.append(line)
  return computations


class Runs(NamedTuple):
  """How a computation runs: how often, in a loop or not, and whether in some turns only, which may be none: in a branch, or in a loop
  without a known end within another such loop."""

  times: float = 1
  in_loop: bool = False
  endless: bool = False
  sometimes: bool = False


def count_runs(computations: dict[str, list[str]], unknown: float) -> dict[str, Runs]:
  """Of each computation that is run. What is called from several places runs as often as all of them say."""
  calls = {name: [call for line in lines for call in _calls(line, computations)] for name, lines in computations.items()}
  called = {name for each in calls.values() for name, _, _ in each}
  found: dict[str, Runs] = {}

  def walk(name: str, runs: Runs) -> None:
    found[name] = runs._replace(times=runs.times + found[name].times) if name in found else runs
    for other, how, trips in calls[name]:
      if how == 'loop' and trips is None:
        more = 1 if runs.endless else unknown
        walk(other, Runs(runs.times * more, True, True, runs.sometimes or runs.endless))
      elif how == 'loop':
        walk(other, runs._replace(times=runs.times * trips, in_loop=True))
      else:
        walk(other, runs._replace(sometimes=runs.sometimes or how == 'branch'))

  for name in calls:
    if name not in called:
      walk(name, Runs())
  return found


def _calls(line: str, computations: dict[str, list[str]]) -> list[tuple[str, str, int | None]]:
  """(computation, call | loop | branch, turns of a loop where they are known) that an instruction runs."""
  names = _CALLED.findall(line)
  for group in _BRANCHES.findall(line):
    names += [part.strip().lstrip('%') for part in group.split(',')]
  how = 'loop' if ' while(' in line else 'branch' if ' conditional(' in line else 'call'
  trips = _trips(line, computations) if how == 'loop' else None
  return [(name, how, trips) for name in names if name in computations]


def _trips(line: str, computations: dict[str, list[str]]) -> int | None:
  """How often a loop runs: as the compiler says, or the constant that its condition compares with."""
  if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line):
    return int(known[1])
  condition = computations.get(re.search(r'condition=%?([\w.\-]+)', line)[1], [])
  constants = [int(n) for part in condition for n in re.findall(r's32\[\][^=]* constant\((\d+)\)', part)]
  return max(constants, default=None)


def _results(started: str, result: str) -> list[tuple[int, int]]:
  """(elements, bytes of each) of the arrays of an instruction's type. Those `started` to run beside others, all-reduce
  excepted, return their operands and then their results."""
  result = re.sub(r'\{[^}]*\}|/\*.*?\*/', '', result)
  if started and started != 'all-reduce':
    result = _parts(result)[1]
  shapes = re.findall(r'([a-z]+)(\d*)\w*\[([\d,]*)\]', result)
  return [(math.prod(int(n) for n in shape.split(',') if n), max(1, int(bits or 8) // 8)) for _, bits, shape in shapes]


def _parts(text: str) -> list[str]:
  """The elements of a tuple type."""
  parts, depth = [''], 0
  for letter in text.strip()[1:-1]:
    depth += (letter in '([') - (letter in ')]')
    if letter == ',' and not depth:
      parts.append('')
    else:
      parts[-1] += letter
  return parts


def _mesh_groups(dims: str, device_ids: str | None, used: str) -> list[list[int]]:
  """Groups written over a mesh: mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a', 'b':(1)2}."""
  sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", dims)}
  ids = np.arange(math.prod(sizes.values()))
  if device_ids:
    reshaped = re.fullmatch(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', device_ids)
    if not reshaped:
      raise ValueError(f'device ids {device_ids!r} are not understood')
    ids = ids.reshape([int(n) for n in reshaped[1].split(',')])
    ids = ids.transpose([int(n) for n in reshaped[2].split(',')]) if reshaped[2] else ids
  names = list(sizes)
  # Each axis as (before, part, after): a sub-axis 'a':(before)part splits it, a whole axis is its own part.
  split = {name: (1, 1, size) for name, size in sizes.items()}
  for name, before, part in _MESH_AXIS.findall(used):
    before, part = int(before or 1), int(part or sizes[name])
    split[name] = (before, part, sizes[name] // (before * part))
  ids = ids.reshape([n for name in names for n in split[name]])
  inside = [3 * i + 1 for i in range(len(names))]
  outside = [i for i in range(ids.ndim) if i not in inside]
  return ids.transpose(outside + inside).reshape(-1, math.prod(ids.shape[i] for i in inside)).tolist()


def _groups(line: str) -> list[list[int]]:
  over_mesh = _MESH.search(line)
  if over_mesh:
    return _mesh_groups(*over_mesh.groups())
  iota = _IOTA.search(line)
  if iota:
    shape, dims = (tuple(int(n) for n in iota[i].split(',')) for i in (1, 2))
    order = [int(n) for n in iota[3].split(',')] if iota[3] else range(len(dims))
    return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape).tolist()
  listed = _LISTED.search(line)
  return [[int(n) for n in group.split(',') if n] for group in re.findall(r'\{([\d,]*)\}', listed[1])] if listed else []


def _axes(line: str, groups: list[list[int]], mesh: Mesh) -> tuple[str, ...]:
  """The mesh axes along which the members of some group differ."""
  if not groups:
    raise ValueError(f'no device groups understood in {line.strip()[:200]!r}')
  coordinates = {i: np.unravel_index(i, mesh.devices.shape) for i in range(mesh.size)}
  varying = set()
  for group in groups:
    members = [coordinates[i] for i in group]
    varying |= {axis for n, axis in enumerate(mesh.axis_names) if len({m[n] for m in members}) > 1}
  return tuple(axis for axis in mesh.axis_names if axis in varying)
