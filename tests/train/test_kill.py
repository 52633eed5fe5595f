"""A process killed with SIGKILL at any moment, also while it saves, costs nothing but time.

Most kills hit a program of milliseconds; one test kills run.py itself.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from fake_program import lines, stored

from lmscale import config as config_lib
from lmscale.train.checkpoint import Checkpointer
from lmscale.train.program import Program

SCRIPT = pathlib.Path(__file__).with_name('fake_program.py')
FIELDS = ('loop.checkpoint_every=2', 'train.steps=40', 'delay=0.02')


def start(folder, *fields):
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(SCRIPT.parents[2])}
  return subprocess.Popen(
    [sys.executable, str(SCRIPT), str(folder), *fields], env=environment, stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE, text=True
  )  # fmt: skip


def finish(folder, *fields):
  process = start(folder, *fields)
  err = process.communicate(timeout=120)[1]
  return process.returncode, err


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp('whole')
  code, err = finish(folder, *FIELDS)
  assert code == 0, err
  return folder


def kill_at_random(folder, rng):
  """Kills a run a random while after a random event: a new line in the log, or a checkpoint being written."""
  process = start(folder, *FIELDS)
  log, writing = folder / 'metrics.jsonl', rng.random() < 0.6
  begun, first = time.monotonic(), None
  while process.poll() is None and time.monotonic() - begun < 60:
    size = log.stat().st_size if log.exists() else 0
    first = size if first is None else first
    if any('tmp' in p.name for p in (folder / 'checkpoints').glob('*')) if writing else size > first:
      time.sleep(rng.choice([0, rng.uniform(0, 0.03), rng.uniform(0, 0.5)]))
      break
  process.send_signal(signal.SIGKILL)
  process.communicate()
  return process.returncode


def check_kills(folder, whole, kills, seed):
  rng, codes = random.Random(seed), []
  while len(codes) < kills:
    codes.append(kill_at_random(folder, rng))
    if codes[-1] == 0:
      break
  assert codes.count(-signal.SIGKILL) >= min(2, kills)  # it was killed, and had not finished before
  code, err = finish(folder, *FIELDS)
  assert code == 0, err
  assert 'DAMAGED' not in err
  assert stored(folder) == stored(whole)
  assert lines(folder) == lines(whole)
  assert not list((folder / 'checkpoints').glob('*.orbax-checkpoint-tmp*'))


def test_killed_and_resumed_is_the_same_run(tmp_path, whole):
  check_kills(tmp_path, whole, kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(1, 13))
def test_killed_many_times(tmp_path, whole, seed):
  check_kills(tmp_path, whole, kills=5, seed=seed)


def test_sigterm_exits_75_and_a_second_signal_at_once(tmp_path, whole):
  process = start(tmp_path, *FIELDS)
  while not (tmp_path / 'metrics.jsonl').exists() or not (tmp_path / 'metrics.jsonl').read_text():
    assert process.poll() is None
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  err = process.communicate(timeout=60)[1]
  assert process.returncode == 75 and 'stopped and saved' in err
  slow = start(tmp_path, *FIELDS[:2], 'delay=30')
  while 'going on' not in slow.stderr.readline():
    assert slow.poll() is None
  slow.send_signal(signal.SIGINT)
  slow.stderr.readline()
  while 'SIGINT' not in slow.stderr.readline():
    assert slow.poll() is None
  slow.send_signal(signal.SIGINT)
  slow.communicate(timeout=20)
  assert slow.returncode == 130
  assert finish(tmp_path, *FIELDS)[0] == 0
  assert stored(tmp_path) == stored(whole) and lines(tmp_path) == lines(whole)


RUN = SCRIPT.parents[2] / 'run.py'
TEXT = 'to be, or not to be, that is the question\n'
FLAGS = (
  '--config.model.pattern=M-', '--config.model.d_model=16', '--config.model.mlp.d_ff=32', '--config.model.mamba2.heads=4',
  '--config.model.mamba2.head_dim=8', '--config.model.mamba2.state=4', '--config.train.seq_len=32',
  '--config.train.batch=8', '--config.train.steps=12', '--config.loop.checkpoint_every=2', '--config.loop.sample_every=0',
  '--config.loop.eval_every=0', '--config.optimizer.warmup_tokens=0',
)  # fmt: skip


PIPE = ('--config.mesh.pipe=2', '--config.mesh.data=2', '--config.mesh.tensor=2')


def start_run(folder, data, mesh=()):
  sources = [{'name': 'text', 'kind': 'text', 'path': str(data / 'text.txt')}]
  argv = [*FLAGS, *mesh, f'--config.data.sources={json.dumps(sources)}', f'--config.data.cache={data}', f'--workdir={folder}']
  cache = {'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir}
  cache['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'
  return subprocess.Popen(
    [sys.executable, str(RUN), *argv], env={**os.environ, **cache}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    text=True,
  )  # fmt: skip


def stored_run(folder):
  config = config_lib.from_dict(json.loads((folder / 'config.json').read_text()))
  with Checkpointer(folder / 'checkpoints') as checkpoints:
    tree, meta = checkpoints.restore(Program(config).abstract_stored(), config.train.steps, Program(config).index)
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)], meta


@pytest.mark.parametrize('mesh', [(), pytest.param(PIPE, marks=pytest.mark.scale)], ids=['data', 'pipe'])
def test_run_py_killed_while_it_saves_and_resumed_is_the_same_run(tmp_path, mesh):
  (tmp_path / 'text.txt').write_text(TEXT * 400)
  for name, kills in (('whole', 0), ('killed', 2)):
    for _ in range(kills):
      process, log = start_run(tmp_path / name, tmp_path, mesh), tmp_path / name / 'metrics.jsonl'
      before = set((tmp_path / name / 'checkpoints').glob('*'))
      while not set((tmp_path / name / 'checkpoints').glob('*')) - before or not log.read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
      process.kill()
      process.communicate()
      assert process.returncode == -signal.SIGKILL and len(lines(tmp_path / name)) < 12
    process = start_run(tmp_path / name, tmp_path, mesh)
    err = process.communicate(timeout=300)[1]
    assert process.returncode == 0 and 'WARNING' not in err, err
  assert stored_run(tmp_path / 'killed') == stored_run(tmp_path / 'whole')
  assert lines(tmp_path / 'killed') == lines(tmp_path / 'whole')
