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
from lmscale.train.workdir import check_identity, check_resume, open_workdir, write_atomic


def change(config, path, value):
  head, _, rest = path.partition('.')
  return dataclasses.replace(config, **{head: change(getattr(config, head), rest, value) if rest else value})


def refusal(path, value, base=None):
  base = base or Config()
  with pytest.raises(ConfigError) as caught:
    check_resume(base, change(base, path, value), 'W')
  return str(caught.value).splitlines()


def test_records_config_and_environment(tmp_path):
  config = change(Config(), 'model.d_model', 64)
  with open_workdir(tmp_path / 'deep' / 'run', config) as workdir:
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


def test_refused_run_releases_the_lock_and_keeps_the_old_config(tmp_path):
  open_workdir(tmp_path, Config()).close()
  (tmp_path / 'checkpoints' / '10').mkdir(parents=True)
  with pytest.raises(ConfigError, match=r'model.d_model: 128 -> 64'):
    open_workdir(tmp_path, change(Config(), 'model.d_model', 64))
  assert json.loads((tmp_path / 'config.json').read_text())['model']['d_model'] == 128
  open_workdir(tmp_path, change(Config(), 'mesh.zero', 3)).close()
  assert json.loads((tmp_path / 'config.json').read_text())['mesh']['zero'] == 3


def test_without_a_checkpoint_there_is_nothing_to_protect(tmp_path):
  open_workdir(tmp_path, Config()).close()
  open_workdir(tmp_path, change(Config(), 'seed', 1)).close()


@pytest.mark.parametrize('text', ['', '[]', '{"seed": 1', '[' * 100_000])
def test_a_damaged_config_is_one_line(tmp_path, text):
  with open_workdir(tmp_path, Config()) as workdir:
    (workdir.checkpoints / '1').mkdir(parents=True)
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(ConfigError, match='config.json: written by another version of lmscale or damaged'):
    open_workdir(tmp_path, Config())


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


@pytest.mark.parametrize(
  ('path', 'value'),
  [
    ('seed', 7), ('model.pattern', 'MM'), ('model.mamba2.state', 8), ('train.batch', 16), ('train.seq_len', 128),
    ('train.ramp_tokens', 5), ('optimizer.learning_rate', 1e-4), ('optimizer.beta2', 0.9), ('data.tokenizer', 'other'),
    ('train.compute_dtype', 'bfloat16'), ('train.grad_dtype', 'bfloat16'),
  ],
)  # fmt: skip
def test_what_the_run_computes_may_not_change(path, value):
  base = change(Config(), 'optimizer.decay_tokens', 10**9)
  old = base
  for part in path.split('.'):
    old = getattr(old, part)
  lines = refusal(path, value, base)
  assert lines == [lines[0], f'  {path}: {json.dumps(old)} -> {json.dumps(value)}']
  assert lines[0].startswith('workdir W holds a run with other settings')


def test_every_changed_field_has_a_line():
  two = (config_lib.SourceConfig(path='prose'), config_lib.SourceConfig(name='b'))
  lines = refusal('data.sources', two)
  assert lines[1] == '  data.sources.0.path: "code" -> "prose"'
  assert lines[2] == '  data.sources.1.name: absent -> "b"'
  assert len(lines) == 2 + len(dataclasses.fields(config_lib.SourceConfig))


@pytest.mark.parametrize(
  ('path', 'value'),
  [
    ('name', 'b'), ('emulate', 8), ('mesh.zero', 3), ('mesh.tensor', 2), ('loop.eval_every', 1), ('data.cache', '/c'),
    ('train.microbatch', 2), ('train.remat', 'none'), ('train.stack', 'unrolled'), ('train.loss_chunk', 8),
    ('train.nonfinite_budget', 9), ('train.spike_skip', 20.0), ('train.spike_budget', 9),
  ],
)  # fmt: skip
def test_how_it_runs_may_change(path, value):
  check_resume(Config(), change(Config(), path, value), 'W')


def test_steps_may_change_only_where_the_learning_rate_does_not():
  line = refusal('train.steps', 200)[1]  # cosine to the end of the run
  assert line.startswith('  optimizer.decay_tokens: 204800 -> 409600 (0 means the end of the run, train.steps 100 -> 200')
  assert 'optimizer.decay_tokens=204800' in line
  fixed = change(Config(), 'optimizer.decay_tokens', 204800)
  for base in (fixed, change(Config(), 'optimizer.schedule', 'constant')):
    for steps in (50, 200):
      check_resume(base, change(base, 'train.steps', steps), 'W')
  check_resume(Config(), change(fixed, 'train.steps', 200), 'W')  # the advice in the message works


def test_another_length_does_not_bring_another_warm_up_in_silence():
  began = change(change(Config(), 'optimizer.schedule', 'constant'), 'optimizer.warmup_tokens', 6144)
  longer = change(change(began, 'train.steps', 200), 'optimizer.warmup_tokens', 12288)
  with pytest.raises(ConfigError) as caught:
    check_resume(began, longer, 'W')
  (line,) = str(caught.value).splitlines()[1:]
  assert line.startswith('  optimizer.warmup_tokens: 6144 -> 12288 (') and line.endswith('keep it by optimizer.warmup_tokens=6144)')
  check_resume(began, change(longer, 'optimizer.warmup_tokens', 6144), 'W')


@pytest.mark.parametrize('other', ['wsd', 'cosine'])
def test_another_schedule_is_told_without_advice_about_the_field_that_only_one_reads(other):
  constant = change(Config(), 'optimizer.schedule', 'constant')
  assert refusal('optimizer.schedule', other, constant)[1:] == [f'  optimizer.schedule: "constant" -> "{other}"']
  back = change(Config(), 'optimizer.schedule', other)
  assert refusal('optimizer.schedule', 'constant', back)[1:] == [f'  optimizer.schedule: "{other}" -> "constant"']


def test_data_identity():
  check_identity({'a': [1, {'b': 'x'}]}, {'a': [1, {'b': 'x'}]}, 'W')
  with pytest.raises(ConfigError, match='other data') as caught:
    check_identity({'a': [1, {'b': 'x'}]}, {'a': [1, {'b': 'y'}]}, 'W')
  assert str(caught.value).splitlines()[1:] == ['  a.1.b: "x" -> "y"']
  with pytest.raises(ConfigError, match='identity: "x" -> "y"'):
    check_identity('x', 'y', 'W')


def test_write_atomic_leaves_no_temporary_file(tmp_path):
  write_atomic(tmp_path / 'a', 'one')
  write_atomic(tmp_path / 'a', 'two')
  assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('a', 'two')]
