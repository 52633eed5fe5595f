"""docs/models.md, "All the way round", as it stands there: every command, for the four architectures, with smaller models and fewer steps."""

import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import run
from lmscale.train.console import printable
from lmscale.train.metrics import read_metrics
from lmscale.train.model_folder import open_model
from tools import convert_hf

ROOT = pathlib.Path(__file__).parents[1]
SECTION = (ROOT / 'docs' / 'models.md').read_text().partition('## All the way round')[2].partition('\n## ')[0]
_, *COMMANDS = re.search(r'```sh\n(.*?)```', SECTION, re.DOTALL)[1].splitlines()
WALK = re.search(r'```python\n(.*?)```', SECTION, re.DOTALL)[1]
PATTERNS = {'transformer': '*-', 'mamba': 'm', 'mamba2': 'M', 'hybrid': 'M*-'}
SHORT = ['--config.train.steps=3', '--config.train.batch=8', '--config.train.microbatch=1', '--config.train.seq_len=64',
         '--config.data.validation=0.3', '--config.loop.sample_every=0', '--config.loop.eval_every=0']  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'configs').symlink_to(ROOT / 'configs')
  (tmp_path / 'walk.py').write_text(WALK)
  (tmp_path / 'text').mkdir()
  for i in range(8):
    (tmp_path / 'text' / f'{i}.txt').write_text(''.join(f'def double_{j}(x):\n  return {i} + 2 * x\n\n' for j in range(40)))
  return tmp_path


@pytest.mark.parametrize('arch', [arch if arch == 'hybrid' else pytest.param(arch, marks=pytest.mark.slow) for arch in PATTERNS])
def test_the_commands_of_the_walk(folder, arch, capsys):
  written = []
  for command in COMMANDS:
    capsys.readouterr()
    _run(command.replace('$arch', arch), arch)
    written.append(capsys.readouterr().out)
  first, on = (open_model(f'runs/{name}') for name in (arch, f'{arch}-on'))
  assert (first.step, on.step) == (3, 3)
  assert open_model(f'runs/{arch}-back').about
  losses = [[line['loss'] for line in read_metrics(pathlib.Path('runs', name, 'metrics.jsonl'))] for name in (arch, f'{arch}-on')]
  assert losses[1][0] < losses[0][0] - 0.05  # it begins where the first ended
  generated, walked = written[1], written[3]
  assert generated.startswith('def ')
  if walked:  # greedily, both the same
    assert printable(walked).strip() == generated.strip()


def _run(command, arch):
  _, program, *arguments = shlex.split(command)
  if program == 'tools/convert_hf.py':
    assert convert_hf.main(arguments) in (0, None), command
  elif program == 'run.py':
    sources = f'--config.data.sources=[{{"name": "text", "kind": "text", "path": "{os.getcwd()}/text"}}]'
    extra = [*SHORT, f'--config.model.pattern={PATTERNS[arch]}', sources] if '--job=generate' not in arguments else []
    assert run.main([*arguments, *extra]) == 0, command
  elif importlib.util.find_spec('transformers'):
    sys.stdout.write(subprocess.run([sys.executable, program, *arguments], check=True, capture_output=True, text=True).stdout)
  else:
    shutil.copytree(*arguments)
