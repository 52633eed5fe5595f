"""A pipeline gives the loss and the gradients of one device, and runs what its table says."""

import functools
import itertools

import jax
import numpy as np
import pytest
import tiny

from lmscale.config import MeshConfig
from lmscale.models import model
from lmscale.models.stacking import to_layers
from lmscale.parallel.gradients import make_gradients
from lmscale.train.program import Program
from lmscale.train.schedule import StepInputs

# Every stage of the hybrid has other layers, on two devices, on four, and with two stages a device.
PATTERNS = {'transformer': '*-*-*-*-', 'mamba': 'mmmm', 'mamba2': 'M-M-M-M-', 'hybrid': 'M-*MmM--'}
MESHES = {'pipe': (4, 1, 1), 'pipe data': (2, 4, 1), 'pipe tensor': (4, 1, 2), 'all': (2, 2, 2)}
FACTORS = {
  'schedule': ('gpipe', '1f1b', '1f1b_strict', 'interleaved'),
  'pattern': tuple(PATTERNS),
  'mesh': tuple(MESHES),
  'zero': (0, 1, 2, 3),
  'sequence_parallel': (False, True),
  'packed': (True, False),
  'tied': (False, True),
  'remat': ('full', 'selective', 'none', 'full and stored'),
  'vocab_on_pipe': (False, True),
}


def is_possible(case):
  """Sequence parallelism needs a `tensor` axis."""
  return not case['sequence_parallel'] or 'tensor' in case['mesh'] or case['mesh'] == 'all'


def pairwise_cover(factors):
  """Few cases in which any two values of two factors meet, where they may: each takes as many new pairs as it can."""

  def pairs(case):
    return {(a, case[a], b, case[b]) for a, b in itertools.combinations(factors, 2)}

  names = list(factors)
  missing = {(a, x, b, y) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]}
  missing -= {p for p in missing if 'sequence_parallel' in p and True in p and p[1 if p[2] == 'sequence_parallel' else 3] in ('pipe', 'pipe data')}
  cases = []
  while missing:
    a, x, b, y = min(missing, key=str)
    case = {a: x, b: y}
    for name in names:
      if name not in case:
        tried = [case | {name: value} for value in factors[name]]
        case = max(tried, key=lambda c: sum(p in missing for p in itertools.combinations(sorted(c.items()), 2)) if False else _covered(c, missing))
    if not is_possible(case):
      case['mesh'] = 'all' if 'mesh' not in (a, b) else case['mesh']
      if not is_possible(case):
        case['sequence_parallel'] = False
    missing -= pairs(case)
    cases.append(case)
  return cases


def _covered(case, missing):
  return sum(a in case and b in case and case[a] == x and case[b] == y for a, x, b, y in missing)
