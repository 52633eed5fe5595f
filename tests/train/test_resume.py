"""A run goes on from a checkpoint that was looked at, or not at all: whole runs of the fake program."""

import json
import os
import shutil

import pytest
from fake_program import FakeLoader, lines, run, stored

from lmscale import config as config_lib
from lmscale.errors import ConfigError
from lmscale.train import checkpoint, loop, resume

KEEP = {'loop.keep': 2, 'loop.eval_every': 0, 'loop.sample_every': 0, 'train.steps': 9}  # checkpoints of steps 6 and 9
LONGER = KEEP | {'optimizer.decay_tokens': 10**6, 'train.steps': 12}


@pytest.fixture(scope='module')
def nine(tmp_path_factory):
  """A finished run."""
  folder = tmp_path_factory.mktemp('nine') / 'run'
  assert run(folder, KEEP) == loop.DONE
  return folder


@pytest.fixture
def copy(nine, tmp_path):
  """A finished run to be spoilt."""
  return shutil.copytree(nine, tmp_path / 'run')


def cut_arrays(checkpoints, step):
  for path in (checkpoints / str(step) / 'state').rglob('*'):
    if path.is_file() and path.stat().st_size > 1000:
      os.truncate(path, 10)


def empty_meta(checkpoints, step):
  (checkpoints / str(step) / 'meta' / 'metadata').write_text('')


def no_arrays(checkpoints, step):
  shutil.rmtree(checkpoints / str(step) / 'state')


def flip_array(checkpoints, step):
  path = max((checkpoints / str(step) / 'state').rglob('*'), key=lambda p: p.stat().st_size if p.is_file() else 0)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)


@pytest.mark.parametrize('spoil', [cut_arrays, empty_meta, no_arrays, flip_array])
def test_a_finished_run_whose_newest_checkpoint_is_broken_trains_again_what_is_lost(copy, nine, spoil, caplog, capsys):
  spoil(copy / 'checkpoints', 9)
  assert run(copy, KEEP) == loop.DONE
  assert '9 IS DAMAGED' in caplog.text and 'going on: ' in (said := capsys.readouterr().err) and 'complete' not in said
  assert stored(copy, 9) == stored(nine, 9) and lines(copy) == lines(nine)
  assert (copy / 'checkpoints' / '9.damaged').is_dir()
  assert run(copy, KEEP) == loop.DONE
  assert 'complete: ' in capsys.readouterr().err


def test_a_finished_run_without_a_whole_checkpoint_is_not_finished(copy):
  for step in (6, 9):
    cut_arrays(copy / 'checkpoints', step)
  with pytest.raises(ConfigError, match='all of 2 checkpoints are damaged'):
    run(copy, KEEP)


def test_with_one_checkpoint_kept_a_broken_one_is_told(tmp_path):
  one = KEEP | {'loop.keep': 1}
  assert run(tmp_path / 'run', one) == loop.DONE
  empty_meta(tmp_path / 'run' / 'checkpoints', 9)
  with pytest.raises(ConfigError, match='all of 1 checkpoints are damaged'):
    run(tmp_path / 'run', one)


def empty_folder(checkpoints):
  (checkpoints / '100').mkdir()


def empty_tree(checkpoints):
  (checkpoints / '100' / 'state').mkdir(parents=True)


def plain_file(checkpoints):
  (checkpoints / '100').write_text('')


def between(checkpoints):
  (checkpoints / '12').mkdir()


def other_files(checkpoints):
  (checkpoints / '100').mkdir()
  (checkpoints / '100' / 'notes.txt').write_text('mine')


def renamed(checkpoints):
  shutil.copytree(checkpoints / '6', checkpoints / '100')


@pytest.fixture(scope='module')
def twelve(tmp_path_factory):
  """A run of 9 steps, and the same one after 12."""
  folder = tmp_path_factory.mktemp('twelve')
  assert run(folder / '9', LONGER | {'train.steps': 9}) == loop.DONE
  shutil.copytree(folder / '9', folder / '12')
  assert run(folder / '12', LONGER) == loop.DONE
  return folder


@pytest.mark.parametrize('add', [empty_folder, empty_tree, plain_file, between, other_files, renamed])
def test_a_stray_numbered_folder_neither_ends_a_run_nor_stops_it(twelve, tmp_path, add, caplog, capsys):
  folder = shutil.copytree(twelve / '9', tmp_path / 'run')
  add(folder / 'checkpoints')
  assert run(folder, LONGER) == loop.DONE
  assert 'is at step 9 of 12' in capsys.readouterr().err and len([r for r in caplog.records if 'checkpoints/1' in r.getMessage() and r.name.startswith('lmscale')]) == 1
  assert stored(folder, 12) == stored(twelve / '12', 12) and lines(folder) == lines(twelve / '12')
  left = {p.name for p in (folder / 'checkpoints').iterdir()}
  assert left > {'9', '12'} and '100' not in left and len(left) == 3  # what it was is kept beside


def test_stray_folders_of_a_run_that_has_not_saved_yet(tmp_path):
  (tmp_path / 'run' / 'checkpoints' / '100').mkdir(parents=True)
  (tmp_path / 'run' / 'checkpoints' / '3.damaged').mkdir()
  assert run(tmp_path / 'run', KEEP) == loop.DONE
  assert [line['step'] for line in lines(tmp_path / 'run')] == list(range(1, 10))


def test_a_checkpoint_beyond_the_last_step_is_said(tmp_path, capsys):
  constant = KEEP | {'optimizer.schedule': 'constant'}
  assert run(tmp_path / 'run', constant) == loop.DONE
  before = (tmp_path / 'run' / 'metrics.jsonl').read_bytes()
  capsys.readouterr()
  assert run(tmp_path / 'run', constant | {'train.steps': 5}) == loop.DONE
  assert 'is at step 9 of 5, beyond train.steps: nothing is left to do' in capsys.readouterr().err
  assert (tmp_path / 'run' / 'metrics.jsonl').read_bytes() == before


def test_a_finished_run_of_a_later_version_is_not_passed_over(copy, monkeypatch):
  monkeypatch.setattr(checkpoint, 'READABLE', (1,))
  with pytest.raises(ConfigError, match='update it'):
    run(copy, KEEP)


def test_what_is_wrong_is_said_before_the_arrays_are_read(copy, monkeypatch):
  monkeypatch.setattr(checkpoint.Checkpointer, '_restore', lambda *_: pytest.fail('arrays were read'))
  with pytest.raises(ConfigError, match='name: "fake" -> "other"'):
    run(copy, KEEP, loader=FakeLoader('other'))
  with pytest.raises(ConfigError, match='optimizer.beta1: 0.9 -> 0.8'):
    run(copy, KEEP | {'optimizer.beta1': 0.8})


class Named(FakeLoader):
  def __init__(self, **identity):
    super().__init__()
    self.identity = {'tokenizer': 't', 'sources': [{'name': 'a', 'weight': 1.0, 'content': 'aa'} | identity]}


def test_a_run_goes_on_with_moved_data_and_not_with_other(tmp_path):
  assert run(tmp_path / 'run', LONGER | {'train.steps': 9}, loader=Named()) == loop.DONE
  moved = LONGER | {'data.tokenizer': 'moved.json', 'data.sources': (config_lib.SourceConfig('b', 'text', 'moved.txt'),)}
  with pytest.raises(ConfigError, match=r'sources.0.content: "aa" -> "ac"\n  data.sources.0.name') as caught:
    run(tmp_path / 'run', moved, loader=Named(content='ac'))
  assert '  data.sources.0.path: "code" -> "moved.txt"\n  data.tokenizer: "bytes" -> "moved.json"' in str(caught.value)
  assert run(tmp_path / 'run', moved, loader=Named(name='moved')) == loop.DONE
  assert lines(tmp_path / 'run')[-1]['step'] == 12


@pytest.mark.parametrize('text', ['', '[]', '{"seed": 1', '[' * 100_000, '{"flux": 1}'])
def test_a_damaged_config_is_one_line(copy, text):
  (copy / 'config.json').write_text(text)
  with pytest.raises(ConfigError, match='config.json: written by another version of lmscale or damaged'):
    run(copy, KEEP)
  assert (copy / 'config.json').read_text() == text


def test_the_checkpoint_knows_its_config(copy, capsys):
  (copy / 'config.json').unlink()
  with pytest.raises(ConfigError) as caught:
    run(copy, KEEP | {'train.batch': 8, 'model.d_model': 64})
  assert '  model.d_model: 128 -> 64\n  train.batch: 4 -> 8\n' in str(caught.value)
  assert run(copy, KEEP) == loop.DONE
  said = capsys.readouterr().err
  assert 'config.json is missing: the config kept in the checkpoint was used' in said
  assert config_lib.from_dict(json.loads((copy / 'config.json').read_text())).train.steps == 9


def test_a_run_does_not_start_from_parameters_of_another_function(copy, tmp_path, capsys):
  start = {'train.init_from': str(copy), 'train.steps': 2, 'optimizer.warmup_tokens': 0, 'loop.eval_every': 0}
  with pytest.raises(ConfigError, match='model.pattern: "M-M.*" -> "--"'):
    run(tmp_path / 'new', start | {'model.pattern': '--'})
  assert not (tmp_path / 'new' / 'config.json').exists()
  cut_arrays(copy / 'checkpoints', 9)
  assert run(tmp_path / 'new', start) == loop.DONE
  assert f'starting from the parameters of {copy} at step 6' in capsys.readouterr().err
  assert (copy / 'checkpoints' / '9').is_dir()  # of another run nothing is touched


def test_a_resumed_run_may_change_its_pipeline(tmp_path):
  old = config_lib.Config()
  new = config_lib.from_dict({'mesh': {'pipe': 2, 'schedule': 'interleaved', 'virtual': 2}})
  assert resume.check_config(old, new, 3, tmp_path) == []
