"""The cases that a kernel has to do: small, of several chunks, whole rows and packed ones with padding.

A case is (function of named arguments and an implementation, arguments); what it returns and, where `differentiates`, the gradients
of a weighted sum of that are compared, head by head.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmscale.kernels.attention import attention
from lmscale.kernels.selective_scan import selective_scan
from lmscale.kernels.ssd import ssd
from lmscale.kernels.ssd_update import ssd_update

SMALL = {'b': 2, 'l': 192, 'h': 4, 'g': 2, 'p': 64, 'n': 128}
AS_IN_TRAINING = {'b': 1, 'l': 4096, 'h': 32, 'g': 8, 'p': 64, 'n': 128}


class Case(NamedTuple):
  """run(arguments, implementation) -> {name: array}; heads: the axis of each argument and result along which errors are judged."""

  label: str
  run: Callable[[dict[str, jax.Array], str], dict[str, jax.Array]]
  arguments: dict[str, np.ndarray]
  heads: dict[str, int]
  differentiates: bool = True
  exact: frozenset[str] = frozenset()  # arguments in float32 whatever the dtype


def cases(op: str, sizes: dict[str, int] = SMALL, interpret: bool = False) -> Iterator[Case]:
  """All of an operation."""
  rng = np.random.default_rng(0)
  yield from OPS[op](rng, sizes, {'interpret': interpret} if interpret else {})


def _ssd(rng: np.random.Generator, sizes: dict[str, int], options: dict) -> Iterator[Case]:
  b, l, h, g, p, n = (sizes[name] for name in 'blhgpn')
  arguments = {'x': _normal(rng, b, l, h, p), 'B': _normal(rng, b, l, g, n), 'C': _normal(rng, b, l, g, n), 'D': _normal(rng, h),
               'dt': _steps(rng, b, l, h), 'A': _decays(rng, h), 'initial_state': _normal(rng, b, h, p, n)}  # fmt: skip
  heads = {'x': 2, 'B': 2, 'C': 2, 'D': 0, 'dt': 2, 'A': 0, 'initial_state': 1, 'y': 2, 'state': 1}
  exact = frozenset(('D', 'dt', 'A', 'initial_state'))
  for label, ids in _documents(b, l):
    yield Case(label, _named(functools.partial(_call, ssd, ids, options), ('y', 'state')), arguments, heads, exact=exact)


def _selective_scan(rng: np.random.Generator, sizes: dict[str, int], options: dict) -> Iterator[Case]:
  b, l, d, n = sizes['b'], sizes['l'], sizes['h'] * sizes['p'], min(sizes['n'], 16)
  arguments = {'x': _normal(rng, b, l, d), 'z': _normal(rng, b, l, d), 'B': _normal(rng, b, l, n), 'C': _normal(rng, b, l, n),
               'D': _normal(rng, d), 'dt': _steps(rng, b, l, d), 'A': _decays(rng, d, n), 'initial_state': _normal(rng, b, d, n)}  # fmt: skip
  heads = {'x': 2, 'z': 2, 'B': 2, 'C': 2, 'D': 0, 'dt': 2, 'A': 0, 'initial_state': 1, 'y': 2, 'state': 1}
  exact = frozenset(('B', 'C', 'D', 'dt', 'A', 'initial_state'))
  for label, ids in _documents(b, l):
    yield Case(label, _named(functools.partial(_call, selective_scan, ids, options), ('y', 'state')), arguments, heads, exact=exact)


def _ssd_update(rng: np.random.Generator, sizes: dict[str, int], options: dict) -> Iterator[Case]:
  b, h, g, p, n = (sizes[name] for name in 'bhgpn')
  arguments = {'state': _normal(rng, b + 1, h, p, n), 'x': _normal(rng, b, h, p), 'dt': _steps(rng, b, h), 'A': _decays(rng, h),
               'B': _normal(rng, b, g, n), 'C': _normal(rng, b, g, n), 'D': _normal(rng, h)}  # fmt: skip
  slots = np.arange(b, 0, -1, dtype=np.int32)  # row 0 of the pool is nobody's

  def run(arguments: dict[str, jax.Array], implementation: str) -> tuple[jax.Array, jax.Array]:
    return ssd_update(**arguments, slots=slots, implementation=implementation, **_only_triton(options, implementation))

  exact = frozenset(('D', 'dt', 'A', 'state'))
  yield Case('slots', _named(run, ('y', 'state')), arguments, {'y': 1, 'state': 1}, differentiates=False, exact=exact)


def _attention(rng: np.random.Generator, sizes: dict[str, int], options: dict) -> Iterator[Case]:
  b, l, h, g, p = (sizes[name] for name in 'blhgp')
  arguments = {'q': _normal(rng, b, l, h, p), 'k': _normal(rng, b, l, g, p), 'v': _normal(rng, b, l, g, p)}
  for label, ids in _documents(b, l):

    def run(arguments: dict[str, jax.Array], implementation: str, ids: np.ndarray | None = ids) -> tuple[jax.Array]:
      return (attention(**arguments, q_segments=ids, k_segments=ids, implementation=implementation),)

    yield Case(label, _named(run, ('y',)), arguments, dict.fromkeys(('q', 'k', 'v', 'y'), 2))


OPS = {'ssd': _ssd, 'selective_scan': _selective_scan, 'ssd_update': _ssd_update, 'attention': _attention}


def _call(op: Callable, ids: np.ndarray | None, options: dict, arguments: dict[str, jax.Array], implementation: str) -> Any:
  return op(**arguments, segment_ids=ids, implementation=implementation, **_only_triton(options, implementation))


def _only_triton(options: dict, implementation: str) -> dict:
  return options if implementation == 'pallas_triton' else {}


def _named(run: Callable, names: tuple[str, ...]) -> Callable:
  return lambda arguments, implementation: dict(zip(names, run(arguments, implementation), strict=True))


def _documents(b: int, l: int) -> Iterator[tuple[str, np.ndarray | None]]:
  """Whole rows; then rows of three documents that end anywhere, with padding within and behind."""
  yield 'whole rows', None
  ids = np.zeros((b, l), np.int32)
  for row in range(b):
    ends = [l // 5 + 3 * row, l // 2 + 1 + row, l - 7]
    ids[row, : ends[0]], ids[row, ends[0] : ends[1]], ids[row, ends[1] + 2 : ends[2]] = 1, 2, 3
  yield 'packed rows', ids


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
  return rng.normal(size=shape)


def _steps(rng: np.random.Generator, *shape: int) -> np.ndarray:
  return np.exp(rng.uniform(np.log(0.005), np.log(0.5), shape))


def _decays(rng: np.random.Generator, *shape: int) -> np.ndarray:
  return -np.exp(rng.uniform(0, np.log(8), shape))


def differentiate(case: Case, arguments: dict[str, jax.Array], implementation: str) -> dict[str, jax.Array]:
  """{result: value} and {'d' + argument: gradient of a weighted sum of the results}."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(lambda a: case.run(a, 'xla'), arguments)
  weights = {name: jnp.asarray(rng.normal(size=shape.shape), jnp.float32) for name, shape in shapes.items()}

  def loss(arguments: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    results = case.run(arguments, implementation)
    return sum(jnp.sum(weights[name] * value.astype(jnp.float32)) for name, value in results.items()), results

  grads, results = jax.jit(jax.grad(loss, has_aux=True))(arguments)
  return results | {f'd{name}': grad for name, grad in grads.items()}
