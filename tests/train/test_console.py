"""Lines without a terminal, a bar with one, and streams that cannot say everything."""

import contextlib
import io
import pty
import termios

import pytest

from lmscale.train.console import Console, duration, printable, quantity


class Stream(io.TextIOWrapper):
  def __init__(self, encoding='utf-8', tty=False):
    super().__init__(io.BytesIO(), encoding=encoding)
    self._tty = tty

  def isatty(self):
    return self._tty

  def text(self):
    self.flush()
    return self.buffer.getvalue().decode(self.encoding)


def read_all(terminal):
  """What was written to a terminal whose other end is closed; the kernel hands it over in pieces."""
  data = b''
  with open(terminal, 'rb', buffering=0) as stream, contextlib.suppress(OSError):  # Linux says EIO at the end
    while piece := stream.read(4096):
      data += piece
  return data


METRICS = {'loss': 2.34567, 'grad_norm': 0.8123, 'learning_rate': 0.001}


def test_plain_lines_carry_everything_but_not_too_often():
  stream = Stream()
  with Console(1000, 0, flops_per_token=6e6, peak_flops=1e12, stream=stream, every=3600) as console:
    console.step(1, METRICS, None, None)
    for step in range(2, 1001):
      console.step(step, METRICS, 12345.0, 187.0)
  lines = stream.text().splitlines()
  assert lines[0] == 'step 1/1000  loss 2.3457  grad 0.812  lr 0.001'
  assert lines[1:] == [
    'step 1000/1000  loss 2.3457  12.3 ktok/s  74.1 GFLOP/s  MFU 7.4%  ETA 3:07  grad 0.812  lr 0.001'
  ]


@pytest.mark.parametrize('encoding', ['utf-8', 'ascii'])
def test_terminal_gets_a_bar_and_messages_above_it(encoding, monkeypatch):
  monkeypatch.setenv('NO_COLOR', '1')
  stream = Stream(encoding, tty=True)
  with Console(10, 4, 6e6, None, stream=stream) as console:
    console.step(7, METRICS, 12345.0, 3.0)
    console.say('caf\u00e9 \u2713')
  text = stream.text()
  assert '7/10' in text and 'loss 2.3457' in text and 'MFU' not in text
  assert ('caf\u00e9 \u2713' if encoding == 'utf-8' else 'caf\\xe9 \\u2713') in text
  assert '\x1b[3' not in text  # no colours


@pytest.mark.parametrize('columns', [80, 120])
def test_every_number_is_seen_on_a_terminal_of_80_columns(columns):
  ours, theirs = pty.openpty()
  termios.tcsetwinsize(theirs, (24, columns))
  with open(theirs, 'w', encoding='utf-8') as stream, Console(160, 0, 6e6, None, stream=stream) as console:
    console.step(160, METRICS | {'learning_rate': 0.00177}, 12345.0, 187.0)
  line = read_all(ours).decode().splitlines()[-1].split('\r')[-1]
  for part in ('160/160', 'loss 2.3457', '12.3 ktok/s', '74.1 GFLOP/s', 'ETA 3:07', 'grad 0.812', 'lr 0.00177 |█'):
    assert part in line
  assert len(line) <= columns


def test_non_finite_numbers_are_shown():
  stream = Stream()
  with Console(2, 0, 1.0, None, stream=stream) as console:
    console.step(1, METRICS | {'loss': float('nan')}, None, None)
  assert 'loss nan' in stream.text()


def test_control_characters_are_escaped():
  assert printable('a\tb\n\x1b[31m\r\u009b caf\u00e9') == 'a\tb\n\\x1b[31m\\r\\x9b caf\u00e9'


def test_quantities_and_durations():
  got = [quantity(x) for x in (0, 7.5, 999.0, 1000.0, 1234567, 9.89e14)]
  assert got == ['0 ', '7.5 ', '999 ', '1 k', '1.23 M', '989 T']
  assert [duration(x) for x in (0, 45.4, 187, 7500, 273600)] == ['0s', '45s', '3:07', '2:05:00', '3d 04:00']
