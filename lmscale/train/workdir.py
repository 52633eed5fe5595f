"""A run's folder: who may write in it, what it was started with, and whether a run may go on with other settings.

  config.json        the config as last run; `config.from_dict` reads it back
  environment.json   versions and hardware as last run
  lock               held while a process runs here
  metrics.jsonl, tensorboard/, samples.txt, loss.svg, checkpoints/

Of a run's processes the first holds the lock and writes; the others look that they see the same folder.
"""

import dataclasses
import datetime
import fcntl
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import shutil
import socket
import subprocess
import sys
import time
from typing import Any, Self

import jax

from lmscale import config as config_lib
from lmscale import processes as distributed
from lmscale import unfinished
from lmscale.config import Config, run_tokens
from lmscale.errors import ConfigError

PACKAGES = (
  'lmscale', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'tensorflow-datasets', 'array_record',
)  # fmt: skip

FILES = ('config.json', 'environment.json', 'goodput.json', 'lock', 'loss.svg', 'metrics.jsonl', 'samples.txt')
FOLDERS = ('checkpoints', 'tensorboard')

VISIBLE = 30.0  # seconds until a new folder is seen by other hosts

# A resumed run may change how and for how long it runs, and what it skips, not what it computes. Fields not named here may not change.
MAY_CHANGE = (
  'name', 'emulate', 'mesh.', 'loop.', 'data.cache', 'data.end_token', 'train.steps', 'train.microbatch', 'train.remat', 'train.stack',
  'train.loss_chunk', 'train.nonfinite_budget', 'train.spike_skip', 'train.spike_budget', 'train.deterministic', 'model.attention.implementation',
  'model.mamba2.implementation', 'model.mamba2.chunk', 'model.mamba.implementation', 'model.mamba.chunk',
)  # fmt: skip


class Workdir:
  """An open, locked run folder; a context manager. `path` is absolute."""

  def __init__(self, path: pathlib.Path, lock: int | None = None):
    self.path = path
    self.checkpoints = path / 'checkpoints'
    self._lock = lock

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  def close(self) -> None:
    """Lets another run use the folder."""
    if self._lock is not None:
      os.close(self._lock)


def open_workdir(folder: str | os.PathLike, config: Config) -> Workdir:
  """Makes and locks the folder, checks that a run in it may go on with `config`, and records config and environment.

  The config is compared once there is a checkpoint to lose.

  Raises:
    ConfigError: the folder cannot be made or is in use, the config changes what an earlier run there computed, or a
      process of the run does not see the folder.
  """
  path = pathlib.Path(folder).expanduser().absolute()
  if not distributed.is_first():
    _look(path, distributed.share('owner', None))
    return Workdir(path)
  made = [p for p in (path, *path.parents) if not p.exists()]
  try:
    path.mkdir(parents=True, exist_ok=True)
    if made:
      unfinished.add(lambda: _remove_empty(made))
    lock = _lock(path)
  except OSError as error:
    raise ConfigError(f'workdir {path}: {error.strerror}; give another --workdir') from error
  workdir = Workdir(path, lock)
  try:
    saved = path / 'config.json'
    if saved.exists() and any(p.name.isdigit() for p in workdir.checkpoints.glob('*')):
      check_resume(_read_config(saved), config, path)
    write_atomic(saved, json.dumps(config_lib.to_dict(config), indent=2) + '\n')
    write_atomic(path / 'environment.json', json.dumps(environment(), indent=2) + '\n')
    distributed.share('owner', (path / 'lock').read_text())
  except BaseException:
    workdir.close()
    raise
  return workdir


def check_resume(old: Config, new: Config, path: pathlib.Path) -> None:
  """Refuses a config under which a resumed run would not be the run that was started.

  train.steps may change where that leaves the learning rate of every step as it was: with a constant rate, or where
  optimizer.decay_tokens says when the decay ends.

  Raises:
    ConfigError: a heading and one line per field that changed.
  """
  before, after = _comparable(old), _comparable(new)
  lines = []
  for name in [*before, *(n for n in after if n not in before)]:
    if before.get(name) == after.get(name) or any(name == f or f[-1] == '.' and name.startswith(f) for f in MAY_CHANGE):
      continue
    if name == 'optimizer.decay_tokens' and (old.optimizer.schedule == 'constant') != (new.optimizer.schedule == 'constant'):
      continue  # only one of the two schedules reads it
    lines.append(f'  {name}: {_show(before, name)} -> {_show(after, name)}')
    if name == 'optimizer.warmup_tokens' and old.train.steps != new.train.steps:
      lines[-1] += f' (a recipe\'s follows the length of the run; keep it by optimizer.warmup_tokens={before[name]})'
    if name == 'optimizer.decay_tokens' and 0 in (old.optimizer.decay_tokens, new.optimizer.decay_tokens):
      steps = f'train.steps {old.train.steps} -> {new.train.steps}'
      lines[-1] += f' (0 means the end of the run, {steps}; keep it by optimizer.decay_tokens={before[name]})'
  if lines:
    heading = f'workdir {path} holds a run with other settings; restore them or give another --workdir:'
    raise ConfigError('\n'.join([heading, *lines]))


def check_identity(old: Any, new: Any, path: pathlib.Path) -> None:
  """Refuses data whose identity (any JSON value) is not the one the checkpoint was trained on.

  Raises:
    ConfigError: one line per part that changed.
  """
  before, after = config_lib.flatten(old), config_lib.flatten(new)
  lines = [f'  {n or "identity"}: {_show(before, n)} -> {_show(after, n)}' for n in {**before, **after}
           if before.get(n) != after.get(n)]  # fmt: skip
  if lines:
    heading = (
      f'workdir {path} was trained on other data than it would read now; restore it, or start a new run from its '
      f'parameters (another --workdir with --config.train.init_from={path}):'
    )
    raise ConfigError('\n'.join([heading, *lines]))


def environment() -> dict[str, Any]:
  """Versions, platform and devices, as JSON values."""
  devices = jax.devices()
  return {
    'started': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'python': sys.version.split()[0],
    'platform': platform.platform(),
    'machine': platform.machine(),
    'cpus': os.cpu_count(),
    'processes': jax.process_count(),
    'devices': {'count': len(devices), 'kind': devices[0].device_kind, 'platform': devices[0].platform},
    'packages': {name: _version(name) for name in PACKAGES},
    'git': _git_commit(),
  }


def write_atomic(path: pathlib.Path, text: str) -> None:
  """Replaces a file in one step: a reader, or a process that is killed, sees the old text or the new."""
  temporary = path.with_name(path.name + '.tmp')
  with temporary.open('w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)


def _lock(path: pathlib.Path) -> int:
  """Holds `path/lock` until the descriptor is closed or the process ends, however it ends."""
  handle = os.open(path / 'lock', os.O_RDWR | os.O_CREAT, 0o644)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    owner = os.read(handle, 200).decode(errors='replace').strip() or 'unknown'
    os.close(handle)
    raise ConfigError(f'workdir {path} is in use by process {owner}; wait for it or give another --workdir') from None
  except OSError as error:
    logging.getLogger(__name__).warning('%s cannot be locked (%s): start no second process there', path, error)
    return handle
  os.ftruncate(handle, 0)
  os.write(handle, f'{os.getpid()} on {socket.gethostname()}\n'.encode())
  return handle


def _remove_empty(made: list[pathlib.Path]) -> None:
  """Removes the folder of a run that has saved nothing, and those that were made to hold it; whatever else is there stays."""
  path = made[0]
  if not any(p.name.isdigit() for p in path.glob('checkpoints/*')):
    for name in FILES:
      (path / name).unlink(missing_ok=True)
    for name in FOLDERS:
      shutil.rmtree(path / name, ignore_errors=True)
    for folder in made:
      folder.rmdir()


def _look(path: pathlib.Path, owner: str) -> None:
  """Raises ConfigError unless the folder that `owner` has locked is seen here within some seconds."""
  deadline = time.monotonic() + VISIBLE
  while time.monotonic() < deadline:
    if (path / 'lock').is_file() and (path / 'lock').read_text() == owner:
      return
    time.sleep(0.1)
  raise ConfigError(
    f'workdir {path}: on {socket.gethostname()} it is not the folder that process {owner.strip()} writes; '
    'give a --workdir on storage that all processes share'
  )


def _read_config(path: pathlib.Path) -> Config:
  try:
    return config_lib.from_dict(json.loads(path.read_text(encoding='utf-8')))
  except (ValueError, OSError, RecursionError) as error:
    raise ConfigError(f'{path}: written by another version of lmscale or damaged ({error}); give another --workdir') from error


def _comparable(config: Config) -> dict[str, Any]:
  """The config as {path: value}, with optimizer.decay_tokens as the token count that it stands for."""
  optimizer = config.optimizer
  if optimizer.schedule != 'constant':
    optimizer = dataclasses.replace(optimizer, decay_tokens=optimizer.decay_tokens or run_tokens(config.train))
  return config_lib.flatten(config_lib.to_dict(dataclasses.replace(config, optimizer=optimizer)))


def _show(values: dict[str, Any], name: str) -> str:
  return json.dumps(values[name]) if name in values else 'absent'


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _git_commit() -> str | None:
  """The commit the code was run from, with `+changes` where files differ from it; None outside a clone."""
  root = pathlib.Path(__file__).resolve().parents[2]
  if not (root / '.git').exists():
    return None

  def git(*arguments: str) -> str:
    command = ['git', '-C', str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

  try:
    return git('rev-parse', 'HEAD') + ('+changes' if git('status', '--porcelain') else '')
  except (OSError, subprocess.SubprocessError):
    return None
