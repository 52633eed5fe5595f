"""Two processes of four devices each are the run that one process of eight is; one of them may be killed.

They are real: started as on a cluster, with collectives between them.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from fake_program import lines

import run
from lmscale import config as config_lib
from lmscale.train.checkpoint import Checkpointer
from lmscale.train.program import Program

ROOT = pathlib.Path(__file__).parents[2]
# run.py, with the rows that the loader is asked for on record, and steps that leave time to be killed in.
SCRIPT = """
import json, os, sys, time
from lmscale.data.loader import Loader
from lmscale.train.program import Program
import run
batch, step, said = Loader.batch, Program.step, open(os.environ['ROWS'], 'w', buffering=1)
def record(self, first_sample, rows):
  said.write(json.dumps([self.split, first_sample, list(rows)]) + '\\n')
  return batch(self, first_sample, rows)
def slow(self, *args):
  time.sleep(float(os.environ['SLEEP']))
  return step(self, *args)
Loader.batch, Program.step = record, slow
sys.exit(run.main(sys.argv[1:]))
"""
STEPS = 8
FLAGS = {
  'emulate': 8, 'model.pattern': 'M*', 'model.d_model': 32, 'model.attention.heads': 8, 'model.attention.kv_heads': 2,
  'model.attention.head_dim': 4, 'model.mamba2.heads': 8, 'model.mamba2.head_dim': 8, 'model.mamba2.groups': 2,
  'model.mamba2.state': 8, 'mesh.data': 4, 'mesh.tensor': 2, 'mesh.zero': 3, 'train.seq_len': 32, 'train.batch': 8,
  'train.steps': STEPS, 'train.remat': 'none', 'loop.checkpoint_every': 2, 'loop.keep': 2, 'loop.sample_every': 4,
  'loop.sample_tokens': 4, 'loop.eval_every': 4, 'loop.eval_samples': 6, 'optimizer.warmup_tokens': 0,
  'optimizer.decay_tokens': 4096, 'data.validation': 0.4,
}  # fmt: skip
QUIET = {'loop.sample_every': 0, 'loop.eval_every': 0}
PIPE = {'mesh.pipe': 2, 'mesh.data': 2, 'mesh.tensor': 2, 'mesh.zero': 1}  # each process has one stage
OTHER_MESH = {'mesh.data': 1, 'mesh.tensor': 8, 'mesh.zero': 1}  # tensor, too, goes over both processes


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  for i in range(8):
    (folder / f'{i}.txt').write_text(''.join(f'{i} to be, or not to be, that is the question {j}\n' for j in range(60)))
  return folder


def arguments(folder, data, change):
  sources = json.dumps([{'name': 'text', 'kind': 'text', 'path': str(data / '*.txt')}])
  fields = FLAGS | {'data.sources': sources, 'data.cache': data / 'cache'} | change
  return [f'--workdir={folder}', *(f'--config.{name}={value}' for name, value in fields.items())]


class Two:
  """Two processes of one run; `second`: fields of the second process alone; `err` and `rows` are what each printed to standard error and asked its loader for."""

  def __init__(self, folder, data, change=(), sleep=0.0, second=()):
    with socket.socket() as probe:
      probe.bind(('127.0.0.1', 0))
      address = f'127.0.0.1:{probe.getsockname()[1]}'
    folder.parent.mkdir(exist_ok=True)
    self.folder, self.processes = folder, []
    self.out, self.err, self.rows = (
      [folder.with_name(f'{folder.name}-{kind}{i}') for i in range(2)] for kind in ('out', 'err', 'rows')
    )
    for i in range(2):
      environ = {'ROWS': str(self.rows[i]), 'SLEEP': str(sleep), 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
      environ |= {'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir}
      environ |= {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1'}
      environ |= {'JAX_COORDINATOR_ADDRESS': address, 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': str(i)}
      command = [sys.executable, '-c', SCRIPT, *arguments(folder, data, dict(change) | (dict(second) if i else {}))]
      with self.out[i].open('w') as out, self.err[i].open('w') as err:
        self.processes.append(subprocess.Popen(command, env={**os.environ, **environ}, stdout=out, stderr=err))

  def wait(self, timeout=400):
    """The exit codes."""
    try:
      return [process.wait(timeout) for process in self.processes]
    finally:
      for process in self.processes:
        process.kill()

  def until(self, step):
    """Returns once metrics.jsonl has that step."""
    path = self.folder / 'metrics.jsonl'
    while not path.exists() or path.read_text().count('\n') < step:
      assert all(process.poll() is None for process in self.processes), self.said(0) + self.said(1)
      time.sleep(0.01)

  def said(self, process):
    return self.err[process].read_text()


@pytest.fixture(scope='module')
def whole(tmp_path_factory, data):
  """An uninterrupted run of two processes."""
  two = Two(tmp_path_factory.mktemp('two') / 'run', data)
  assert two.wait() == [0, 0], two.said(0) + two.said(1)
  return two


@pytest.fixture(scope='module')
def one(tmp_path_factory, data):
  """The same run, four steps longer, in this process."""
  folder = tmp_path_factory.mktemp('one') / 'run'
  assert run.main(arguments(folder, data, {'train.steps': STEPS + 4})) == 0
  return folder


def assert_same_losses(got, want, but=()):
  assert [line['step'] for line in got] == [line['step'] for line in want]
  for a, b in zip(got, want, strict=True):
    assert (a['tokens'], a['learning_rate']) == (b['tokens'], b['learning_rate'])
    for name in {'loss', 'val_loss'} - set(but):
      assert (name in a) == (name in b)
      assert name not in a or a[name] == pytest.approx(b[name], rel=1e-6)
    assert a['grad_norm'] == pytest.approx(b['grad_norm'], rel=1e-5)


def stored(folder, step):
  config = config_lib.from_dict(json.loads((folder / 'config.json').read_text()))
  with Checkpointer(folder / 'checkpoints', read_only=True) as checkpoints:
    tree, meta = checkpoints.restore(Program(config).abstract_stored(), step, Program(config).index)
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)], {k: v for k, v in meta.items() if k != 'config'}


def test_two_processes_are_one_run(whole, one):
  assert_same_losses(lines(whole.folder), lines(one)[:STEPS])
  assert 'val_loss' in lines(whole.folder)[3]
  samples = (one / 'samples.txt').read_text()
  assert samples.startswith((whole.folder / 'samples.txt').read_text()) and '=== step 8 ===' in samples


def test_the_first_process_alone_prints_and_writes(whole):
  assert whole.said(1) == '' and whole.out[1].read_text() == ''
  out = whole.out[0].read_text()
  assert out.count('workdir  ') == 1 and 'parameters' in out and 'Gloo' not in out
  assert 'goodput ' in whole.said(0) and 'finished: step 8' in whole.said(0)
  assert len(lines(whole.folder)) == STEPS
  environment = json.loads((whole.folder / 'environment.json').read_text())
  assert (environment['processes'], environment['devices']['count']) == (2, 8)


def test_a_process_reads_only_its_rows(whole):
  asked = []
  for path in whole.rows:
    rows = {}
    for split, first, wanted in map(json.loads, path.read_text().splitlines()):
      if split == 'train':
        rows.setdefault(first, []).extend(wanted)
    asked.append(rows)
  for step in range(STEPS):
    assert sorted(asked[0][8 * step]) == [0, 1, 4, 5] and sorted(asked[1][8 * step]) == [2, 3, 6, 7]


def copied(whole, folder):
  subprocess.run(['cp', '-r', whole.folder, folder], check=True)
  return folder


def test_one_process_goes_on_where_two_stopped(whole, one, data, tmp_path):
  folder = copied(whole, tmp_path / 'run')
  assert run.main(arguments(folder, data, {'train.steps': STEPS + 2})) == 0
  assert_same_losses(lines(folder), lines(one)[: STEPS + 2], but=('val_loss',))  # evaluated at another last step


def test_stopped_and_killed_and_started_again_is_the_same_run(tmp_path, whole, one, data):
  folder = tmp_path / 'run'
  two = Two(folder, data, QUIET, sleep=0.3)
  two.until(2)
  two.processes[1].send_signal(signal.SIGTERM)
  assert two.wait(120) == [75, 75], two.said(0) + two.said(1)
  assert 'stopped and saved at step' in two.said(0) and 'SIGTERM' in two.said(1)
  at = max(int(path.name) for path in (folder / 'checkpoints').iterdir())
  assert 2 < at == lines(folder)[-1]['step'] < STEPS
  two = Two(folder, data, QUIET | OTHER_MESH | {'loop.checkpoint_every': 100}, sleep=0.3)
  two.until(at + 1)
  two.processes[1].kill()
  killed = time.monotonic()
  assert two.processes[0].wait(30) == 75, two.said(0)
  assert time.monotonic() - killed < 10
  two.wait()
  assert 'process 0 of 2: another process of this run is gone' in two.said(0) and 'again to go on' in two.said(0)
  assert_same_losses(lines(folder), lines(one)[: len(lines(folder))], but=('val_loss',))  # on the other mesh, too
  two = Two(folder, data, QUIET)
  assert two.wait() == [0, 0], two.said(0) + two.said(1)
  assert f'is at step {at} of {STEPS}' in two.said(0) and 'in 3 starts' in two.said(0) and 'lost ' in two.said(0)
  assert stored(folder, STEPS) == stored(whole.folder, STEPS)
  bare = [{k: v for k, v in line.items() if not k.startswith('val_')} for line in lines(whole.folder)]
  assert lines(folder) == bare


@pytest.mark.scale
def test_a_pipeline_of_one_stage_a_process(tmp_path, one, data):
  """Losses, evaluation and samples of one process, through a stop and a start."""
  folder = tmp_path / 'run'
  two = Two(folder, data, PIPE, sleep=0.3)
  two.until(2)
  two.processes[1].send_signal(signal.SIGTERM)
  assert two.wait() == [75, 75], two.said(0) + two.said(1)
  assert 'stopped and saved at step' in two.said(0)
  at = lines(folder)[-1]['step']
  assert 2 <= at < STEPS and (folder / 'checkpoints' / str(at)).is_dir()
  asked = [json.loads(line) for line in two.rows[1].read_text().splitlines()]
  assert ['train', 0, list(range(8))] in asked  # each of the two stages has every data rank
  two = Two(folder, data, PIPE)
  assert two.wait() == [0, 0], two.said(0) + two.said(1)
  assert f'is at step {at} of {STEPS}' in two.said(0)
  assert_same_losses(lines(folder), lines(one)[:STEPS])
  assert 'val_loss' in lines(folder)[3]
  assert (one / 'samples.txt').read_text().startswith((folder / 'samples.txt').read_text())


@pytest.mark.slow
def test_two_processes_go_on_where_one_stopped(whole, one, data, tmp_path):
  folder = copied(whole, tmp_path / 'run')
  assert run.main(arguments(folder, data, {'train.steps': STEPS + 2})) == 0
  two = Two(folder, data, {'train.steps': STEPS + 4, **OTHER_MESH})
  assert two.wait() == [0, 0], two.said(0) + two.said(1)
  assert f'going on: {folder} is at step {STEPS + 2}' in two.said(0)
  assert_same_losses(lines(folder), lines(one), but=('val_loss',))


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_a_frozen_process_is_noticed(tmp_path, data, victim):
  two = Two(tmp_path / 'run', data, QUIET | {'train.steps': 400}, sleep=0.3)
  two.until(2)
  two.processes[victim].send_signal(signal.SIGSTOP)
  frozen = time.monotonic()
  try:
    assert two.processes[1 - victim].wait(30) == 75
    assert time.monotonic() - frozen < 12
    assert 'another process of this run is gone' in two.said(1 - victim)
    two.processes[victim].send_signal(signal.SIGCONT)
    assert two.processes[victim].wait(30) == 75  # it cannot go on alone
  finally:
    for process in two.processes:
      process.kill()


@pytest.mark.slow
def test_all_go_back_together_past_a_damaged_checkpoint(tmp_path, whole, one, data):
  folder = copied(whole, tmp_path / 'run')
  newest = folder / 'checkpoints' / str(STEPS) / 'state'
  broken = max((p for p in newest.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
  broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
  two = Two(folder, data, {'train.steps': STEPS + 2})
  assert two.wait() == [0, 0], two.said(0) + two.said(1)
  assert 'IS DAMAGED' in two.said(0) and f'is at step {STEPS - 2} of' in two.said(0)
  assert_same_losses(lines(folder), lines(one)[: STEPS + 2], but=('val_loss',))


def test_a_mistake_of_one_process_ends_all_with_its_exit_code(tmp_path, data):
  two = Two(tmp_path / 'run', data, second={'data.sources.0.path': str(tmp_path / 'nowhere.txt')})
  assert two.wait(120) == [2, 2]
  assert 'error: process 1 of 2: ' in two.said(1) and 'nowhere.txt' in two.said(1)
  assert 'process 1 of 2 ended with exit code 2' in two.said(0) and 'error: ' not in two.said(0)


def test_devices_that_the_mesh_does_not_fill(tmp_path, data):
  two = Two(tmp_path / 'run', data, {'mesh.data': 3, 'mesh.tensor': 2})
  assert two.wait(120) == [2, 2]
  assert 'mesh: pipe 1 * data 3 * tensor 2 = 6, but there are 8 devices' in two.said(0) + two.said(1)
  assert not (tmp_path / 'run').exists()
