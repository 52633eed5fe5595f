"""How processes find each other, and what goes wrong. Runs of two processes: tests/train/test_processes.py."""

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
from lmscale.errors import ConfigError
from lmscale.parallel import distributed
from lmscale.parallel.cluster import Cluster, find_cluster

ROOT = pathlib.Path(__file__).parents[2]
SLURM = {
  'SLURM_JOB_ID': '70001', 'SLURM_STEP_NODELIST': 'node[007-008,020],login1', 'SLURM_STEP_NUM_TASKS': '4',
  'SLURM_PROCID': '3', 'SLURM_LOCALID': '1', 'SLURM_NODEID': '1', 'SLURM_STEP_TASKS_PER_NODE': '2(x2)',
}  # fmt: skip
ENVIRONMENT = {'JAX_COORDINATOR_ADDRESS': 'host:1234', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '1'}


def flags(coordinator=None, processes=None, process=None):
  return {'coordinator': coordinator, 'processes': processes, 'process': process, 'job': 'train'}


@pytest.mark.parametrize(
  ('given', 'environ', 'found'),
  [
    (flags(), {}, None),
    (flags('h:1', 2, 1), {**ENVIRONMENT, **SLURM}, Cluster('h:1', 2, 1)),  # flags come first
    (flags('[::1]:80', 2, 0), {}, Cluster('[::1]:80', 2, 0)),
    (flags('h:1', 1, 0), {}, None),
    (flags(), {**ENVIRONMENT, **SLURM}, Cluster('host:1234', 2, 1)),  # then variables
    (flags(), {'COORDINATOR_ADDRESS': 'h:1', 'NUM_PROCESSES': '3', 'PROCESS_ID': '0'}, Cluster('h:1', 3, 0)),
    (flags(), {'COORDINATOR_ADDRESS': 'h:1', 'NUM_PROCESSES': '3', 'JOB_COMPLETION_INDEX': '2'}, Cluster('h:1', 3, 2)),
    (flags(), {'JOB_COMPLETION_INDEX': '2'}, None),  # any Indexed Job
  ],
)
def test_flags_and_variables(given, environ, found):
  assert find_cluster(given, environ) == found


@pytest.mark.parametrize(
  ('change', 'found'),
  [
    ({}, Cluster('node007:61809', 4, 3)),
    ({'CUDA_VISIBLE_DEVICES': '0,1'}, Cluster('node007:61809', 4, 3, (1,))),  # two tasks share a node's devices
    ({'CUDA_VISIBLE_DEVICES': '1'}, Cluster('node007:61809', 4, 3)),  # Slurm has shared them out
    ({'CUDA_VISIBLE_DEVICES': '0,1', 'SLURM_STEP_TASKS_PER_NODE': '3,1'}, Cluster('node007:61809', 4, 3)),
    ({'SLURM_STEP_NODELIST': 'a1,b2'}, Cluster('a1:61809', 4, 3)),
    ({'SLURM_STEP_NODELIST': 'gpu-4'}, Cluster('gpu-4:61809', 4, 3)),
    ({'SLURM_STEP_NODELIST': 'n[1,3-4]'}, Cluster('n1:61809', 4, 3)),
    ({'JAX_COORDINATOR_PORT': '99'}, Cluster('node007:99', 4, 3)),
    ({'SLURM_STEP_NUM_TASKS': '1'}, None),
    ({'SLURM_STEP_NODELIST': ''}, None),  # in the batch script, outside of srun
  ],
)
def test_slurm(change, found):
  assert find_cluster(flags(), {**SLURM, **change}) == found


@pytest.mark.parametrize(
  ('given', 'environ', 'words'),
  [
    (flags('h:1'), {}, ['--coordinator=h:1', 'without --processes and --process']),
    (flags(processes=2, process=1), {}, ['--processes=2', 'without --coordinator']),
    (flags('h:1', 2, 2), {}, ['--process: 2', '0..1']),
    (flags('h:1', 0, 0), {}, ['--processes: 0']),
    (flags('h', 2, 0), {}, ['--coordinator', "'h'", 'HOST:PORT']),
    (flags(), {'JAX_COORDINATOR_ADDRESS': 'h:1'}, ['without JAX_NUM_PROCESSES and JAX_PROCESS_ID']),
    (flags(), {'NUM_PROCESSES': '2', 'PROCESS_ID': '0'}, ['NUM_PROCESSES=2', 'without JAX_COORDINATOR_ADDRESS']),
    (flags(), {**ENVIRONMENT, 'JAX_NUM_PROCESSES': 'two'}, ['JAX_NUM_PROCESSES', "'two'"]),
    (flags(), {**SLURM, 'SLURM_PROCID': 'x'}, ['SLURM_PROCID', "'x'"]),
  ],
)
def test_half_given_settings(given, environ, words):
  with pytest.raises(ConfigError) as caught:
    find_cluster(given, environ)
  for word in words:
    assert word in str(caught.value)


def free_port():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def test_an_unreachable_coordinator_is_one_line(capsys, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  began = time.monotonic()
  monkeypatch.setattr(distributed, '_hide_native_output', lambda: None)
  argv = [f'--coordinator=127.0.0.1:{free_port()}', '--processes=2', '--process=1', '--wait=0.5']
  assert run.main(argv) == 2
  err = capsys.readouterr().err
  assert err.startswith('error: 127.0.0.1:') and 'cannot be reached' in err and err.count('\n') == 1
  assert time.monotonic() - began < 10 and not list(tmp_path.iterdir())


def test_a_taken_port_is_one_line(capsys, monkeypatch):
  monkeypatch.setattr(distributed, '_hide_native_output', lambda: None)
  with socket.socket() as taken:
    taken.bind(('', 0))
    taken.listen()
    assert run.main([f'--coordinator=127.0.0.1:{taken.getsockname()[1]}', '--processes=2', '--process=0']) == 2
  assert 'cannot listen on port' in capsys.readouterr().err


def test_emulated_devices_are_shared_out_equally(monkeypatch):
  monkeypatch.setattr(distributed, 'count', lambda: 3)
  with pytest.raises(ConfigError, match='emulate: 8 devices cannot be shared equally by 3 processes'):
    run.count_devices(run.recipes.load(str(run.DEFAULT_CONFIG)))


def test_a_tpu_pod_is_left_to_jax(monkeypatch):
  calls = []
  monkeypatch.setattr(distributed, '_on_tpu', lambda: True)
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *args, **kwargs: calls.append((args, kwargs)))
  distributed.start(None, 77.0)
  assert [(args, kwargs['initialization_timeout']) for args, kwargs in calls] == [((), 77)]
  distributed.start(None, 77.0, tpu=False)
  assert len(calls) == 1 and distributed.peers() is None and distributed.finish(3) == 3


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
    'import os, threading\nfrom lmscale.parallel import distributed\n'
    'distributed._exit_on_abort(lambda: {answer})\n'
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
  assert distributed.is_lost(error) == lost
  assert not distributed.is_lost(ValueError(text))
