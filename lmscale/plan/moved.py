"""Bytes that the kernels of a compiled program read and write, from its text.

Each kernel reads its operands and writes its results once, as if nothing stayed in a cache. Of an array of which a fusion takes a
slice, or rows, only those count; what is updated in place counts only where it is written.
"""

import math
import re
from typing import NamedTuple

from lmscale.plan.collectives import count_runs, split_computations

_INSTRUCTION = re.compile(r'^\s*(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[a-z][\w\-]*)\((?P<rest>.*)$')
_ARRAY = re.compile(r'\b([a-z]+)(\d*)[a-z0-9]*\[([\d,]*)\]')
_SUBCOMPUTATION = re.compile(r'(?:calls|to_apply)=%?([\w.\-]+)')
# What moves nothing, or is counted where it leads.
_FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call', 'after-all', 'partition-id',
         'replica-id', 'opt-barrier', 'all-gather-done', 'all-reduce-done', 'collective-permute-done', 'copy-done', 'async-done'}  # fmt: skip
_SAME = {'bitcast', 'copy', 'reshape', 'transpose', 'convert'}  # through which an operand of a fusion is followed
_PARTS = {'dynamic-slice', 'slice', 'gather'}
_IN_PLACE = {'dynamic-update-slice': 1, 'scatter': 2}  # the operand that is written into the first one


class _Line(NamedTuple):
  name: str
  type: str
  op: str
  operands: list[str]
  rest: str
  root: bool


def moved_bytes(text: str, unknown: int = 1) -> int:
  """Of `compiled.as_text()`, on one device. unknown: how often a loop runs whose end is not in the text."""
  return sum(times * size for _, times, size in kernels(text, unknown))


def kernels(text: str, unknown: int = 1) -> list[tuple[str, int, int]]:
  """(name, how often it runs, bytes that one run moves) of each kernel."""
  computations = split_computations(text)
  runs = count_runs(computations, unknown)
  parsed = {name: [line for line in map(_parse, lines) if line] for name, lines in computations.items()}
  inside = {called for lines in parsed.values() for line in lines if line.op not in ('call', 'while', 'conditional')
            for called in _SUBCOMPUTATION.findall(line.rest)}  # fmt: skip
  found = []
  for name, lines in parsed.items():
    types = {line.name: line.type for line in lines}
    for line in lines if name in runs and name not in inside else ():
      if line.op not in _FREE:
        found.append((line.name, runs[name].times, _moved(line, types, parsed)))
  return found


def _moved(line: _Line, types: dict[str, str], parsed: dict[str, list[_Line]]) -> int:
  sizes = [_bytes(types.get(name, '')) for name in line.operands]
  if line.op in _IN_PLACE:
    return 2 * sizes[_IN_PLACE[line.op]]
  if line.op in _PARTS:
    return 2 * _bytes(line.type)
  called = _SUBCOMPUTATION.search(line.rest) if line.op == 'fusion' else None
  if not called:
    return sum(sizes) + _bytes(line.type)
  body = parsed[called[1]]
  parameters = {int(re.match(r'\d+', inner.rest)[0]): inner.name for inner in body if inner.op == 'parameter'}
  return sum(min(size, _read(parameters[i], body)) for i, size in enumerate(sizes)) + _written(body)


def _read(parameter: str, body: list[_Line]) -> int:
  """Bytes that a fusion takes of one of its parameters."""
  total, names = 0, {parameter}
  types = {line.name: line.type for line in body}
  for line in body:
    used = names.intersection(line.operands)
    if used and line.op in _SAME and not line.root:
      names.add(line.name)
    elif used and line.op in _PARTS and line.operands[0] in names:
      total += _bytes(line.type)
    elif used and line.op in _IN_PLACE and line.operands[0] in names and used == {line.operands[0]}:
      continue
    elif used:
      return _bytes(types[parameter])
  return total


def _written(body: list[_Line]) -> int:
  lines = {line.name: line for line in body}
  root = next(line for line in body if line.root)
  return sum(_result(lines[name], lines) for name in (root.operands if root.op == 'tuple' else [root.name]))


def _result(line: _Line, lines: dict[str, _Line]) -> int:
  """Bytes written for a result of a fusion: of an update in place those of the update."""
  whole = line
  while line.op == 'bitcast':
    line = lines[line.operands[0]]
  if line.op in _IN_PLACE:
    return _bytes(lines[line.operands[_IN_PLACE[line.op]]].type)
  return _bytes(whole.type)


def _parse(line: str) -> _Line | None:
  match = _INSTRUCTION.match(line)
  if not match:
    return None
  arguments, depth = match['rest'], 1
  for i, letter in enumerate(arguments):
    depth += (letter == '(') - (letter == ')')
    if not depth:
      arguments = arguments[:i]
      break
  operands = re.findall(r'%([\w.\-]+)', arguments) if '%' in arguments else re.findall(r'([\w.\-]+)(?:,|$)', arguments)
  return _Line(match['name'], match['type'], match['op'], operands, match['rest'], bool(match['root']))


def _bytes(type_text: str) -> int:
  found = _ARRAY.findall(re.sub(r'\{[^}]*\}|/\*.*?\*/', '', type_text))
  return sum(math.prod(int(n) for n in shape.split(',') if n) * max(1, int(bits or 8) // 8) for _, bits, shape in found)
