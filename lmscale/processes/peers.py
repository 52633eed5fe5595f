"""What the processes of a run tell each other, and what happens when one is lost.

They share the small key-value store of JAX's coordination service, which lives in process 0. A thread
in each waits there for notices: that a process was told to stop, so that all save after the same step; or that one has
failed, so that all end with its exit code. A process that disappears, or freezes, is noticed by a collective that fails or
by its heartbeat; JAX then aborts the process, which is turned into exit code 75: run me again.
"""

import concurrent.futures
import contextlib
import itertools
import json
import re
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

from lmscale.exit_codes import AGAIN, TOGETHER
from lmscale.processes.exits import exit_now, exit_on_abort

GOODBYE = 5.0  # seconds that a process which fails waits for the others to have heard it
FOREVER = 10**8  # milliseconds
# What the errors of collectives, and of Orbax's barriers, have in common when another process is gone.
LOST = re.compile(
  r'gloo|nccl|connection (closed|reset)|remote process|socket closed|coordination|heartbeat|barrier|unavailable', re.IGNORECASE
)


class Peers:
  """This process among the others. There is at most one, made by `join`."""

  def __init__(self, processes: int, process: int):
    from jax._src import distributed  # where Orbax finds the client, too; JAX has no public name for it

    self.processes, self.process = processes, process
    self.code: int | None = None  # of the exit that is under way
    self._client = distributed.global_state.client
    self._lock = threading.Lock()
    self._done, self._stop_at, self._asked = 0, None, False
    self._calls = concurrent.futures.ThreadPoolExecutor(1)
    self._counter = itertools.count()
    exit_on_abort(self._on_abort)
    self._thread = threading.Thread(target=self._listen, name='peers', daemon=True)
    self._thread.start()

  def share(self, name: str, value: Any) -> Any:
    """Process 0's `value` (JSON), on every process."""
    if self.process == 0:
      self._client.key_value_set(f'lmscale/{name}', json.dumps(value))
      return value
    return json.loads(self._client.blocking_key_value_get(f'lmscale/{name}', FOREVER))

  def barrier(self, name: str, seconds: float = FOREVER / 1000) -> None:
    """Returns when every process is here. Each name once."""
    self._client.wait_at_barrier(f'lmscale/{name}', int(1000 * seconds))

  def stop_after(self, done: int, requested: bool) -> bool:
    """Whether all processes stop at the moment `done`, since one of them was requested to. All ask at the same moments, counted."""
    if requested and not self._asked:
      self._asked = True
      self._post({'stop': self.process})
    with self._lock:
      self._done = done
      return self._stop_at is not None and done >= self._stop_at

  def fail(self, code: int) -> NoReturn:
    """Ends this process, which has said why, and with the same exit code all others."""
    self.code = code
    with contextlib.suppress(Exception):
      self._post({'failed': self.process, 'code': code})
      self.barrier('failed', GOODBYE)
    exit_now(code)

  def lost(self, why: str) -> NoReturn:
    """Ends this process because another one is gone."""
    self.code = AGAIN
    exit_now(AGAIN, _lost_text(self.process, self.processes, why))

  def close(self) -> None:
    """Waits for the others, which are about to end as this one, and disconnects."""
    import jax

    self.barrier('end')
    if self.process == 0:
      self._post({'end': True})
    self._thread.join()
    jax.distributed.shutdown()

  def _post(self, notice: dict[str, Any]) -> None:
    for i in self._counter:
      try:
        self._client.key_value_set(f'lmscale/notice/{i}', json.dumps(notice))
        return
      except RuntimeError as error:
        if 'ALREADY_EXISTS' not in str(error):
          raise

  def _listen(self) -> None:
    for i in itertools.count():
      try:
        notice = json.loads(self._client.blocking_key_value_get(f'lmscale/notice/{i}', FOREVER))
        if 'end' in notice:
          return
        if 'stop' in notice and self._stop_at is None:
          self._agree()
      except RuntimeError:
        return  # the connection is gone: `_on_abort` follows
      if 'failed' in notice and self.code is None:
        self.code = notice['code']
        with contextlib.suppress(Exception):
          self.barrier('failed', GOODBYE)
        text = f'process {notice["failed"]} of {self.processes} ended with exit code {self.code}; it says why'
        exit_now(self.code, text if self.process == 0 else '')

  def _agree(self) -> None:
    """Settles the moment at which all stop: no process has got there yet, since nobody gets on meanwhile."""
    with self._lock:
      self._client.key_value_set(f'lmscale/done/{self.process}', str(self._done))
      self.barrier('stop')
      self._stop_at = 1 + max(int(value) for _, value in self._client.key_value_dir_get('lmscale/done/'))

  def _on_abort(self) -> tuple[int, str] | None:
    """Of a SIGABRT: (exit code, message) if it came because a process was lost; None if it is an abort of our own."""
    if self.code is not None:
      return self.code, ''
    try:
      self._calls.submit(self._client.key_value_try_get, 'lmscale/nothing').result(0.5)
    except concurrent.futures.TimeoutError:
      why = 'no heartbeat'  # JAX aborts with its client locked
    except RuntimeError as error:
      if 'NOT_FOUND' in str(error):
        return None
      why = 'no heartbeat'
    return AGAIN, _lost_text(self.process, self.processes, why)


_peers: Peers | None = None


def join(processes: int, process: int) -> None:
  """Makes this one of several processes, which JAX has connected."""
  global _peers
  _peers = Peers(processes, process)


def is_first() -> bool:
  """Whether this process prints and writes for all."""
  return _peers is None or _peers.process == 0


def count() -> int:
  """Processes of the run."""
  return 1 if _peers is None else _peers.processes


def wait_for_all(name: str) -> None:
  """Returns when every process is here. Each name once."""
  if _peers is not None:
    _peers.barrier(name)


def share(name: str, value: Any) -> Any:
  """Process 0's `value` (JSON), on every process. Each name once."""
  return value if _peers is None else _peers.share(name, value)


def stop_after(done: int, requested: bool) -> bool:
  """Whether to stop at the moment `done`: if that is requested, here or of another process, which then stops there, too."""
  return requested if _peers is None else _peers.stop_after(done, requested)


def who() -> str:
  """`process 3 of 8: ` to begin a message with; empty in a run of one process and on process 0."""
  return '' if is_first() else f'process {_peers.process} of {_peers.processes}: '


def is_lost(error: BaseException | None) -> bool:
  """Whether an error, or what caused it, says that another process is gone."""
  while error is not None:
    if isinstance(error, RuntimeError) and LOST.search(str(error)):
      return True
    error = error.__cause__ or error.__context__
  return False


@contextlib.contextmanager
def watching() -> Iterator[None]:
  """Within it, an error that came because another process is gone ends this one with AGAIN."""
  try:
    yield
  except Exception as error:
    if _peers is not None and is_lost(error):
      _peers.lost(f'{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}')
    raise


def leave(code: int) -> None:
  """Ends this process at once where it is one of several, and with the same exit code all others."""
  if _peers is not None:
    _peers.fail(code)


def finish(code: int) -> int:
  """To be called last: `code`. The other processes end with it, too: together if the loop has ended, else at once."""
  if _peers is None:
    return code
  if code not in TOGETHER:
    _peers.fail(code)
  _peers.close()
  return code


def _lost_text(process: int, processes: int, why: str) -> str:
  return (
    f'process {process} of {processes}: another process of this run is gone ({why}); checkpoints are whole: run the same '
    f'command again to go on (exit code {AGAIN})'
  )
