"""A run's folder: who may write in it, and with what it was run.

  config.json        the config as last run; `config.from_dict` reads it back
  environment.json   versions and hardware as last run
  lock               held while a process runs here
  metrics.jsonl, tensorboard/, samples.txt, loss.svg, checkpoints/, eval/

Of a run's processes the first holds the lock and writes; the others look that they see the same folder.
"""

import datetime
import fcntl
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from typing import Any, Self

import jax

from lmscale import config as config_lib
from lmscale import processes, unfinished
from lmscale.config import Config
from lmscale.errors import ConfigError

PACKAGES = (
  'lmscale', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'tensorflow-datasets', 'array_record',
)  # fmt: skip

FILES = ('config.json', 'environment.json', 'goodput.json', 'lock', 'loss.svg', 'metrics.jsonl', 'samples.txt')
FOLDERS = ('checkpoints', 'eval', 'tensorboard')

VISIBLE = 30.0  # seconds until a new folder is seen by other hosts
STEP = re.compile('0|[1-9][0-9]*')  # the name of a checkpoint's folder

log = logging.getLogger(__name__)


class Workdir:
  """An open, locked run folder; a context manager. `path` is absolute; `config` is what the run is to be run with."""

  def __init__(self, path: pathlib.Path, config: Config, lock: int | None = None):
    self.path, self.config = path, config
    self.checkpoints = path / 'checkpoints'
    self._lock = lock

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  def record(self) -> None:
    """Writes config.json and environment.json: once it is settled that the run goes on with them. Of several processes the first."""
    write_atomic(self.path / 'config.json', json.dumps(config_lib.to_dict(self.config), indent=2) + '\n')
    write_atomic(self.path / 'environment.json', json.dumps(environment(), indent=2) + '\n')

  def close(self) -> None:
    """Lets another run use the folder."""
    if self._lock is not None:
      os.close(self._lock)


def open_workdir(folder: str | os.PathLike, config: Config) -> Workdir:
  """Makes and locks the folder. Whether a run in it may go on with `config` is for `resume.begin` to say.

  Raises:
    ConfigError: the folder cannot be made or is in use, or a process of the run does not see the folder.
  """
  path = pathlib.Path(folder).expanduser().absolute()
  if not processes.is_first():
    _look(path, processes.share('owner', None))
    return Workdir(path, config)
  made = [p for p in (path, *path.parents) if not p.exists()]
  try:
    path.mkdir(parents=True, exist_ok=True)
    if made:
      unfinished.add(lambda: _remove_empty(made))
    lock = _lock(path)
  except OSError as error:
    raise ConfigError(f'workdir {path}: {error.strerror}; give another --workdir') from error
  workdir = Workdir(path, config, lock)
  try:
    _set_strays_aside(workdir.checkpoints)
    processes.share('owner', (path / 'lock').read_text())
  except BaseException:
    workdir.close()
    raise
  return workdir


def read_config(folder: pathlib.Path) -> Config | None:
  """The config.json of a run's folder; None where there is none. Raises ConfigError where it cannot be read."""
  path = folder / 'config.json'
  if not path.exists():
    return None
  try:
    return config_lib.from_dict(json.loads(path.read_text(encoding='utf-8')))
  except (ValueError, OSError, RecursionError) as error:
    raise ConfigError(
      f'{path}: written by another version of lmscale or damaged ({error}); give another --workdir, or move the file away to '
      'go by the config in the checkpoint'
    ) from error


def _set_strays_aside(checkpoints: pathlib.Path) -> None:
  """Renames what has the name of a checkpoint and cannot be one, a file or a folder without any, to `<step>.stray`.

  It would be taken for the newest checkpoint, and be in the way of the one of that step.
  """
  for path in sorted(checkpoints.glob('*')):
    if not STEP.fullmatch(path.name) or path.is_dir() and any(p.is_file() for p in path.rglob('*')):
      continue
    target, attempt = path.with_name(f'{path.name}.stray'), 1
    while target.exists():
      target, attempt = path.with_name(f'{path.name}.stray-{attempt}'), attempt + 1
    path.rename(target)
    log.warning('%s is no checkpoint (%s): renamed to %s', path, 'empty' if target.is_dir() else 'a file', target.name)


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
    log.warning('%s cannot be locked (%s): start no second process there', path, error)
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
