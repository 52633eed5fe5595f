"""Where a run's wall time goes, over all its starts.

Every moment of a process belongs to one kind, so that the kinds sum to its wall time: `startup` until the first batch is
asked for; `compile`, wherever JAX traces or compiles; `restore`; `data_wait`, the loop waiting for a batch; `steps`, the
productive part; `evaluation`; `saving`, as long as the loop waits for it; `other`, such as sampling and plotting; and `lost`,
what was done after the checkpoint that a later start went on from and had to be done again.

goodput.json keeps the seconds of earlier starts. What a killed process did after its last line of metrics.jsonl is nowhere
on record and not counted, nor is the time between two starts.
"""

import contextlib
import json
import os
import pathlib
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax

from lmscale.train.console import duration
from lmscale.train.metrics import read_metrics
from lmscale.train.workdir import write_atomic

KINDS = ('startup', 'compile', 'restore', 'data_wait', 'steps', 'evaluation', 'saving', 'other', 'lost')
REPEATED = ('data_wait', 'steps', 'evaluation', 'saving', 'other')  # done again after a restart
T = TypeVar('T')


class Goodput:
  """The seconds of a run by kind. began: when its process started, on the clock of `time.monotonic`; default: now."""

  def __init__(self, began: float | None = None):
    self.starts = 1
    self._earlier = dict.fromkeys(KINDS, 0.0)
    self._seconds = dict.fromkeys(KINDS, 0.0)
    self._marks = dict.fromkeys(KINDS, 0.0)
    self._kind = 'startup'
    self._compiled = _Compiled()
    self._since = time.monotonic() if began is None else began

  @contextlib.contextmanager
  def spent_on(self, kind: str) -> Iterator[None]:
    """Within it, time counts as `kind`, but for compiling."""
    before = self._switch(kind)
    try:
      yield
    finally:
      self._switch(before)

  def waiting(self, items: Iterable[T]) -> Iterator[T]:
    """`items`; the time until each is there counts as data_wait."""
    iterator = iter(items)
    try:
      while True:
        with self.spent_on('data_wait'):
          try:
            item = next(iterator)
          except StopIteration:
            return
        yield item
    finally:
      if hasattr(iterator, 'close'):
        iterator.close()

  def seconds(self) -> dict[str, float]:
    """By kind, of all starts until now."""
    self._switch(self._kind)
    return {kind: self._earlier[kind] + self._seconds[kind] for kind in KINDS}

  def since_last(self, kind: str) -> float:
    """Seconds of a kind in this process since the last call for that kind."""
    self._switch(self._kind)
    now = self._seconds[kind]
    before, self._marks[kind] = self._marks[kind], now
    return now - before

  def resume(self, folder: pathlib.Path, step: int) -> None:
    """Takes over what earlier starts have left in a run's folder; this one goes on from `step`. Before lines are cut."""
    points = [(line['step'], line['seconds']) for line in read_metrics(folder / 'metrics.jsonl') if 'seconds' in line]
    if record := _read(folder / 'goodput.json'):
      points.append((record['step'], record['seconds']))
      self.starts = record['starts'] + 1
    if points:
      total = dict.fromkeys(KINDS, 0.0) | max((seconds for _, seconds in points), key=lambda s: sum(s.values()))
      kept = max((seconds for at, seconds in points if at <= step), key=lambda s: sum(s.values()), default={})
      for kind in REPEATED:
        again = max(0.0, total[kind] - kept.get(kind, 0.0))
        total[kind], total['lost'] = total[kind] - again, total['lost'] + again
      self._earlier = total
    self.record(folder, step)

  def record(self, folder: pathlib.Path, step: int) -> None:
    """Writes goodput.json: the seconds until now, when `step` steps are done and safe."""
    values = {'step': step, 'starts': self.starts, 'seconds': self.seconds()}
    write_atomic(folder / 'goodput.json', json.dumps(values) + '\n')

  def describe(self) -> str:
    """One line, the largest share first."""
    seconds = self.seconds()
    total = sum(seconds.values())
    shares = sorted(((value, kind) for kind, value in seconds.items() if value >= 0.0005 * total), reverse=True)
    times = f' in {self.starts} starts' if self.starts > 1 else ''
    parts = ', '.join(f'{kind.replace("_", " ")} {value / total:.1%}' for value, kind in shares)
    return f'goodput {seconds["steps"] / total:.1%} of {duration(total)}{times}: {parts}'

  def _switch(self, kind: str) -> str:
    now, before = time.monotonic(), self._kind
    elapsed, self._since = max(0.0, now - self._since), now
    compiled = min(elapsed, self._compiled.take())
    self._seconds[before] += elapsed - compiled
    self._seconds['compile'] += compiled
    self._kind = kind
    return before


class _Compiled:
  """Seconds in which this thread traced or compiled: JAX reports every part, and parts within parts."""

  def __init__(self) -> None:
    self._thread = threading.get_ident()
    self._parts: list[tuple[float, float]] = []
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event: str, seconds: float, **_: Any) -> None:
    if event.startswith('/jax/core/compile/') and threading.get_ident() == self._thread:
      now = time.monotonic()
      while self._parts and self._parts[-1][0] >= now - seconds:
        self._parts.pop()
      self._parts.append((now - seconds, now))

  def take(self) -> float:
    """Seconds since the last call."""
    parts, self._parts = self._parts, []
    return sum(end - begin for begin, end in parts)


def process_start() -> float:
  """When this process started, on the clock of `time.monotonic`; where the system does not tell, when this was imported."""
  try:
    ticks = int(pathlib.Path('/proc/self/stat').read_text().rpartition(')')[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf('SC_CLK_TCK')
    return time.monotonic() - max(0.0, age)
  except (OSError, AttributeError, ValueError, IndexError):
    return _IMPORTED


_IMPORTED = time.monotonic()


def _read(path: pathlib.Path) -> dict[str, Any] | None:
  """goodput.json, or None where there is none that can be used: it is an account, not a state."""
  try:
    record = json.loads(path.read_text(encoding='utf-8'))
    seconds = {kind: float(record['seconds'][kind]) for kind in KINDS}
    return {'step': int(record['step']), 'starts': int(record['starts']), 'seconds': seconds}
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return None
