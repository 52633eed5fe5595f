"""The most bytes that a traced function holds at one time, besides its arguments.

An estimate from the order of its operations: a compiler may reorder them, and it fuses. Elementwise operations that are
read once are taken to be fused into their reader; what a loop's body or an inner function holds counts while it runs.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

# Besides these, operations are taken to write their result to memory.
FUSED = {
  'abs', 'add', 'add_any', 'and', 'broadcast_in_dim', 'convert_element_type', 'cos', 'div', 'eq', 'erf', 'exp',
  'expand_dims', 'floor', 'ge', 'gt', 'integer_pow', 'iota', 'is_finite', 'le', 'log', 'log1p', 'logistic', 'lt',
  'max', 'min', 'mul', 'ne', 'neg', 'not', 'or', 'pad', 'pow', 'reshape', 'rsqrt', 'select_n', 'sign', 'sin',
  'slice', 'sqrt', 'square', 'squeeze', 'stop_gradient', 'sub', 'tanh', 'transpose', 'xor',
}  # fmt: skip


def working_bytes(function: Callable, *arguments: Any) -> int:
  """Peak bytes of `function` traced on `arguments` (shapes suffice), its results included, its arguments not."""
  return _peak(jax.make_jaxpr(function)(*arguments).jaxpr)


def _peak(jaxpr: Any) -> int:
  reads: dict[Any, int] = {}
  last: dict[Any, int] = {}
  for i, equation in enumerate(jaxpr.eqns):
    for variable in equation.invars:
      if not isinstance(variable, core.Literal):
        reads[variable] = reads.get(variable, 0) + 1
        last[variable] = i
  for variable in jaxpr.outvars:
    if not isinstance(variable, core.Literal):
      last[variable] = len(jaxpr.eqns)
  live = peak = 0
  held: dict[Any, int] = {}
  for i, equation in enumerate(jaxpr.eqns):
    # The results of an inner function are those of the equation.
    inside = max((_peak(inner) for inner in core.jaxprs_in_params(equation.params)), default=0)
    inside = max(inside - sum(_bytes(variable.aval) for variable in equation.outvars), 0)
    for variable in equation.outvars:
      fused = equation.primitive.name in FUSED and reads.get(variable, 0) <= 1
      if variable in last and not fused:
        held[variable] = _bytes(variable.aval)
        live += held[variable]
    peak = max(peak, live + inside)
    for variable in {v for v in [*equation.invars, *equation.outvars] if not isinstance(v, core.Literal)}:
      if last.get(variable) == i:
        live -= held.pop(variable, 0)
  return peak


def _bytes(aval: Any) -> int:
  return math.prod(getattr(aval, 'shape', ())) * getattr(getattr(aval, 'dtype', None), 'itemsize', 0)
