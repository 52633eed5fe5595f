"""A derivative in two halves: what its backward pass needs of the forward one is handed over as plain arrays.

`jax.vjp` returns a function that is a pytree of arrays. Of these only what depends on the input is kept; weights, their
casts and whatever else follows from parameters alone is made again from the parameters in the second half, by a forward
pass over zeros of which the compiler removes the rest. So nothing of a weight's size ever waits.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

Function = Callable[[Any, jax.Array], jax.Array]  # (params, x) -> y
# One jaxpr inside that runs once, on the operands of the equation. A loop's would not do: what depends goes round.
CALLS = ('jit', 'pjit', 'closed_call', 'checkpoint', 'remat', 'remat2', 'custom_jvp_call', 'custom_vjp_call', 'shard_map')


def kept(function: Function, params: Any, x: jax.Array) -> tuple[list[bool], list[jax.ShapeDtypeStruct]]:
  """(which leaves of the function's vjp depend on x, their shapes); arguments may be shapes."""
  traced = jax.make_jaxpr(lambda params, x: _vjp(function, params, x)[1])(params, x)
  jaxpr = getattr(traced, 'jaxpr', traced)
  keep = dependent(jaxpr, [False] * (len(jaxpr.invars) - 1) + [True])
  leaves = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in jaxpr.outvars]
  return keep, [leaf for leaf, depends in zip(leaves, keep, strict=True) if depends]


def forward(function: Function, params: Any, x: jax.Array, keep: list[bool]) -> tuple[jax.Array, list[jax.Array]]:
  """(y, what the backward pass needs of x). keep: as `kept` says."""
  y, leaves, _ = _vjp(function, params, x)
  return y, [leaf for leaf, depends in zip(leaves, keep, strict=True) if depends]


def backward(
  function: Function, params: Any, x: jax.Array, keep: list[bool], saved: list[jax.Array], ct: jax.Array
) -> tuple[Any, jax.Array]:
  """(gradients of params, gradient of x) from what `forward` saved. x: zeros of its shape; ct: gradient of y."""
  _, leaves, tree = _vjp(function, params, x)
  waiting = iter(saved)
  leaves = [next(waiting) if depends else leaf for leaf, depends in zip(leaves, keep, strict=True)]
  return jax.tree.unflatten(tree, leaves)(ct)


def _vjp(function: Function, params: Any, x: jax.Array) -> tuple[jax.Array, list[jax.Array], Any]:
  y, vjp = jax.vjp(function, params, x)
  return y, *jax.tree.flatten(vjp)


def dependent(jaxpr: Any, inputs: list[bool]) -> list[bool]:
  """Which outputs of a jaxpr depend on inputs that are True; a loop's or a branch's on any do all."""
  found = {variable for variable, depends in zip(jaxpr.invars, inputs, strict=True) if depends}

  def depends(variable: Any) -> bool:
    return not isinstance(variable, core.Literal) and variable in found

  for equation in jaxpr.eqns:
    inside = [depends(variable) for variable in equation.invars]
    if not any(inside):
      continue
    inner = core.jaxprs_in_params(equation.params) if equation.primitive.name in CALLS else []
    inner = [getattr(j, 'jaxpr', j) for j in inner]
    through = len(inner) == 1 and len(inner[0].invars) == len(inside) and len(inner[0].outvars) == len(equation.outvars)
    outputs = dependent(inner[0], inside) if through else [True] * len(equation.outvars)
    found |= {variable for variable, out in zip(equation.outvars, outputs, strict=True) if out}
  return [depends(variable) for variable in jaxpr.outvars]


def zeros_like(shapes: Any) -> Any:
  """Zeros of abstract arrays."""
  return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
