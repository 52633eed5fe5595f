import errno
import glob
import gzip
import os
import pathlib

import pytest
import zstandard

from lmscale.data.sources import find_files as module
from lmscale.data.sources.find_files import find_files
from lmscale.errors import ConfigError


@pytest.fixture
def root(tmp_path, monkeypatch):
  (tmp_path / 'root').mkdir()
  monkeypatch.chdir(tmp_path / 'root')
  return tmp_path / 'root'


def write(*names, content=None):
  for name in names:
    pathlib.Path(name).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(name).write_text(name if content is None else content)


def found(path, suffix='.txt'):
  paths, notices = find_files(path, suffix)
  assert not notices
  return [str(p) for p in paths]


def error(path, suffix='.txt'):
  with pytest.raises(ConfigError) as caught:
    find_files(path, suffix)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def test_a_folder_stands_for_its_files_whatever_the_capitals_and_packings(root):
  write('b.txt', 'A.TXT', 'sub/c.Txt', 'd.txt.gz', 'e.TXT.ZST', 'f.md', 'gtxt', 'h.txt.old', 'sub/deep/i.txt')
  assert found('.') == ['A.TXT', 'b.txt', 'd.txt.gz', 'e.TXT.ZST', 'sub/c.Txt', 'sub/deep/i.txt']
  assert found(str(root)) == [str(root / name) for name in found('.')]


def test_packings_that_cannot_be_read_are_found_too_so_that_reading_them_says_so(root):
  write('a.txt', 'b.txt.xz', 'c.txt.BZ2', 'd.txt.zip', 'e.zip')
  assert found('.') == ['a.txt', 'b.txt.xz', 'c.txt.BZ2', 'd.txt.zip']


def test_names_that_begin_with_a_dot_are_left_out_unless_named(root):
  write('a.txt', '._a.txt', '.ipynb_checkpoints/a-checkpoint.txt', '.git/x.txt', 'sub/.hidden.txt', 'sub/b.txt', '.cfg/deep/c.txt')
  assert found('.') == ['a.txt', 'sub/b.txt'] == found('**/*.txt') == found('**') == found('*')
  assert found('._a.txt') == ['._a.txt']
  assert found('.ipynb_checkpoints') == ['.ipynb_checkpoints/a-checkpoint.txt'] == found('.ipynb_checkpoints/*')
  assert found('.*') == ['._a.txt', '.cfg/deep/c.txt', '.git/x.txt', '.ipynb_checkpoints/a-checkpoint.txt']
  assert found('sub/.h*') == ['sub/.hidden.txt']
  assert error('.git/*.md').endswith('the glob matches no file')


def test_linked_folders_and_files_are_followed_from_a_folder_and_a_glob(root):
  write('a.txt', '../far/b.txt', '../far/deep/c.txt', '../one.txt')
  os.symlink('../far', 'more')
  os.symlink('../one.txt', 'z.txt')
  expected = ['a.txt', 'more/b.txt', 'more/deep/c.txt', 'z.txt']
  for path in ('.', '**/*.txt', '**', '*'):
    assert found(path) == expected
  assert found('more') == expected[1:3] == found('m*')
  assert found('*/*.txt') == ['more/b.txt']
  assert found('z.txt') == ['z.txt']


def test_loops_end_and_a_folder_reached_twice_is_read_once(root):
  write('a.txt', 'sub/b.txt', '../far/c.txt')
  os.symlink('..', 'sub/up')
  os.symlink('.', 'self')
  os.symlink('../far', 'x')
  os.symlink('../far', 'y')
  os.symlink('../root', '../far/back')
  os.symlink('sub', 'aaa')  # sorts before the real one
  for path in ('.', '**/*.txt', '**/**/*.txt'):
    assert found(path) == ['a.txt', 'sub/b.txt', 'x/c.txt']


def test_many_folders_linked_to_each_other_take_no_time(root):
  for i in range(12):
    write(f'{i}/a.txt')
    for k in range(12):
      os.symlink(f'../{k}', f'{i}/to{k}')
  assert len(found('.')) == 12 == len(found('**/*.txt'))


@pytest.mark.parametrize('path', ['.', '*', '**/*.txt', 'b*'])
def test_several_names_of_one_file_are_read_once_and_told(root, path):
  write('b.txt', '../far.txt')
  os.symlink('b.txt', 'ba.txt')
  os.link('b.txt', 'bb.txt')
  os.link('b.txt', 'bc.txt')
  paths, notices = find_files(path, '.txt')
  assert [str(p) for p in paths] == ['b.txt']
  assert notices == ['3 names for a file that is read under another, and read once: the first is bb.txt, which is b.txt']


def test_copies_are_two_files(root):
  write('a.txt', 'b.txt', content='the same')
  assert found('.') == ['a.txt', 'b.txt']


@pytest.mark.parametrize('path', ['.', '*', '**/*.txt', '*ne*', '**'])
def test_a_dangling_link_is_an_error_that_names_it(root, path):
  write('a.txt', 'sub/b.txt')
  os.symlink('/not/there', 'gone.txt')
  assert error(path) == 'gone.txt: a link to /not/there, which cannot be followed; mend it or remove it'
  os.remove('gone.txt')
  os.symlink('gone', 'gone')  # a loop of one; it could have been a folder
  assert error(path) == 'gone: a link to gone, which cannot be followed; mend it or remove it'


def test_a_dangling_link_that_is_not_meant_does_no_harm(root):
  write('a.txt')
  os.symlink('/not/there', '.#lock')  # as editors leave it
  assert found('.') == ['a.txt'] == found('*')
  os.symlink('/not/there', 'gone')
  assert found('*.txt') == ['a.txt'] == found('a*')
  assert error('gone') == 'gone: a link to /not/there, which cannot be followed; mend it or remove it'
  assert error('*/x.txt') == error('gone')  # it may have led to x.txt


@pytest.mark.parametrize('path', ['.', '**/*.txt', 'sub/*.txt', '*/*.txt', 's*', 'sub'])
def test_a_folder_that_cannot_be_read_is_an_error_that_names_it(root, path, monkeypatch):
  write('a.txt', 'sub/b.txt')
  real = os.scandir

  def scandir(folder='.'):
    if pathlib.Path(folder).name == 'sub':
      raise PermissionError(errno.EACCES, 'Permission denied', str(folder))
    return real(folder)
  monkeypatch.setattr(os, 'scandir', scandir)
  assert error(path) == 'folder sub: cannot be read: Permission denied'


def test_folders_that_a_glob_matches_stand_for_their_files(root):
  write('2023/a.txt', '2023/deep/b.txt', '2023/c.md', '2024/d.txt', '2025.txt/e.txt', 'x2026/f.txt', 'g.md')
  assert found('202*') == ['2023/a.txt', '2023/deep/b.txt', '2024/d.txt', '2025.txt/e.txt']
  assert found('*') == [*found('202*'), 'g.md', 'x2026/f.txt']  # a file that a glob matches is meant, whatever its ending
  assert found('**/*.txt') == [*found('202*'), 'x2026/f.txt']
  assert found('2023/*') == ['2023/a.txt', '2023/c.md', '2023/deep/b.txt']


@pytest.mark.parametrize('pattern', ['*.txt', '*/*.txt', '**/*.txt', 's?b/*', '[ab]*.txt', '[!a]*.txt', '*/deep/*', '*/deep/c.txt',
                                     'sub/../*.txt', './*.txt', '**/deep/*.txt', 'sub/**/*.txt', '*.TXT', 'nothing*/x'])
def test_matches_are_those_of_the_standard_library(root, pattern):
  write('a.txt', 'b.txt', 'A.TXT', 'sub/a.txt', 'sub/deep/c.txt', 'sub/deep/d.md', 'sob/deep/c.txt', 'sub/deep/deep/e.txt')
  for path in (pattern, str(root / pattern)):
    expected = sorted({pathlib.Path(p) for p in glob.glob(path, recursive=True) if os.path.isfile(p)})
    folders = [p for p in glob.glob(path, recursive=True) if os.path.isdir(p)]
    below = {p for folder in folders for p in pathlib.Path(folder).rglob('*') if p.suffix == '.txt'}
    if expected or below:
      assert find_files(path, '.txt').paths == sorted({*expected, *below})
    else:
      assert error(path).endswith('the glob matches no file')


PACK = {'.gz': gzip.compress, '.zst': zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize('path', ['.', '*', '**/*.jsonl*', '**/*'])
def test_a_text_beside_its_archive_is_read_once_and_told(root, path, monkeypatch):
  raw = os.urandom(3_000_000)
  for ending, pack in {'': bytes, **PACK}.items():
    pathlib.Path(f'x.jsonl{ending}').write_bytes(pack(raw))
  write('y.jsonl', 'sub/x.jsonl.gz')
  paths, notices = find_files(path, '.jsonl')
  assert [str(p) for p in paths] == ['sub/x.jsonl.gz', 'x.jsonl', 'y.jsonl']
  assert notices == ['2 files with the text of another beside it, read once: the first is x.jsonl.gz, beside x.jsonl']
  monkeypatch.setattr(module.file_streams, 'blocks', None)
  assert find_files(path, '.jsonl').notices == notices  # compared once


@pytest.mark.parametrize('other', [b'', b'one\ntw', b'one\ntwo\nthree', b'One\ntwo\n'])
def test_a_text_beside_an_archive_of_another_text_is_an_error(root, other):
  write('x.jsonl', content='one\ntwo\n')
  pathlib.Path('x.jsonl.gz').write_bytes(gzip.compress(other))
  assert error('.', '.jsonl') == 'x.jsonl and x.jsonl.gz: two packings of one name with different texts; remove the wrong one'
  assert found('x.jsonl', '.jsonl') == ['x.jsonl']


def test_a_damaged_archive_beside_its_text_is_named(root):
  write('x.jsonl', content='one\n' * 1000)
  pathlib.Path('x.jsonl.gz').write_bytes(gzip.compress(b'one\n' * 1000)[:-9])
  assert error('.', '.jsonl') == 'data file x.jsonl.gz: the archive is truncated'


def test_files_that_only_look_alike_stay_apart(root):
  """Some network file systems number no files; one file has one name where it has one link."""
  write('a.txt', 'b.txt', 'a.txt.txt', 'a.gz')
  assert found('.') == ['a.txt', 'a.txt.txt', 'b.txt']


def test_what_cannot_be_a_path_is_an_error(root):
  os.mkfifo('pipe')
  write('sub/a.md')
  assert error('') == 'path: empty; give a file, a folder or a glob'
  assert 'NUL' in error('a\0b')
  assert error('pipe').endswith('neither a file nor a folder')
  assert error('absent').endswith('no such file or folder') and error('absent/*').endswith('the glob matches no file')
  assert error('sub').endswith('the folder has no *.txt file (nor *.txt.gz, *.txt.zst)')
