"""Make batches in a thread while the device computes."""

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar('T')
POLL = 0.1  # seconds between looks at whether the consumer is gone


def prefetch(items: Iterable[T], depth: int = 4) -> Iterator[T]:
  """Yields `items` in order, computed in a thread up to `depth` ahead, from the first `next` on.

  An exception of `items` is raised in the consumer at its place. Closing the generator (or dropping it) stops the
  thread and closes `items` before it returns.
  """
  ready: queue.Queue[tuple[bool, object]] = queue.Queue(depth)
  stop = threading.Event()

  def put(entry: tuple[bool, object]) -> None:
    while not stop.is_set():
      with contextlib.suppress(queue.Full):
        ready.put(entry, timeout=POLL)
        return

  def work() -> None:
    source = iter(items)
    try:
      for item in source:
        put((True, item))
        if stop.is_set():
          break
      put((False, None))
    except BaseException as error:  # noqa: BLE001 - the consumer's to handle
      put((False, error))
    finally:
      if hasattr(source, 'close'):
        source.close()

  thread = threading.Thread(target=work, name='prefetch', daemon=True)
  thread.start()
  try:
    while True:
      more, item = ready.get()
      if not more:
        if item is not None:
          raise item
        return
      yield item
  finally:
    stop.set()
    thread.join()
