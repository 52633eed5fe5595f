"""What is known of the kernels on this device: proved, or why not. Tried once, in a process that may crash, and kept in the cache.

A verdict holds for a kind of device, the versions of JAX and the source of the kernels. One that says nothing of the kernel (no
memory, no time, no device in the other process) is not kept.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Mapping

import jax
import jaxlib

from lmscale.cache_root import cache_root

PACKAGE = pathlib.Path(__file__).parents[2]
SECONDS = 600
# In the other process; with what stands here the kernel was not what failed.
NOT_THE_KERNEL = ('RESOURCE_EXHAUSTED', 'out of memory', 'Unable to initialize backend', 'No visible GPU')
log = logging.getLogger(__name__)

Key = tuple[str, str, str]  # operation, implementation, dtype


@dataclasses.dataclass(frozen=True)
class Verdict:
  """why_not: empty if the kernel computes what `xla` does in float32. worst: the largest error, as a share of its bound.
  seconds: of a forward and backward pass at a size as in training; 0 if not measured."""

  why_not: str
  worst: float = 0.0
  seconds: float = 0.0


_known: dict[Key, Verdict] = {}


def verdict(op: str, name: str, dtype: str) -> Verdict:
  """On implementation `name` of an operation, on the first device of this process; tries it where nothing is known."""
  key = op, name, dtype
  if key not in _known:
    path = _path(*key)
    _known[key] = _read(path) or _try(path, *key)
    if _known[key].why_not:
      log.warning('%s: %s is not used for %s on this %s: %s', op, name, dtype, jax.devices()[0].device_kind, _known[key].why_not)
  return _known[key]


def known() -> dict[str, dict]:
  """All verdicts so far, to be shared with other processes."""
  return {' '.join(key): dataclasses.asdict(value) for key, value in _known.items()}


def adopt(verdicts: Mapping[str, dict]) -> None:
  """Takes over the verdicts of another process: all of a run must choose alike."""
  _known.update({tuple(key.split()): Verdict(**value) for key, value in verdicts.items()})


def command(op: str, name: str, dtype: str) -> list[str]:
  """Tries a kernel and prints a verdict as the last line."""
  return [sys.executable, '-m', 'lmscale.kernels.proof', op, name, dtype]


def _try(path: pathlib.Path, op: str, name: str, dtype: str) -> Verdict:
  log.warning('%s: trying %s once in %s on this %s', op, name, dtype, jax.devices()[0].device_kind)
  first = os.environ.get('CUDA_VISIBLE_DEVICES', '0').split(',')[0]
  environ = os.environ | {
    'CUDA_VISIBLE_DEVICES': first, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false', 'TF_CPP_MIN_LOG_LEVEL': '3',
    'PYTHONPATH': os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get('PYTHONPATH')])]),
  }  # fmt: skip
  try:
    done = subprocess.run(command(op, name, dtype), check=False, env=environ, capture_output=True, text=True, timeout=SECONDS)
  except subprocess.TimeoutExpired:
    return Verdict(f'its trial took more than {SECONDS} s')
  found = _judge(done)
  if not any(words in found.why_not for words in NOT_THE_KERNEL):
    _keep(path, found)
  return found


def _judge(done: subprocess.CompletedProcess) -> Verdict:
  if done.returncode == 0:
    return Verdict(**json.loads(done.stdout.splitlines()[-1]))
  if done.returncode < 0:
    return Verdict(f'it crashed with {signal.Signals(-done.returncode).name}')
  lines = [line for line in done.stderr.splitlines() if re.match(r'[\w.]*(Error|Exception)\b', line)] or [f'exit code {done.returncode}']
  return Verdict(f'its trial failed: {lines[-1].strip()[:300]}')


def _path(*key: str) -> pathlib.Path:
  return cache_root() / 'kernels' / f'{"-".join(key)}-{_here()}.json'


@functools.cache
def _here() -> str:
  """A digest of what a verdict depends on."""
  device, digest = jax.devices()[0], hashlib.sha256()
  digest.update(repr((device.device_kind, device.client.platform_version, jax.__version__, jaxlib.__version__)).encode())
  for path in sorted((PACKAGE / 'kernels').rglob('*.py')):
    digest.update(path.read_bytes())
  return digest.hexdigest()[:16]


def _read(path: pathlib.Path) -> Verdict | None:
  try:
    return Verdict(**json.loads(path.read_text()))
  except (OSError, ValueError, TypeError):  # missing, or something else: tried again and written anew
    return None


def _keep(path: pathlib.Path, found: Verdict) -> None:
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f'.{path.name}.{os.getpid()}')
    unfinished.write_text(json.dumps(dataclasses.asdict(found)))
    unfinished.replace(path)
  except OSError as error:
    log.warning('the verdict on a kernel cannot be kept in %s: %s', path.parent, error.strerror or error)
