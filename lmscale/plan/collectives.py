"""Reads the collectives out of a compiled program's text: which, over which mesh axis, how large, inside a loop or not."""

import dataclasses
import math
import re

import numpy as np
from jax.sharding import Mesh

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
_OP = re.compile(rf'= (?P<type>.*?) (?P<kind>{"|".join(KINDS)})(?:-start)?\(')
_COMPUTATION = re.compile(r'^(?:ENTRY )?%?(?P<name>[\w.\-]+) .*\{$')
_CALLED = re.compile(r'(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'(?:branch_computations|called_computations|calls)=\{([^}]*)\}')
_IOTA = re.compile(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")
_MESH_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_LISTED = re.compile(r'(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective instruction. axes: the mesh axes over which it talks; elements: of its result, on one device."""

  kind: str
  axes: tuple[str, ...]
  elements: int
  in_loop: bool
  line: str


def read_collectives(text: str, mesh: Mesh) -> list[Collective]:
  """The collectives of `compiled.as_text()`. `mesh` names the device groups; its devices must be in id order."""
  computations = _split(text)
  looped = _reachable(computations, {m for lines in computations.values() for m in _bodies(lines)})
  found = []
  for name, lines in computations.items():
    for line in lines:
      match = _OP.search(line)
      if match:
        axes = _axes(line, mesh)
        found.append(Collective(match['kind'], axes, _elements(match['type']), name in looped, line.strip()))
  return [c for c in found if c.axes]


def _split(text: str) -> dict[str, list[str]]:
  computations: dict[str, list[str]] = {}
  current: list[str] = []
  for line in text.splitlines():
    match = _COMPUTATION.match(line)
    if match:
      current = computations.setdefault(match['name'], [])
    else:
      current.append(line)
  return computations


def _bodies(lines: list[str]) -> list[str]:
  return [name for line in lines if ' while(' in line for name in re.findall(r'(?:body|condition)=%?([\w.\-]+)', line)]


def _reachable(computations: dict[str, list[str]], roots: set[str]) -> set[str]:
  seen: set[str] = set()
  todo = list(roots)
  while todo:
    name = todo.pop()
    if name in seen:
      continue
    seen.add(name)
    for line in computations.get(name, []):
      todo += _CALLED.findall(line)
      for group in _BRANCHES.findall(line):
        todo += [part.strip().lstrip('%') for part in group.split(',')]
  return seen


def _elements(result: str) -> int:
  shapes = re.findall(r'\w+\[([\d,]*)\]', result)
  return sum(math.prod(int(n) for n in shape.split(',') if n) for shape in shapes)


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


def _axes(line: str, mesh: Mesh) -> tuple[str, ...]:
  """The mesh axes along which the members of some group differ."""
  groups = _groups(line)
  if not groups:
    raise ValueError(f'no device groups understood in {line.strip()[:200]!r}')
  coordinates = {i: np.unravel_index(i, mesh.devices.shape) for i in range(mesh.size)}
  varying = set()
  for group in groups:
    members = [coordinates[i] for i in group]
    varying |= {axis for n, axis in enumerate(mesh.axis_names) if len({m[n] for m in members}) > 1}
  return tuple(axis for axis in mesh.axis_names if axis in varying)
