import errno
import os
import pathlib
import subprocess
import sys
import time

import pytest

from lmscale import config as config_lib
from lmscale.cache_root import cache_root
from lmscale.data import atomic_folder


def write(folder, content='whole'):
  (folder / 'a').write_text(content)


def read(folder):
  content = (folder / 'a').read_text()
  if content != 'whole':
    raise ValueError(content)
  return content


def start(program):
  program = 'import os, pathlib, sys, time\nfrom lmscale.data import atomic_folder\n' + program
  return subprocess.Popen([sys.executable, '-c', program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def no_build(folder):
  raise AssertionError('built again')


def test_built_once(tmp_path):
  assert atomic_folder.ensure(tmp_path / 'x' / 'y', write, read) == 'whole'
  assert atomic_folder.ensure(tmp_path / 'x' / 'y', no_build, read) == 'whole'
  assert os.listdir(tmp_path / 'x') == ['y']


def test_a_failed_build_leaves_nothing(tmp_path):
  def fail(folder):
    write(folder, 'half')
    raise KeyboardInterrupt
  with pytest.raises(KeyboardInterrupt):
    atomic_folder.ensure(tmp_path / 'x', fail, read)
  assert os.listdir(tmp_path) == []


def test_a_killed_build_is_ignored_and_swept_up_later(tmp_path):
  process = start(f"""
def build(folder):
  (folder / 'a').write_text('half')
  os._exit(9)
atomic_folder.ensure(pathlib.Path({str(tmp_path)!r}) / 'x', build, None)
""")
  assert process.wait() == 9
  left, = tmp_path.iterdir()
  assert left.name.startswith(atomic_folder.PREFIX)
  assert atomic_folder.ensure(tmp_path / 'x', write, read) == 'whole'
  assert left.is_dir()  # it could be another process at work
  old = time.time() - atomic_folder.STALE - 60
  for path in (left / 'a', left):
    os.utime(path, (old, old))
  atomic_folder.ensure(tmp_path / 'y', write, read)
  assert sorted(os.listdir(tmp_path)) == ['x', 'y']


def test_a_damaged_folder_is_built_again(tmp_path):
  (tmp_path / 'x').mkdir()
  write(tmp_path / 'x', 'damaged')
  assert atomic_folder.ensure(tmp_path / 'x', write, read) == 'whole'
  assert os.listdir(tmp_path) == ['x']


def test_a_folder_replaced_by_another_process_meanwhile_is_kept(tmp_path):
  (tmp_path / 'x').mkdir()
  write(tmp_path / 'x', 'damaged')

  def open_late(folder):
    content = (folder / 'a').read_text()
    if content == 'damaged':
      (tmp_path / 'x').rename(tmp_path / 'old')
      (tmp_path / 'x').mkdir()
      write(tmp_path / 'x')
    return read(folder) if content == 'whole' else 1 / 0

  assert atomic_folder.ensure(tmp_path / 'x', no_build, open_late) == 'whole'


def test_a_build_that_is_never_whole_stops(tmp_path):
  with pytest.raises(RuntimeError, match='damaged again.*half'):
    atomic_folder.ensure(tmp_path / 'x', lambda folder: write(folder, 'half'), read)


def test_processes_at_once_all_get_a_whole_folder(tmp_path):
  (tmp_path / 'damaged').mkdir()
  processes = [start(f"""
def build(folder):
  time.sleep(0.05)
  (folder / 'a').write_text('whole')
print('ready', flush=True)
sys.stdin.readline()
for name in ('missing', 'damaged'):
  print(atomic_folder.ensure(pathlib.Path({str(tmp_path)!r}) / name, build, lambda folder: (folder / 'a').read_text()))
""") for _ in range(3)]
  for process in processes:
    assert process.stdout.readline() == 'ready\n'
  for process in processes:
    process.stdin.write('go\n')
    process.stdin.flush()
  assert [process.communicate(timeout=30)[0] for process in processes] == ['whole\nwhole\n'] * 3
  assert sorted(os.listdir(tmp_path)) == ['damaged', 'missing']


def test_a_cache_that_cannot_be_written_is_a_config_error(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(config_lib.ConfigError, match='data.cache: cannot write .*file/x'):
    atomic_folder.ensure(tmp_path / 'file' / 'x', write, read)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
  """Some file systems find out only when they are asked to write it through."""
  def full(descriptor):
    raise OSError(errno.ENOSPC, 'No space left on device')
  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(config_lib.ConfigError, match=r'data.cache: cannot write .*/x: No space left on device'):
    atomic_folder.ensure(tmp_path / 'x', write, read)
  assert os.listdir(tmp_path) == []


def test_all_is_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
  synced = []
  real = os.fsync

  def note(descriptor):
    synced.append((os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}')), (tmp_path / 'x').exists()))
    real(descriptor)
  monkeypatch.setattr(os, 'fsync', note)

  def build(folder):
    write(folder)
    (folder / 'sub').mkdir()
    (folder / 'sub' / 'b').write_text('')
  atomic_folder.ensure(tmp_path / 'x', build, read)
  assert {name for name, named in synced if not named} > {'a', 'sub', 'b'}
  assert [name for name, named in synced if named] == [tmp_path.name]


def test_a_damaged_folder_is_told(tmp_path, caplog):
  (tmp_path / 'x').mkdir()
  write(tmp_path / 'x', 'wrong\nlines')
  atomic_folder.ensure(tmp_path / 'x', write, read)
  assert caplog.messages == [f'{tmp_path / "x"} is damaged and built again: wrong lines']


def test_cache_root_order(monkeypatch):
  monkeypatch.delenv('LMSCALE_CACHE', raising=False)
  assert cache_root() == pathlib.Path.home() / '.cache' / 'lmscale'
  monkeypatch.setenv('LMSCALE_CACHE', '/elsewhere')
  assert cache_root() == pathlib.Path('/elsewhere')
  assert cache_root('~/mine') == pathlib.Path.home() / 'mine'
