"""The folder of a run: the lock, what is recorded, and which changes a resumed run may make."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest

from lmscale import config as config_lib
from lmscale.config import Config
from lmscale.errors import ConfigError
from lmscale.train.workdir import open_workdir, write_atomic


def change(config, path, value):
  head, _, rest = path.partition('.')
  return dataclasses.replace(config, **{head: change(getattr(config, head), rest, value) if rest else value})


def test_records_config_and_environment(tmp_path):
  config = change(Config(), 'model.d_model', 64)
  with open_workdir(tmp_path / 'deep' / 'run', config) as workdir:
    assert not (workdir.path / 'config.json').exists()  # before it is settled that the run may go on with it
    workdir.record()
    assert config_lib.from_dict(json.loads((workdir.path / 'config.json').read_text())) == config
    environment = json.loads((workdir.path / 'environment.json').read_text())
  assert environment['devices'] == {'count': 8, 'kind': 'cpu', 'platform': 'cpu'}
  assert environment['packages']['jax'] == __import__('jax').__version__
  assert environment['git'] is None or re.fullmatch(r'[0-9a-f]{40}(\+changes)?', environment['git'])


def test_second_process_is_refused_until_the_first_ends(tmp_path):
  script = (
    'import sys; from lmscale.config import Config; from lmscale.train.workdir import open_workdir\n'
    f'w = open_workdir({str(tmp_path)!r}, Config()); print("held", flush=True); sys.stdin.read()'
  )
  holder = subprocess.Popen([sys.executable, '-c', script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
  try:
    assert holder.stdout.readline() == 'held\n'
    with pytest.raises(ConfigError, match=f'is in use by process {holder.pid} on '):
      open_workdir(tmp_path, Config())
  finally:
    holder.kill()
    holder.communicate()
  open_workdir(tmp_path, Config()).close()
  open_workdir(tmp_path, Config()).close()


@pytest.mark.parametrize('make', ['file', 'readonly'])
def test_unusable_folder_is_one_line(tmp_path, make):
  path = tmp_path / 'x'
  if make == 'file':
    path.write_text('')
  elif os.geteuid() == 0:
    path = '/proc/nothing-here'
  else:
    tmp_path.chmod(0o500)
  with pytest.raises(ConfigError, match='workdir .*; give another --workdir'):
    open_workdir(path, Config())


def test_write_atomic_leaves_no_temporary_file(tmp_path):
  write_atomic(tmp_path / 'a', 'one')
  write_atomic(tmp_path / 'a', 'two')
  assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('a', 'two')]
