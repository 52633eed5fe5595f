"""What SIGINT and SIGTERM do to a run.

Until a run has taken a step it has nothing to lose: the first signal ends it at once, whatever it is doing, with what is half made
removed and exit code 75. After that the first signal is a request to finish the step and save. A second one ends it at once.

The signal is seen by a thread, through a pipe that the C handler writes to: Python's own handlers wait for the main thread, which may
be compiling for minutes while a cluster gives it seconds.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn, Self

from lmscale import unfinished
from lmscale.exit_codes import AGAIN, KILLED
from lmscale.processes import peers
from lmscale.processes.exits import exit_now

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AT_ONCE = 'ended before the first step: nothing is lost or left half-made; run the same command again to go on'
REQUESTED = 'finishing the step and saving; once more ends at once, unsaved'


class Interrupt:
  """Answers SIGINT and SIGTERM while it is entered, in the main thread; a context manager.

  requested: whether the run is to finish its step and save. stepping: whether it has a step to lose from the beginning.
  """

  def __init__(self, stepping: bool = False):
    self.requested = False
    self._stepping = stepping
    self._seen = 0

  def __enter__(self) -> Self:
    self._read, self._write = os.pipe()
    os.set_blocking(self._write, False)
    self._thread = threading.Thread(target=self._watch, name='interrupt', daemon=True)
    self._thread.start()
    self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
    self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
    return self

  def __exit__(self, *error: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._wakeup)
    os.close(self._write)
    self._thread.join()
    os.close(self._read)

  def begin(self) -> None:
    """A step is under way: from now on there is something to lose."""
    self._stepping = True
    unfinished.keep_all()

  def _handle(self, number: int, frame: Any) -> None:
    """In the main thread, once it gets to run: does nothing more where the process is about to end."""
    self.requested = True
    while not self._stepping:
      time.sleep(1)

  def _watch(self) -> None:
    """In a thread of its own, at once."""
    while numbers := os.read(self._read, 1):
      if numbers[0] not in SIGNALS:
        continue
      self._seen += 1
      if self._seen > 1:
        os._exit(KILLED)
      name = signal.Signals(numbers[0]).name
      if self._stepping:
        os.write(2, f'\n{name}: {REQUESTED}\n'.encode())
      else:
        threading.Thread(target=_leave, args=(name,), daemon=True).start()


def _leave(name: str) -> NoReturn:
  text = f'{peers.who()}{name}: {AT_ONCE} (exit code {AGAIN})\n'
  os.write(2, ('\n' * sys.stderr.isatty() + text).encode())
  unfinished.remove_all()
  peers.leave(AGAIN)
  exit_now(AGAIN)


_installed: Interrupt | None = None


def install() -> None:
  """For a program to call when it starts: from then on to its end it answers SIGINT and SIGTERM."""
  global _installed
  _installed = Interrupt().__enter__()


@contextlib.contextmanager
def interrupts() -> Iterator[Interrupt]:
  """The program's `Interrupt`. Without one (in a notebook, which must not be ended) one whose first signal is a request."""
  if _installed is not None:
    yield _installed
    return
  with Interrupt(stepping=True) as own:
    yield own
