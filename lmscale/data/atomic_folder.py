"""Folders that are either whole or not there: built under a temporary name, then renamed.

Any number of processes may ask for the same folder at once. Each builds its own copy, the first to finish wins, the
others throw theirs away.
"""

import contextlib
import errno
import fcntl
import logging
import os
import pathlib
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TypeVar

from lmscale import config as config_lib
from lmscale.unfinished import unfinished

ATTEMPTS = 3
STALE = 24 * 3600  # seconds without a write after which a temporary folder was left behind by a killed build
PREFIX = 'tmp-'

T = TypeVar('T')
log = logging.getLogger(__name__)


def ensure(folder: pathlib.Path, build: Callable[[pathlib.Path], None],
           open_folder: Callable[[pathlib.Path], T]) -> T:
  """`open_folder(folder)`, after `build(empty folder)` if the folder is missing or `open_folder` finds it damaged.

  `open_folder` says damaged by raising anything; a log line tells. What was built is on the disk before it has its name.
  Raises ConfigError if the cache cannot be written and RuntimeError if a folder cannot be opened just after it was built.
  """
  for _ in range(ATTEMPTS):
    if not folder.is_dir():
      _build(folder, build)
    found = _inode(folder)
    try:
      return open_folder(folder)
    except Exception as error:  # noqa: BLE001 - whatever a damaged file makes a reader raise; it may also be being replaced
      failure = error
    if found == _inode(folder):  # else another process has replaced it meanwhile
      log.warning('%s is damaged and built again: %s', folder, ' '.join(f'{failure}'.split())[:200] or type(failure).__name__)
      with _writable(folder):
        _discard(folder)
  raise RuntimeError(f'{folder} is damaged again after it was rebuilt: {failure}') from failure


def make(folder: pathlib.Path, build: Callable[[pathlib.Path], None]) -> None:
  """`folder`, which must not be there or be empty, of what `build(empty folder)` puts in: whole and on the disk, or not there.

  A process that is killed leaves a hidden `.<name>.unfinished-...` beside it, which the next call for the same folder removes.

  Raises:
    ConfigError: the folder holds something, or cannot be written.
  """
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise config_lib.ConfigError(f'{folder}: exists already; give another folder, or move it away')
  beginning = f'.{folder.name}.unfinished-'
  temporary = folder.parent / f'{beginning}{uuid.uuid4().hex}'
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_unlocked(folder.parent, beginning)
    temporary.mkdir()
    with (temporary / 'lock').open('w') as lock, unfinished(temporary):
      fcntl.flock(lock, fcntl.LOCK_EX)
      build(temporary)
      _sync(temporary)
      temporary.rename(folder)
      (folder / 'lock').unlink()
      _sync_one(folder.parent)
  except OSError as error:
    raise config_lib.ConfigError(f'{folder}: cannot be written: {error.strerror or error}; give another folder, or make room') from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _remove_unlocked(parent: pathlib.Path, beginning: str) -> None:
  """Removes what killed processes have left: those that go on hold a lock."""
  for path in parent.iterdir():
    if path.name.startswith(beginning) and (path / 'lock').is_file():
      with (path / 'lock').open() as lock, contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)


def _build(folder: pathlib.Path, build: Callable[[pathlib.Path], None]) -> None:
  temporary = _temporary(folder)
  try:
    with _writable(folder), unfinished(temporary):
      folder.parent.mkdir(parents=True, exist_ok=True)
      _remove_stale(folder.parent)
      temporary.mkdir()
      build(temporary)
      _sync(temporary)
      try:
        temporary.rename(folder)
        _sync_one(folder.parent)
      except OSError:
        if not folder.is_dir():  # otherwise another process was first: its copy is as good
          raise
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _sync(folder: pathlib.Path) -> None:
  """Has a folder and all below it on the disk: a name that outlives a loss of power must not stand for zeros."""
  for path in (*folder.rglob('*'), folder):
    if path.is_file() or path.is_dir():
      _sync_one(path)


def _sync_one(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems sync no folders
      raise
  finally:
    os.close(descriptor)


def _inode(folder: pathlib.Path) -> int | None:
  return folder.stat().st_ino if folder.is_dir() else None


def _temporary(folder: pathlib.Path) -> pathlib.Path:
  return folder.parent / f'{PREFIX}{uuid.uuid4().hex}'


def _discard(folder: pathlib.Path) -> None:
  temporary = _temporary(folder)
  with contextlib.suppress(FileNotFoundError):
    folder.rename(temporary)
  shutil.rmtree(temporary, ignore_errors=True)


def _remove_stale(parent: pathlib.Path) -> None:
  for folder in parent.glob(f'{PREFIX}*'):
    with contextlib.suppress(OSError):
      newest = max(path.stat().st_mtime for path in (folder, *folder.rglob('*')))
      if time.time() - newest > STALE:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _writable(folder: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise config_lib.ConfigError(f'data.cache: cannot write {folder}: {error.strerror or error}; '
                                 'set data.cache or LMSCALE_CACHE to a folder with space') from error
