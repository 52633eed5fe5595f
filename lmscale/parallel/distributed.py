"""Runs of several processes: what they tell each other, and what happens when one is lost.

They share the small key-value store of JAX's coordination service, which lives in process 0. A thread
in each waits there for notices: that a process was told to stop, so that all save after the same step; or that one has
failed, so that all end with its exit code. A process that disappears, or freezes, is noticed by a collective that fails or
by its heartbeat; JAX then aborts the process, which is turned into exit code 75: run me again.
"""

import concurrent.futures
import contextlib
import ctypes
import glob
import importlib.util
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from lmscale.errors import ConfigError
from lmscale.parallel.cluster import Cluster

PEER_LOST = 75  # exit code: run the same command again, on the same or another number of processes
USER_ERROR = 2
TOGETHER = (0, 3, 75)  # exit codes that all processes come to by themselves
WAIT = 300.0  # seconds that processes may start after each other
HEARTBEAT = 6  # seconds without one after which a process counts as lost
GOODBYE = 5.0  # seconds that a process which fails waits for the others to have heard it
FOREVER = 10**8  # milliseconds
# What the errors of collectives, and of Orbax's barriers, have in common when another process is gone.
LOST = re.compile(
  r'gloo|nccl|connection (closed|reset)|remote process|socket closed|coordination|heartbeat|barrier|unavailable', re.IGNORECASE
)


def start(cluster: Cluster | None, wait: float = WAIT, tpu: bool = True) -> None:
  """Connects this process with the others; to be called before JAX is asked for devices.

  cluster: as `find_cluster` gives it. wait: seconds. tpu: whether, without a cluster, a Cloud TPU is looked for.

  Raises:
    ConfigError: process 0 cannot be reached, or its port is taken. Where some of the others do not come in time, the
    process ends with exit code 2.
  """
  global _peers
  import jax  # not before a command line was understood

  options = {'heartbeat_timeout_seconds': HEARTBEAT, 'shutdown_timeout_seconds': 60}
  jax.config.update('jax_enable_preemption_service', False)  # it would take SIGTERM away from the loop
  if cluster is None:
    if not (tpu and _on_tpu()):
      return
    jax.distributed.initialize(initialization_timeout=int(wait), **options)
    if jax.process_count() > 1:
      _peers = Peers(jax.process_count(), jax.process_index())
    return
  _hide_native_output()
  deadline = time.monotonic() + wait
  (_check_port if cluster.process == 0 else _wait_for)(cluster.coordinator, deadline)
  left = max(1, int(deadline - time.monotonic()))
  state = f'not all of {cluster.processes} processes came to {cluster.coordinator} within {wait:.0f} seconds'
  _exit_on_abort(lambda: (USER_ERROR, f'error: {_who(cluster)}{state}; start every process, or raise --wait'))
  try:
    jax.distributed.initialize(
      cluster.coordinator, cluster.processes, cluster.process, cluster.local_devices,
      cluster_detection_method='deactivate', initialization_timeout=left, **options,
    )  # fmt: skip
  except RuntimeError as error:
    raise ConfigError(f'{cluster.coordinator}: {state} ({str(error).splitlines()[0]})') from error
  _peers = Peers(cluster.processes, cluster.process)


def _on_tpu() -> bool:
  return bool(importlib.util.find_spec('libtpu') and (glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*')))


def _hide_native_output() -> None:
  """Leaves standard output to Python: Gloo, between CPU devices, prints every connection that it makes there."""
  sys.stdout.flush()
  sys.stdout = open(os.dup(1), 'w', buffering=1, encoding=sys.stdout.encoding, errors='backslashreplace')  # noqa: SIM115
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 1)
  os.close(nowhere)


def _check_port(coordinator: str, deadline: float) -> None:
  port = int(coordinator.rpartition(':')[2])
  with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind(('', port))
    except (OSError, OverflowError) as error:
      raise ConfigError(f'{coordinator}: process 0 cannot listen on port {port} ({error}); choose another') from error


def _wait_for(coordinator: str, deadline: float) -> None:
  """Returns once something listens at `host:port`."""
  host, _, port = coordinator.rpartition(':')
  while True:
    try:
      socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
      return
    except (OSError, OverflowError) as error:
      if time.monotonic() > deadline:
        raise ConfigError(
          f'{coordinator}: process 0 cannot be reached ({error}); start it, check the address, or raise --wait'
        ) from error
    time.sleep(0.2)


class Peers:
  """This process among the others. There is at most one, made by `start`."""

  def __init__(self, processes: int, process: int):
    from jax._src import distributed  # where Orbax finds the client, too; JAX has no public name for it

    self.processes, self.process = processes, process
    self.code: int | None = None  # of the exit that is under way
    self._client = distributed.global_state.client
    self._lock = threading.Lock()
    self._done, self._stop_at, self._asked = 0, None, False
    self._calls = concurrent.futures.ThreadPoolExecutor(1)
    self._counter = itertools.count()
    _exit_on_abort(self._on_abort)
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
    """Whether all processes stop after `done` steps, since one of them was requested to. To be asked at every step."""
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
    _exit(code)

  def lost(self, why: str) -> NoReturn:
    """Ends this process because another one is gone."""
    self.code = PEER_LOST
    _exit(PEER_LOST, _lost_text(self.process, self.processes, why))

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
        _exit(self.code, text if self.process == 0 else '')

  def _agree(self) -> None:
    """Settles the step after which all stop: no process has got there yet, since nobody gets on meanwhile."""
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
    return PEER_LOST, _lost_text(self.process, self.processes, why)


_peers: Peers | None = None


def peers() -> Peers | None:
  """The other processes; None in a run of one."""
  return _peers


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
  """Whether to stop after `done` steps: if that is requested, here or of another process, which then stops there, too."""
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
  """Within it, an error that came because another process is gone ends this one with PEER_LOST."""
  try:
    yield
  except Exception as error:
    if _peers is not None and is_lost(error):
      _peers.lost(f'{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}')
    raise


def finish(code: int) -> int:
  """To be called last: `code`. The other processes end with it, too: together if the loop has ended, else at once."""
  if _peers is None:
    return code
  if code not in TOGETHER:
    _peers.fail(code)
  _peers.close()
  return code


def _who(cluster: Cluster) -> str:
  return f'process {cluster.process} of {cluster.processes}: ' if cluster.process else ''


def _lost_text(process: int, processes: int, why: str) -> str:
  return (
    f'process {process} of {processes}: another process of this run is gone ({why}); checkpoints are whole: run the same '
    f'command again to go on (exit code {PEER_LOST})'
  )


def _exit(code: int, text: str = '') -> NoReturn:
  """Ends the process from any thread."""
  with contextlib.suppress(Exception):
    sys.stdout.flush()
    sys.stderr.flush()
  if text:
    os.write(2, f'\n{text}\n'.encode())
  os._exit(code)


_handler: Any = None  # ctypes does not keep it alive


def _exit_on_abort(explain: Callable[[], tuple[int, str] | None]) -> None:
  """Has SIGABRT, from whichever thread, end the process with the exit code and message of `explain`, unless it is None.

  JAX's client aborts the process when the coordination service reports an error. Python's own signal handlers wait for
  the main thread, which may be stuck in a collective.
  """
  global _handler

  def on_abort(number: int) -> None:
    if (answer := explain()) is not None:
      _exit(*answer)

  _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
  libc = ctypes.CDLL(None)
  libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
  libc.signal(signal.SIGABRT, _handler)
