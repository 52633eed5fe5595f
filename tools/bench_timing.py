"""Timing and memory of several candidates for one piece of work, interleaved in one process."""

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_ops import Peaks

FLUSH_BYTES = 1 << 28  # several times any L2
BURST_SECONDS = 5e-3  # of calls between two synchronisations on an accelerator
MOST_CALLS = 50


@dataclasses.dataclass(frozen=True)
class Candidate:
  """call() starts the work and returns a handle; wait(handle) returns when it is done. memory: peak bytes, or None."""

  call: Callable[[], Any]
  wait: Callable[[Any], Any]
  memory: int | None


class TooLarge(ValueError):
  """What is asked does not fit the device."""


def jax_candidate(function: Callable, *arguments: Any) -> Candidate:
  """`function` compiled ahead of time. Raises ValueError where it is refused, TooLarge where memory does not do."""
  compiled = jax.jit(function).lower(*arguments).compile()
  sizes = compiled.memory_analysis()
  memory = sizes.temp_size_in_bytes + sizes.argument_size_in_bytes + sizes.output_size_in_bytes
  if memory > (limit := memory_limit()):
    raise TooLarge(f'needs {memory / 1e6:,.0f} MB of {limit / 1e6:,.0f} MB')
  return Candidate(lambda: compiled(*arguments), jax.block_until_ready, memory)


def memory_limit() -> float:
  """Bytes that a candidate may take: what the device says it has, or half of the host's memory."""
  stats = jax.devices()[0].memory_stats()
  return stats['bytes_limit'] if stats else 0.5 * os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def measure(candidates: dict[str, Candidate], repeats: int, flush: bool) -> dict[str, list[float]]:
  """Seconds per call, `repeats` samples of every candidate, taken in turns.

  A sample is the wall clock of a burst of calls up to one synchronisation, so that an accelerator's time counts and
  the host's launches hide behind it; gaps between the kernels of one call do count. With `flush` every call follows
  a write of FLUSH_BYTES, whose own time is measured in the same turn and taken off. Compilation and three calls to
  warm up come before.
  """
  writes = _flush_candidate() if flush else None
  calls = {}
  for name, candidate in candidates.items():
    for _ in range(3):
      seconds = _burst(candidate, None, 1)
    calls[name] = min(max(1, round(BURST_SECONDS / seconds)), MOST_CALLS) if flush else 1
  samples: dict[str, list[float]] = {name: [] for name in candidates}
  for _ in range(repeats):
    for name, candidate in candidates.items():
      count = calls[name]
      seconds = _burst(candidate, writes, count)
      samples[name].append((seconds - _burst(writes, None, count)) / count if writes else seconds)
  return samples


def _burst(candidate: Candidate, writes: Candidate | None, count: int) -> float:
  start = time.perf_counter()
  for _ in range(count):
    if writes:
      written = writes.call()
    handle = candidate.call()
  candidate.wait(handle)
  if writes:
    writes.wait(written)
  return time.perf_counter() - start


def _flush_candidate() -> Candidate:
  buffer = [jnp.zeros(FLUSH_BYTES // 4, jnp.int32)]
  step = jax.jit(lambda a: a + 1, donate_argnums=0)

  def call() -> jax.Array:
    buffer[0] = step(buffer[0])
    return buffer[0]

  return Candidate(call, jax.block_until_ready, None)


def measure_peaks(dtype: str, repeats: int = 10) -> Peaks:
  """Copy bandwidth and matmul rate of the first device, the best of `repeats`: what a floor is computed from."""
  gpu = jax.default_backend() != 'cpu'
  n, size = (1 << 30, 8192) if gpu else (1 << 28, 1024)
  a = jnp.zeros(n // 4, jnp.float32)
  m = jnp.asarray(np.random.default_rng(0).standard_normal((size, size)), dtype)
  candidates = {'copy': jax_candidate(lambda a: a + 1, a), 'matmul': jax_candidate(jnp.matmul, m, m)}
  best = {name: min(samples) for name, samples in measure(candidates, repeats, gpu).items()}
  return Peaks(2 * n / best['copy'], 2 * size**3 / best['matmul'])
