import gc
import threading
import time

import pytest

from lmscale.data.prefetch import prefetch


def running():
  return [thread for thread in threading.enumerate() if thread.name == 'prefetch']


def test_same_items_in_order():
  assert list(prefetch(range(100), depth=3)) == list(range(100))
  assert list(prefetch([])) == []
  assert list(prefetch([None, 1])) == [None, 1]
  assert not running()


def test_runs_ahead_but_not_further_than_depth():
  made = []

  def items():
    for i in range(100):
      made.append(i)
      yield i

  ahead = prefetch(items(), depth=2)
  assert next(ahead) == 0
  deadline = time.time() + 5
  while len(made) < 4 and time.time() < deadline:
    time.sleep(0.01)
  time.sleep(0.05)
  assert len(made) == 4  # one taken, two waiting, one in hand
  ahead.close()


def test_exceptions_come_out_at_their_place():
  def items():
    yield 1
    raise KeyError('broken')

  ahead = prefetch(items())
  assert next(ahead) == 1
  with pytest.raises(KeyError, match='broken'):
    next(ahead)
  assert not running()


def test_closing_stops_the_thread_and_closes_the_source():
  closed = []

  class Items:
    def __iter__(self):
      return self

    def __next__(self):
      return 0

    def close(self):
      closed.append(True)

  ahead = prefetch(Items())
  next(ahead)
  ahead.close()
  assert closed == [True] and not running()
  dropped = prefetch(Items())
  next(dropped)
  del dropped
  gc.collect()
  assert closed == [True, True] and not running()
