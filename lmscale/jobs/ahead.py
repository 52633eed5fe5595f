"""The training step compiled ahead of time, for devices that are not here."""

import contextlib
import importlib.util
import itertools
import os
import time
from typing import Any

import jax
from jax.experimental import topologies

from lmscale.config import Config, ConfigError, resolve_mesh
from lmscale.kernels import choice
from lmscale.plan.compiled import compiled_report
from lmscale.plan.hardware import HARDWARE, gpu_target
from lmscale.train.program import Program

CPU = 'cpu'  # emulated devices
TARGETS = (CPU, *HARDWARE)
MOST_EMULATED = 1024  # CPU devices, each with its threads
NODE = 8  # GPUs of a host
# What is compiled for the CPU never runs: its buffers and collectives are settled before LLVM begins.
QUICK = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}


def prepare(config: Config, target: str) -> None:
  """Sets JAX up to compile `config` for `target`; before JAX is used for anything else."""
  jax.config.update('jax_enable_x64', config.train.compute_dtype == 'float64')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # libtpu would look for the machine that it runs on
  os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')  # and the CUDA plug-in for a driver
  if target not in TARGETS:
    raise ConfigError(f'--compile: {target!r} is not one of {", ".join(TARGETS)}')
  if target == CPU:
    if config.mesh.size > MOST_EMULATED:
      raise ConfigError(
        f'--compile: {config.mesh.size} devices are more than the {MOST_EMULATED} that a CPU can emulate; name hardware, whose '
        f'compiler needs none: --compile={" or --compile=".join(HARDWARE)}'
      )
    with contextlib.suppress(RuntimeError):  # of a process that already runs on devices; `devices` tells
      jax.config.update('jax_num_cpu_devices', config.mesh.size)


def compile_step(config: Config, target: str) -> dict[str, Any]:
  """Compiles the step of a config whose mesh.data is known, and says what came out: see `compiled_report`.

  Raises:
    ConfigError: no compiler for the target is installed, it has no such number of devices, or the step does not fit.
  """
  config = resolve_mesh(config, config.mesh.size)
  found = devices(target, config.mesh.size)
  program = Program(config, found)
  began = time.perf_counter()
  with choice.tracing_for(found[0]):
    lowered = program.lower_step()
  lowering = time.perf_counter()
  try:
    compiled = lowered.compile(compiler_options=QUICK if target == CPU else None)
  except RuntimeError as error:
    raise ConfigError(f'--compile={target}: the compiler refuses the step: {_first_line(error)}') from error
  seconds = {'lower': lowering - began, 'compile': time.perf_counter() - lowering}
  about = {'target': target, 'device_kind': found[0].device_kind, 'devices': len(found)}
  return about | {'seconds': seconds} | compiled_report(config, compiled, program.abstract_state(), program.mesh)


def devices(target: str, count: int) -> list[Any]:
  """`count` devices of a target, of which only the CPU's exist."""
  if target == CPU:
    here = jax.devices('cpu')
    if len(here) < count:
      raise ConfigError(f'--compile: {count} CPU devices are to be emulated, but JAX already runs with {len(here)}')
    return here[:count]
  try:
    if HARDWARE[target].device_kind.startswith('TPU'):
      return _tpus(target, count)
    return _gpus(target, count)
  except Exception as error:  # the plug-ins raise what they like
    if isinstance(error, ConfigError):
      raise
    raise ConfigError(f'--compile={target}: {count} devices cannot be described: {_first_line(error)}') from error


def _gpus(target: str, count: int) -> list[Any]:
  _need('jax_cuda12_plugin', 'jax_cuda13_plugin', target=target, extra='cuda')
  hosts, rest = divmod(count, NODE)
  shape = f'1x{hosts}x{NODE}' if not rest else f'1x1x{count}'
  return list(topologies.get_topology_desc(platform='cuda', topology_name=target, target_config=gpu_target(target), topology=shape).devices)


def _tpus(target: str, count: int) -> list[Any]:
  _need('libtpu', target=target, extra='tpu')
  shape = torus(count)
  return list(topologies.get_topology_desc(platform='tpu', topology_name=f'{target}:{"x".join(map(str, shape))}').devices)


def torus(chips: int) -> tuple[int, int, int]:
  """The most even slice of a 3D torus: up to 4 x 4 x 4 chips whole hosts of 2 x 2, beyond it whole cubes of 4 x 4 x 4.

  Raises:
    ConfigError: there is none of that size.
  """
  small = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
  if chips < 64:
    shapes = [shape for shape in small if chips == shape[0] * shape[1] * shape[2]]
  else:
    sides = [n for n in range(4, chips // 16 + 1, 4) if chips % n == 0]
    shapes = [(a, b, chips // (a * b)) for a, b in itertools.combinations_with_replacement(sides, 2) if chips % (a * b) == 0]
    shapes = [shape for shape in shapes if shape[2] >= shape[1] and shape[2] % 4 == 0]
  if not shapes:
    raise ConfigError(f'--compile: no slice of {chips} chips; there are some of 4, 8, 16 and 32, and of multiples of 64 chips')
  return min(shapes, key=max)


def _need(*packages: str, target: str, extra: str) -> None:
  if not any(importlib.util.find_spec(package) for package in packages):
    raise ConfigError(f"--compile={target}: its compiler is not installed; install it with: pip install -e '.[{extra}]'")


def _first_line(error: BaseException) -> str:
  return str(error).strip().partition('\n')[0][:300] or type(error).__name__
