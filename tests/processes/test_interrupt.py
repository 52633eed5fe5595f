"""A signal before the first step ends a run at once, with nothing lost or left half-made. Later ones: tests/train/test_kill.py."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
import test_wrong_inputs
from test_wrong_inputs import Small, make_inputs, snapshot, source, tiny

from lmscale import unfinished
from lmscale.config import Config
from lmscale.train import program
from lmscale.train.workdir import open_workdir

ROOT = pathlib.Path(__file__).parents[2]
SLOW = ROOT / 'tests' / 'slow_start.py'
FLAGS = ('--config=tiny.json', '--workdir=runs/new', source('text.txt'))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  make_inputs(tmp_path)
  monkeypatch.setattr(program, 'Program', Small)
  return tmp_path


def start(*command, pause=''):
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PAUSE': pause, 'PYTHONPATH': str(ROOT)}
  return subprocess.Popen(
    [sys.executable, *map(str, command)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
  )


def free_port():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def wait_until(process, word):
  while word not in (line := process.stderr.readline()):
    assert line and process.poll() is None, line


def end(process, number):
  """(exit code, what is said after the signal); within seconds, though the process stands still for ever."""
  process.send_signal(number)
  try:
    return process.wait(30), process.stderr.read()
  finally:
    process.kill()
    process.stderr.close()


def check_told(text, name):
  assert text.startswith(f'{name}: ended before the first step') and text.count('\n') == 1, text
  assert 'run the same command again' in text and '75' in text


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_while_it_starts(folder, number):
  (folder / 'slow.py').write_text('import sys, time\nprint("HERE", file=sys.stderr, flush=True)\ntime.sleep(60)\n')
  before = snapshot(folder)
  process = start(ROOT / 'run.py', '--config=slow.py')
  wait_until(process, 'HERE')
  code, text = end(process, number)
  assert code == 75
  check_told(text, number.name)
  assert snapshot(folder) == before


@pytest.mark.parametrize('pause', ['tokenise', 'step'])
def test_while_it_tokenises_or_compiles_a_new_run(folder, pause):
  """Nothing is left of the token cache that is half made, of the folder of the run and of the folder that was made to hold it."""
  before = snapshot(folder)
  process = start(SLOW, *FLAGS, f'--config.data.cache={folder}/kept', pause=pause)
  wait_until(process, 'HERE')
  assert (folder / 'runs/new/config.json').exists() == (pause == 'step')
  assert any(p.name.startswith('tmp-') for p in folder.rglob('*')) == (pause == 'tokenise')
  code, text = end(process, signal.SIGTERM)
  assert code == 75
  check_told(text, 'SIGTERM')
  left = {path: digest for path, digest in snapshot(folder).items() if path.partition('/')[0] != 'kept'}
  assert left == before
  assert not [p for p in folder.rglob('*') if p.name.startswith('tmp-')]


def test_a_run_that_goes_on_loses_nothing(folder):
  go_on = ('--config.train.steps=6', '--config.loop.log_every=1')
  assert tiny(*go_on, '--config.train.steps=2', '--workdir=runs/new', source('text.txt')) == 0
  kept = {path: digest for path, digest in snapshot(folder / 'runs/new').items() if path.startswith(('checkpoints', 'metrics'))}
  process = start(SLOW, *FLAGS, *go_on, pause='step')
  wait_until(process, 'HERE')
  code, text = end(process, signal.SIGTERM)
  assert code == 75
  check_told(text, 'SIGTERM')
  assert kept.items() <= snapshot(folder / 'runs/new').items()
  assert tiny(*go_on, '--workdir=runs/new', source('text.txt')) == tiny(*go_on, '--workdir=whole', source('text.txt')) == 0
  fake = test_wrong_inputs.fake_program
  assert fake.lines(folder / 'runs/new') == fake.lines(folder / 'whole')


def test_what_others_put_into_the_folder_stays(folder):
  with open_workdir(folder / 'runs/new', Config()) as workdir:
    (workdir.path / 'notes.txt').write_text('mine')
    unfinished.remove_all()
    unfinished.keep_all()
  assert [str(p.relative_to(folder / 'runs')) for p in (folder / 'runs').rglob('*')] == ['new', 'new/notes.txt']


def test_of_two_processes_both_end(folder):
  """One is told to while it tokenises, the other waits for it or tokenises, too."""
  address = f'--coordinator=127.0.0.1:{free_port()}'
  both = [start(SLOW, *FLAGS, f'--config.data.cache={folder}/kept', address, '--processes=2', f'--process={i}', pause='tokenise')
          for i in (0, 1)]  # fmt: skip
  for process in both:
    wait_until(process, 'HERE')
  code, text = end(both[1], signal.SIGTERM)
  assert code == 75 and text.startswith('process 1 of 2: SIGTERM: ended before the first step'), text
  assert both[0].wait(30) == 75 and 'process 1 of 2 ended with exit code 75' in both[0].stderr.read()
  both[0].stderr.close()
  assert not [p for p in folder.rglob('*') if p.name.startswith('tmp-')] and not (folder / 'runs').exists()


HELD = """
import sys, time
from lmscale import unfinished
from lmscale.processes import interrupt
interrupt.install()
{begin}
print('HERE', file=sys.stderr, flush=True)
{work}
"""


def test_a_second_signal_ends_at_once():
  process = start('-c', HELD.format(begin='unfinished.add(lambda: time.sleep(60))', work='time.sleep(60)'))
  wait_until(process, 'HERE')
  process.send_signal(signal.SIGTERM)
  wait_until(process, 'SIGTERM: ended before')
  assert end(process, signal.SIGTERM) == (130, '')


def test_a_second_signal_ends_at_once_though_the_main_thread_is_busy():
  work = 'import ctypes; lock = ctypes.create_string_buffer(64)\nwhile True: ctypes.CDLL(None).pthread_mutex_lock(lock)'
  process = start('-c', HELD.format(begin='interrupt._installed.begin()', work=work))
  wait_until(process, 'HERE')
  process.send_signal(signal.SIGINT)
  wait_until(process, 'SIGINT: finishing the step')
  assert end(process, signal.SIGINT) == (130, '')


COMPILE = """import jax, jax.numpy as jnp
def deep(x):
  for i in range(400): x = jnp.sin(x @ x + i)
  return x
lowered = jax.jit(deep).lower(jnp.ones((8, 8)))
print('COMPILING', file=sys.stderr, flush=True)
while True: lowered.compile(); jax.clear_caches()"""


def test_while_xla_compiles():
  process = start('-c', HELD.format(begin='', work=COMPILE))
  wait_until(process, 'COMPILING')
  time.sleep(0.2)
  began = time.monotonic()
  assert end(process, signal.SIGTERM)[0] == 75
  assert time.monotonic() - began < 10  # milliseconds on a machine with nothing else to do
