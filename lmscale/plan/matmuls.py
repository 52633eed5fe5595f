"""Counts the matrix products that a compiled program executes: those of a loop as often as it runs."""

import math
import re

from lmscale.plan.collectives import count_runs, split_computations

_SHAPE = re.compile(r'^(?:ROOT )?%?(?P<name>[\w.\-]+) = \(?\w+\[(?P<dims>[\d,]*)\]')
_DOT = re.compile(r' dot\((?:\S+\[[\d,]*\]\S* )?%?(?P<left>[\w.\-]+),.*?lhs_contracting_dims=\{(?P<contracted>[\d,]*)\}')


def matmul_flops(text: str, unknown: float = 1) -> float:
  """FLOPs of all products in `compiled.as_text()` on one device, a multiply-add being 2.

  unknown: how often a loop runs whose end is not in the text, on average.
  """
  computations = split_computations(text)
  runs = count_runs(computations, unknown)
  return sum(runs[name].times * _flops(lines) for name, lines in computations.items())


def _flops(lines: list[str]) -> int:
  shapes, total = {}, 0
  for line in map(str.strip, lines):
    if shape := _SHAPE.match(line):
      shapes[shape['name']] = _numbers(shape['dims'])
    if dot := _DOT.search(line):
      left = shapes[dot['left']]
      total += 2 * math.prod(shapes[shape['name']]) * math.prod(left[dim] for dim in _numbers(dot['contracted']))
  return total


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(',') if n]
