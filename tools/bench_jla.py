"""jax-linear-attention's SSD beside ours: its chunked op on a CPU, on a GPU its kernels too. Python 3.12, in an environment of its own.

It is Mamba-2's SSD in the terms of gated linear attention: q = C, k = B for each head, v = dt x, g = dt A. (Its kernels know groups; what is
public takes q and k per head, so repeating B and C and multiplying x by dt is part of its time.)
"""

import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from bench_ops import OPS, Inputs, Shape, make_functions, make_inputs
from bench_peers import CHECKED_LENGTH, GRADIENTS, WORST_ERROR, Refused, relative
from bench_timing import Candidate, jax_candidate

CHUNKS = (32, 64, 128)


def jla_peers() -> dict[str, Callable]:
  """name -> y(x, dt, A, B, C). Raises Refused where the package cannot be imported."""
  try:
    simple_gla = importlib.import_module('jla.ops.chunked').simple_gla
    ops = importlib.import_module('jla.ops')
  except ImportError as error:
    raise Refused(f'not importable: {error}') from error
  found = {f'jla chunked, chunk {chunk}': _ssd(functools.partial(simple_gla, chunk_size=chunk, precision=None)) for chunk in CHUNKS}
  if jax.default_backend() == 'gpu':
    found['jla mosaic_gpu'] = _ssd(lambda q, k, v, g, **options: ops.linear_attention('simple_gla', q, k, v, g=g, impl='mosaic_gpu', **options))
  return found


def _ssd(linear_attention: Callable) -> Callable:
  def run(x: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array) -> jax.Array:
    k, q = (jnp.repeat(m, x.shape[2] // m.shape[2], axis=2) for m in (B, C))
    return linear_attention(q, k, (dt[..., None] * x).astype(x.dtype), dt * A, scale=1.0)[0].astype(x.dtype)

  return run


def jla_candidates(function: Callable, shape: Shape, dtype: str, arguments: tuple[Inputs, jax.Array]) -> dict[str, Candidate]:
  """{'forward', 'forward+backward'} on `arguments` (inputs, dy), after a check. Raises Refused where it is wrong or fails."""

  def forward(inputs: Inputs) -> jax.Array:
    return function(*(inputs[name] for name in GRADIENTS))

  def both(inputs: Inputs, dy: jax.Array) -> tuple:
    y, pull = jax.vjp(forward, inputs)
    return y, pull(dy)[0]

  try:
    error = worst_error(both, shape._replace(batch=1, length=min(CHECKED_LENGTH, shape.length)), dtype)
    timed = {'forward': jax_candidate(forward, arguments[0]), 'forward+backward': jax_candidate(both, *arguments)}
  except Exception as failure:  # a peer may raise anything
    raise Refused(f'failed: {str(failure).splitlines()[0] if str(failure) else type(failure).__name__}') from failure
  if not error <= WORST_ERROR:
    raise Refused(f'wrong: relative error {error:.2g} in an output or gradient, so it is not timed')
  return timed


def worst_error(both: Callable, shape: Shape, dtype: str) -> float:
  """The largest relative RMSE over y and the gradients against our float32 run on the same, rounded, inputs."""
  rounded = make_inputs(OPS['ssd'], shape, dtype)
  exact = {name: a.astype(jnp.float32) for name, a in rounded.items()}
  with jax.default_matmul_precision('highest'):
    y, gradients = jax.jit(make_functions(OPS['ssd'], shape, 'xla', True)['forward+backward'])(exact, jnp.ones_like(exact['x']))
  got_y, got = jax.jit(both)(rounded, jnp.ones_like(rounded['x']))
  pairs = [(got_y, y[0] if isinstance(y, tuple) else y), *((got[name], gradients[name]) for name in GRADIENTS)]
  return max(relative(np.asarray(a, np.float32), np.asarray(b)) for a, b in pairs)
