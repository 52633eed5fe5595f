"""What a person sees while a run trains: a progress bar on a terminal, plain lines elsewhere. No colours, only text."""

import math
import sys
import time
from typing import Any, Self, TextIO

import tqdm

from lmscale import processes


class Console:
  """Progress and messages on `stream` (standard error by default); a context manager.

  flops_per_token: forward and backward, for the model FLOP/s. peak_flops: of all devices together, for the MFU, or None.
  every: seconds between lines where `stream` is no terminal.
  """

  def __init__(
    self,
    steps: int,
    start: int,
    flops_per_token: float,
    peak_flops: float | None,
    stream: TextIO | None = None,
    every: float = 10.0,
  ):
    self._stream = stream or sys.stderr
    self._flops, self._peak, self._every = flops_per_token, peak_flops, every
    self._steps, self._start, self._said = steps, start, -math.inf
    self._bar = None
    if self._stream.isatty():
      style = '{n_fmt}/{total_fmt} {desc} |{bar}|'  # the bar takes what the numbers leave of the line
      self._bar = tqdm.tqdm(
        total=steps, initial=start, file=self._stream, dynamic_ncols=True, bar_format=style, ascii=not self._unicode()
      )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error: object) -> None:
    self.end()

  def end(self) -> None:
    """Leaves the bar as it is; messages go below it."""
    if self._bar is not None:
      self._bar.close()
      self._bar = None

  def step(self, step: int, metrics: dict[str, Any], rate: float | None, seconds_left: float | None) -> None:
    """Shows that `step` steps are done. rate: tokens/s, and the time left, None while only compilation was timed."""
    parts = [f'loss {metrics["loss"]:.4f}']
    if rate:
      parts += [f'{quantity(rate)}tok/s', f'{quantity(rate * self._flops)}FLOP/s']
      parts += [f'MFU {100 * rate * self._flops / self._peak:.1f}%'] if self._peak else []
    parts += [f'ETA {duration(seconds_left)}'] if seconds_left is not None else []
    parts += [f'grad {metrics["grad_norm"]:.3g}', f'lr {metrics["learning_rate"]:.3g}']
    if self._bar is not None:
      self._bar.set_description_str(' '.join(parts), refresh=False)
      self._bar.update(step - self._bar.n)
      return
    now = time.monotonic()
    if now - self._said >= self._every or step in (self._start + 1, self._steps):
      self._said = now
      self.say(f'step {step}/{self._steps}  ' + '  '.join(parts))

  def say(self, text: str) -> None:
    """Prints a message above the bar. Characters that the stream cannot encode are escaped, as control characters."""
    encoding = getattr(self._stream, 'encoding', None) or 'utf-8'
    text = printable(text).encode(encoding, 'backslashreplace').decode(encoding)
    if self._bar is not None:
      self._bar.write(text, file=self._stream)
    else:
      print(text, file=self._stream, flush=True)

  def _unicode(self) -> bool:
    return (getattr(self._stream, 'encoding', None) or '').lower().replace('-', '') == 'utf8'


def printable(text: str) -> str:
  """`text` with control characters but newline and tab escaped: what a model samples may move a terminal's cursor."""
  return ''.join(c if c.isprintable() or c in '\n\t' else c.encode('unicode_escape').decode() for c in text)


def quantity(value: float) -> str:
  """A number to three digits with an SI prefix: 1234567 -> `1.23 M`."""
  prefixes = ' kMGTPEZ'
  if not value or not math.isfinite(value):
    return f'{value:g} '
  power = max(0, min(len(prefixes) - 1, math.floor(math.log10(abs(value)) / 3 + 1e-12)))
  return f'{value / 1000**power:.3g} {prefixes[power].strip()}'


def duration(seconds: float) -> str:
  """Seconds as `45s`, `3:07`, `2:05:00` or `3d 04:00`."""
  whole = max(0, round(seconds))
  minutes, hours, days = whole // 60 % 60, whole // 3600 % 24, whole // 86400
  if days:
    return f'{days}d {hours:02}:{minutes:02}'
  if whole >= 3600:
    return f'{hours}:{minutes:02}:{whole % 60:02}'
  return f'{minutes}:{whole % 60:02}' if minutes else f'{whole}s'


def say(text: str, file: TextIO | None = None) -> None:
  """Prints, in one of the run's processes."""
  if processes.is_first():
    print(printable(text), file=file, flush=True)
