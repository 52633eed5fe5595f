"""Tries one kernel on the first device and prints a verdict as JSON.

  python -m lmscale.kernels.proof ssd pallas_triton bfloat16
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from lmscale.kernels.proof.cases import AS_IN_TRAINING, OPS, SMALL, Case, cases, differentiate
from lmscale.kernels.proof.verdicts import Verdict

# Relative root mean square error of a head: of 16 bits what rounding of inputs, outputs and states between chunks makes, doubled.
BOUNDS = {'bfloat16': 2e-2, 'float16': 2e-2, 'float32': 1e-3}
LONG_SUMS = ('ddt', 'dA')  # gradients that cancel
TURNS = 5


def prove(op: str, name: str, dtype: str, sizes: dict[str, int] = SMALL, interpret: bool = False) -> Verdict:
  """Compares an implementation with `xla` in float32 on every case of an operation."""
  worst = 0.0
  for case in cases(op, sizes, interpret):
    for what, head, error, bound in _errors(case, name, dtype):
      worst = max(worst, error / bound)
      if not error <= bound:  # NaN neither
        return Verdict(f'{case.label}: {_words(what)} of head {head} is off by {error:.2g} of its size, {bound:g} are allowed', worst)
  return Verdict('', worst)


def _errors(case: Case, name: str, dtype: str) -> Iterator[tuple[str, int, float, float]]:
  """(what, head, relative error, its bound) of all that a case computes."""
  arguments = {key: jnp.asarray(value, jnp.float32 if key in case.exact else dtype) for key, value in case.arguments.items()}
  exact = {key: value.astype(jnp.float32) for key, value in arguments.items()}
  compute = differentiate if case.differentiates else lambda case, a, name: jax.jit(lambda a: case.run(a, name))(a)
  got = compute(case, arguments, name)
  with jax.default_matmul_precision('highest'):
    want = compute(case, exact, 'xla')
  for what in want:
    axis = case.heads[what] if what in case.heads else case.heads[what.removeprefix('d')]
    a, b = (np.moveaxis(np.asarray(m[what], np.float64), axis, 0) for m in (got, want))
    for head in range(a.shape[0]):
      size = np.sqrt(np.mean(np.square(b[head])))
      yield what, head, float(np.sqrt(np.mean(np.square(a[head] - b[head]))) / max(size, 1e-30)), BOUNDS[dtype] * (1 + (what in LONG_SUMS))


def _words(what: str) -> str:
  return what if what in ('y', 'state') else f'the gradient of {what.removeprefix("d")}'


def seconds(op: str, name: str, dtype: str) -> float:
  """The median of a forward and backward pass of whole rows at a size as in training."""
  case = next(cases(op, AS_IN_TRAINING))
  arguments = {key: jnp.asarray(value, jnp.float32 if key in case.exact else dtype) for key, value in case.arguments.items()}
  run = jax.jit(lambda a: differentiate(case, a, name))
  jax.block_until_ready(run(arguments))
  found = []
  for _ in range(TURNS):
    start = time.perf_counter()
    jax.block_until_ready(run(arguments))
    found.append(time.perf_counter() - start)
  return statistics.median(found)


def main(argv: list[str] | None = None) -> None:
  """Prints the verdict, also on a kernel that raises, as the last line."""
  parser = argparse.ArgumentParser('python -m lmscale.kernels.proof', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('op', choices=OPS)
  parser.add_argument('implementation')
  parser.add_argument('dtype', choices=BOUNDS)
  flags = parser.parse_args(argv)
  key = flags.op, flags.implementation, flags.dtype
  try:
    verdict = prove(*key)
    if not verdict.why_not and flags.op == 'ssd':  # which has two kernels to choose from
      verdict = dataclasses.replace(verdict, seconds=seconds(*key))
  except Exception as error:  # noqa: BLE001 - whatever a kernel's compiler raises
    verdict = Verdict(f'it failed: {type(error).__name__}: {(str(error).splitlines() or [""])[0][:300]}')
  print(json.dumps(dataclasses.asdict(verdict)))


if __name__ == '__main__':
  main()
