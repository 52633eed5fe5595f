"""What is half made, and goes when the process has to end at once before it has done anything worth keeping."""

import contextlib
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator

_removals: dict[object, Callable[[], None]] = {}


@contextlib.contextmanager
def unfinished(folder: pathlib.Path) -> Iterator[None]:
  """Within it `folder`, with all that is in it, is half made."""
  key = add(lambda: _remove(folder))
  try:
    yield
  finally:
    _removals.pop(key, None)


def add(remove: Callable[[], None]) -> object:
  """Has `remove` called should the process end at once; returns a key."""
  key = object()
  _removals[key] = remove
  return key


def keep_all() -> None:
  """What was half made is worth keeping from now on."""
  _removals.clear()


def remove_all() -> None:
  """Removes what is half made, the newest first; for the end of the process, from any thread."""
  for remove in reversed(list(_removals.values())):
    with contextlib.suppress(Exception):
      remove()


def _remove(folder: pathlib.Path) -> None:
  for _ in range(20):  # another thread may still be writing there
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
      return
    time.sleep(0.05)
