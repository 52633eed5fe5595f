"""What goes wrong when processes come together, and how they end. Runs of two processes: tests/train/test_processes.py."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

import run
from lmscale import processes
from lmscale.errors import ConfigError
from lmscale.jobs.devices import count_devices
from lmscale.processes import connect

ROOT = pathlib.Path(__file__).parents[2]


def free_port():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def test_an_unreachable_coordinator_is_one_line(capsys, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  began = time.monotonic()
  monkeypatch.setattr(connect, '_hide_native_output', lambda: None)
  argv = [f'--coordinator=127.0.0.1:{free_port()}', '--processes=2', '--process=1', '--wait=0.5']
  assert run.main(argv) == 2
  err = capsys.readouterr().err
  assert err.startswith('error: 127.0.0.1:') and 'cannot be reached' in err and err.count('\n') == 1
  assert time.monotonic() - began < 10 and not list(tmp_path.iterdir())


def test_a_taken_port_is_one_line(capsys, monkeypatch):
  monkeypatch.setattr(connect, '_hide_native_output', lambda: None)
  with socket.socket() as taken:
    taken.bind(('', 0))
    taken.listen()
    assert run.main([f'--coordinator=127.0.0.1:{taken.getsockname()[1]}', '--processes=2', '--process=0']) == 2
  assert 'cannot listen on port' in capsys.readouterr().err


def test_emulated_devices_are_shared_out_equally(monkeypatch):
  monkeypatch.setattr(processes, 'count', lambda: 3)
  with pytest.raises(ConfigError, match='emulate: 8 devices cannot be shared equally by 3 processes'):
    count_devices(run.recipes.load(str(run.DEFAULT_CONFIG)))


def test_a_tpu_pod_is_left_to_jax(monkeypatch):
  calls = []
  monkeypatch.setattr(connect, '_on_tpu', lambda: True)
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *args, **kwargs: calls.append((args, kwargs)))
  processes.start(None, 77.0)
  assert [(args, kwargs['initialization_timeout']) for args, kwargs in calls] == [((), 77)]
  processes.start(None, 77.0, tpu=False)
  assert len(calls) == 1 and processes.count() == 1 and processes.finish(3) == 3


def start_python(code, **environ):
  environ = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', **environ}
  return subprocess.Popen([sys.executable, '-c', code], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_process_0_does_not_wait_forever_for_the_others():
  code = 'import run, sys; sys.exit(run.main(sys.argv[1:]))'
  address = f'127.0.0.1:{free_port()}'
  argv = [sys.executable, '-c', code, f'--coordinator={address}', '--processes=2', '--process=0', '--wait=2']
  done = subprocess.run(argv, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
  assert done.returncode == 2, done.stderr
  assert f'not all of 2 processes came to {address} within 2 seconds' in done.stderr


def test_an_abort_of_our_own_stays_one():
  """Only an abort that comes with a lost process is turned into the code for running again."""
  code = (
    'import os, threading\nfrom lmscale.processes import exits\n'
    'exits.exit_on_abort(lambda: {answer})\n'
    'threading.Thread(target=os.abort).start()\nimport time; time.sleep(20)'
  )
  own, lost = start_python(code.format(answer=None)), start_python(code.format(answer="(75, 'gone')"))
  assert own.wait(60) == -signal.SIGABRT
  assert lost.communicate(timeout=60)[1] == '\ngone\n' and lost.returncode == 75


@pytest.mark.parametrize(
  ('text', 'lost'),
  [
    ('UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:4', True),
    ('INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 1 heartbeat timeout', True),
    ('INTERNAL: NCCL operation ncclAllReduce failed: remote process exited or there was a network error', True),
    ('RESOURCE_EXHAUSTED: Out of memory allocating 2048 bytes', False),
    ('INVALID_ARGUMENT: shapes differ', False),
  ],
)
def test_which_errors_mean_a_lost_process(text, lost):
  error = ConfigError('a checkpoint could not be saved')
  error.__cause__ = jax.errors.JaxRuntimeError(text)
  assert processes.is_lost(error) == lost
  assert not processes.is_lost(ValueError(text))
