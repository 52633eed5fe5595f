"""Ending a process at once, from any thread, and turning an abort into an exit code."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from lmscale import unfinished


def exit_now(code: int, text: str = '') -> NoReturn:
  """Ends the process from any thread, without what is half made."""
  unfinished.remove_all()
  with contextlib.suppress(Exception):
    sys.stdout.flush()
    sys.stderr.flush()
  if text:
    os.write(2, f'\n{text}\n'.encode())
  os._exit(code)


_handler: Any = None  # ctypes does not keep it alive


def exit_on_abort(explain: Callable[[], tuple[int, str] | None]) -> None:
  """Has SIGABRT, from whichever thread, end the process with the exit code and message of `explain`, unless it is None.

  JAX's client aborts the process when the coordination service reports an error. Python's own signal handlers wait for
  the main thread, which may be stuck in a collective.
  """
  global _handler

  def on_abort(number: int) -> None:
    if (answer := explain()) is not None:
      exit_now(*answer)

  _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
  libc = ctypes.CDLL(None)
  libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
  libc.signal(signal.SIGABRT, _handler)
