"""Which files a path, a folder or a glob stands for: all of them, each once, nothing else, none left out in silence.

Links are followed; a folder that is reached again (by a second link, or a loop) is not entered again, and of several
names for one file one is read. Names that begin with a dot (`.git`, `._a.txt`, `.ipynb_checkpoints`) are left out unless
named.
"""

import collections
import fnmatch
import functools
import glob
import os
import pathlib
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from lmscale.data import file_digest
from lmscale.data.sources import file_streams
from lmscale.errors import ConfigError

READ = ('', '.gz', '.zst')  # what may stand behind a suffix
REFUSED = ('.xz', '.bz2', '.zip', '.lz4', '.7z', '.lzma', '.z')  # found too, so that reading them says what to do


class Files(NamedTuple):
  """What was found. `notices`: what the user should know about it, a line each."""

  paths: list[pathlib.Path]
  notices: list[str]


class Place(NamedTuple):
  """A name in a folder, and what it leads to."""

  path: pathlib.Path
  real: str  # without links
  linked: bool  # a link, or below one
  status: os.stat_result

  @property
  def is_folder(self) -> bool:
    return stat.S_ISDIR(self.status.st_mode)

  @property
  def is_file(self) -> bool:
    return stat.S_ISREG(self.status.st_mode)


def find_files(path: str, suffix: str) -> Files:
  """The files that `path` names, sorted: a file, a folder (every `suffix` file below, packed or not) or a glob, whose
  folders stand for their files.

  Raises:
    ConfigError: there is none; a folder cannot be read; a link leads nowhere; `x` and `x.gz` hold different texts.
  """
  if not path:
    raise ConfigError('path: empty; give a file, a folder or a glob')
  if '\0' in path:
    raise ConfigError(f'path {path!r}: holds a NUL')
  root = pathlib.Path(path).expanduser()
  if os.path.isfile(root):
    return Files([root], [])
  if os.path.isdir(root):
    found = list(_below(_place(root), suffix))
    problem = f'the folder has no *{suffix} file (nor *{suffix}.gz, *{suffix}.zst)'
  elif glob.has_magic(path):
    found = list(_glob(root, suffix))
    problem = 'the glob matches no file'
  elif os.path.islink(root):
    raise _dangling(root)
  else:
    found, problem = [], 'neither a file nor a folder' if os.path.exists(root) else 'no such file or folder'
  if not found:
    raise ConfigError(f'path {path!r}: {problem}')
  return _each_once(found)


def _below(top: Place, suffix: str) -> Iterator[Place]:
  """The files below a folder whose names end with `suffix`, in capitals too."""
  endings = tuple(suffix + ending for ending in READ + REFUSED)
  for folder in _folders(top):
    yield from (p for p in _list(folder, lambda name: _shown(name) and name.lower().endswith(endings)) if p.is_file)


def _glob(pattern: pathlib.Path, suffix: str) -> Iterator[Place]:
  parts = pattern.parts
  fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
  base = pathlib.Path(*parts[:fixed])
  if not base.is_dir():
    return
  magic = [part for i, part in enumerate(parts) if i >= fixed and not (i and part == parts[i - 1] == '**')]
  for place in _matches(_place(base), [*magic, '*'] if magic[-1] == '**' else magic):
    if place.is_folder:
      yield from _below(place, suffix)
    elif place.is_file:
      yield place


def _matches(folder: Place, parts: Sequence[str]) -> Iterator[Place]:
  part, rest = parts[0], parts[1:]
  if part == '**':
    for below in _folders(folder):
      yield from _matches(below, rest)
    return
  if glob.has_magic(part):
    found = _list(folder, lambda name: (_shown(name) or part.startswith('.')) and fnmatch.fnmatchcase(name, part))
  else:
    named = folder.path / part
    found = [_place(named, folder)] if os.path.lexists(named) else []
  for place in found:
    if not rest:
      yield place
    elif place.is_folder:
      yield from _matches(place, rest)


def _shown(name: str) -> bool:
  return not name.startswith('.')


def _folders(top: Place) -> Iterator[Place]:
  """`top` and the folders below it, each once and those that no link leads to first."""
  seen, todo = set(), collections.deque([top])
  while todo:
    folder = todo.popleft()
    if folder.real in seen:
      continue
    seen.add(folder.real)
    yield folder
    for place in _list(folder, _shown, folders=True):
      (todo.append if place.linked else todo.appendleft)(place)


def _list(folder: Place, wanted: Callable[[str], bool], folders: bool = False) -> list[Place]:
  """What is in a folder under the names that are `wanted`, sorted; or only the folders."""
  try:
    with os.scandir(folder.path) as entries:
      names = [entry.name for entry in entries if wanted(entry.name) and (not folders or _may_be_folder(entry))]
  except OSError as error:
    raise ConfigError(f'folder {folder.path}: cannot be read: {error.strerror}') from error
  found = [_place(folder.path / name, folder) for name in sorted(names)]
  return [place for place in found if place.is_folder] if folders else found


def _may_be_folder(entry: os.DirEntry) -> bool:
  return entry.is_symlink() or entry.is_dir(follow_symlinks=False)


def _place(path: pathlib.Path, folder: Place | None = None) -> Place:
  link = os.path.islink(path)
  try:
    status = os.stat(path)
  except OSError as error:
    raise _dangling(path) if link else file_digest.unreadable(path, error) from error
  if folder is None:
    return Place(path, os.path.realpath(path), False, status)
  real = os.path.realpath(path) if link or path.name == '..' else os.path.join(folder.real, path.name)
  return Place(path, real, link or folder.linked, status)


def _dangling(path: pathlib.Path) -> ConfigError:
  return ConfigError(f'{path}: a link to {os.readlink(path)}, which cannot be followed; mend it or remove it')


def _each_once(found: list[Place]) -> Files:
  """The files without second names for one of them, and without `x.gz` beside an equal `x`."""
  kept: dict[object, Place] = {}
  again = []
  for place in sorted({p.path: p for p in found}.values(), key=lambda p: (p.linked, p.path)):
    status = place.status
    same = (status.st_dev, status.st_ino) if status.st_nlink > 1 and status.st_ino else place.real
    if kept.setdefault(same, place) is not place:
      again.append((place.path, kept[same].path))
  paths = sorted(place.path for place in kept.values())
  packed = _packed_again(paths)
  notices = []
  if again:
    notices.append(
      f'{_count(again, "name")} for a file that is read under another, and read once: '
      f'the first is {again[0][0]}, which is {again[0][1]}'
    )
  if packed:
    notices.append(
      f'{_count(packed, "file")} with the text of another beside it, read once: '
      f'the first is {packed[0][0]}, beside {packed[0][1]}'
    )
  left_out = {path for path, _ in packed}
  return Files([path for path in paths if path not in left_out], notices)


def _count(found: list, what: str) -> str:
  return f'{len(found)} {what}' + 's' * (len(found) > 1)


def _packed_again(paths: list[pathlib.Path]) -> list[tuple[pathlib.Path, pathlib.Path]]:
  """(file, file with the same text in another packing) for all but one of each group; ConfigError if they differ."""
  groups = collections.defaultdict(list)
  for path in paths:
    groups[path.with_suffix('') if path.suffix.lower() in READ[1:] else path].append(path)
  found = []
  for first, *others in groups.values():
    for other in others:
      if not _equal(*(_stated(path) for path in (first, other))):
        raise ConfigError(f'{first} and {other}: two packings of one name with different texts; remove the wrong one')
      found.append((other, first))
  return found


def _stated(path: pathlib.Path) -> tuple:
  status = path.stat()
  return str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@functools.lru_cache(1024)  # asked again for the other split
def _equal(a: tuple, b: tuple) -> bool:
  """Whether two files, given with their states, unpack to the same bytes."""
  streams = [_bytes(pathlib.Path(path)) for path, *_ in (a, b)]
  held = [b'', b'']
  while True:
    held = [part or next(stream, b'') for part, stream in zip(held, streams, strict=True)]
    size = min(map(len, held))
    if not size:
      return not any(held)
    if held[0][:size] != held[1][:size]:
      return False
    held = [part[size:] for part in held]


def _bytes(path: pathlib.Path) -> Iterator[bytes]:
  try:
    yield from (block for block in file_streams.blocks(path) if block)
  except file_streams.Damaged as error:
    raise ConfigError(f'data file {path}: {error}') from error
