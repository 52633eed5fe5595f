"""The quickstart as a person runs it, with what is promised of it: loss, time, memory, files."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Seconds of processor time and most memory of a command. From a process of its own: on Linux a child's most memory starts at
# what its parent has had, and that is what all tests before this one took.
MEASURED = '''
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
sys.exit(code)
'''


@pytest.mark.slow
def test_quickstart_keeps_its_promises(tmp_path):
  # conftest's XLA_FLAGS trade speed for compile time.
  environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
  environment['LMSCALE_CACHE'] = str(tmp_path / 'cache')
  argv = [sys.executable, '-c', MEASURED, sys.executable, ROOT / 'run.py', '--workdir', tmp_path / 'run']
  done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
  text = done.stderr
  assert done.returncode == 0, text
  seconds, most = map(float, done.stdout.split())
  validation = float(re.search(r'^validation loss ([\d.]+) nats per token', text, re.MULTILINE)[1])
  entropy = float(re.search(r'order-1 entropy of ([\d.]+) nats', text)[1])
  assert validation <= entropy - 0.1
  assert 1.5 < entropy < 4  # what Python sources and English have
  lines = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  assert lines[-1]['val_loss'] == pytest.approx(validation, abs=1e-4)
  # Five minutes of two cores: unlike the time on the clock, this does not depend on what else the machine does.
  assert seconds <= 2 * 300
  assert most / (1024 if sys.platform == 'darwin' else 1) <= 4 * 2**20  # KiB
  files = {path.name for path in (tmp_path / 'run').iterdir()}
  wanted = 'config.json environment.json metrics.jsonl tensorboard samples.txt loss.svg checkpoints'
  assert files >= set(wanted.split())


MESHES = {
  'default': (),
  'pipe': ('--config.mesh.pipe=2', '--config.mesh.data=2', '--config.mesh.tensor=2'),
  'interleaved': (
    '--config.mesh.pipe=2', '--config.mesh.data=2', '--config.mesh.tensor=2', '--config.mesh.schedule=interleaved',
    '--config.mesh.virtual=2',
  ),
}  # fmt: skip


@pytest.mark.scale
def test_the_losses_of_the_quickstart_are_those_of_a_pipeline(tmp_path):
  """By flags alone; 20 steps with a whole warm-up and decay."""
  found = {}
  for name, flags in MESHES.items():
    steps = ('--config.train.steps=20', '--config.loop.eval_every=10', '--config.loop.sample_every=0')
    argv = [sys.executable, ROOT / 'run.py', '--workdir', tmp_path / name, *steps, *flags]
    subprocess.run(argv, check=True, capture_output=True)
    lines = [json.loads(line) for line in (tmp_path / name / 'metrics.jsonl').read_text().splitlines()]
    found[name] = [value for line in lines for value in (line['loss'], line.get('val_loss', 0))]
  for name in ('pipe', 'interleaved'):
    assert found[name] == pytest.approx(found['default'], rel=1e-4), name
