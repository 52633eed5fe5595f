import importlib.util
import logging
import pathlib
import sys
import sysconfig

import numpy as np
import pytest

from lmscale import config as config_lib
from lmscale.data import document
from lmscale.data.reading_notes import Notes
from lmscale.data.sources import stdlib, stdlib_dataset
from lmscale.data.sources.stdlib_source import StdlibSource

ROOT = pathlib.Path(sysconfig.get_path('stdlib'))


def library(root, **files):
  for name, content in files.items():
    path = root / f'{name.replace("__", "/")}.py'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return root


def test_the_real_library_end_to_end_without_tensorflow(tmp_path, capfd, caplog):
  files = [path for path in stdlib.stdlib_files(ROOT) if path.parent.name in ('json', 'pydoc_data')]
  with caplog.at_level(logging.INFO):
    streams = {stream: StdlibSource(stream, tmp_path, files) for stream in stdlib.STREAMS}
    found = {stream: list(source.documents(Notes())) for stream, source in streams.items()}
  assert importlib.util.find_spec('tensorflow') is None and 'tensorflow' not in sys.modules
  assert capfd.readouterr() == ('', '') and not caplog.records
  assert (ROOT / 'json/decoder.py').read_bytes() in [document.text for document in found['code']]
  assert not any(b'topics = {' in text for text, *_ in found['code'])
  assert any(text.startswith(b'JSON (JavaScript Object Notation)') for text, *_ in found['prose'])
  assert any(b'The "assert" statement' in text for text, *_ in found['prose'])
  streams = stdlib_dataset.prepare(tmp_path, ROOT, files)
  assert 'json/decoder.py' in [example['name'].decode() for example in streams['code']]
  assert streams['prose'][len(streams['prose']) - 1]['name'].startswith(b'topic ')


def test_file_list_leaves_out_tests_other_packages_and_settings(tmp_path):
  library(tmp_path, b='b', a='a', sub__c='c', test__x='', ctypes__test__x='', json__tests__x='', **{
    'site-packages__x': '', 'config-3.11-x__y': '', '_sysconfigdata_linux': '', 'sitecustomize': ''})
  assert [path.relative_to(tmp_path).as_posix() for path in stdlib.stdlib_files(tmp_path)] == [
    'a.py', 'b.py', 'sub/c.py']
  with pytest.raises(config_lib.ConfigError, match='no Python sources'):
    stdlib.stdlib_files(tmp_path / 'missing')


def test_streams_hold_what_they_should(tmp_path):
  library(tmp_path, a='"""Module."""\nclass A:\n  """Class."""\n  def f(self):\n    """Method.\n\n       More."""\n',
          b='x = 1\n', c='x = 1\n', d='', e='def f(:', f=b'# coding: latin-1\n"""caf\xe9"""\n',
          g='try:\n  def f():\n    "inner"\nexcept A:\n  def g():\n    "other"\n')
  files = stdlib.stdlib_files(tmp_path)
  code = {name: (text, key) for name, text, key in stdlib.code(tmp_path, files)}
  assert sorted(code) == ['a.py', 'b.py', 'e.py', 'f.py', 'g.py']  # c is a copy of b, d is empty
  prose = {name: (text.decode(), key) for name, text, key in stdlib.prose(tmp_path, files)}
  assert {name: text for name, (text, _) in prose.items()} == {
    'a.py': 'Module.\n\nClass.\n\nMethod.\n\nMore.\n', 'f.py': 'café\n', 'g.py': 'inner\n\nother\n'}
  for name, (_, key) in prose.items():
    assert key == code[name][1] == document.split_key(code[name][0])


def test_version_names_python_and_content(tmp_path):
  files = stdlib.stdlib_files(library(tmp_path, a='a', b='b'))
  first = stdlib.version(tmp_path, files)
  assert first.startswith(f'py{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}-')
  assert first == stdlib.version(tmp_path, files) != stdlib.version(tmp_path, files[:1])
  (tmp_path / 'a.py').write_text('changed')
  assert stdlib.version(tmp_path, files) != first


def test_order_and_keys_survive_the_data_set(tmp_path):
  files = stdlib.stdlib_files(library(tmp_path / 'lib', **{
    f'm{i:03}': f'"""Doc {i}."""\nx = {i}\n' for i in range(250)}))
  streams = stdlib_dataset.prepare(tmp_path / 'cache', tmp_path / 'lib', files)
  assert [(e['name'].decode(), e['text'], int(e['split_key'])) for e in streams['code']] == list(
    stdlib.code(tmp_path / 'lib', files))
  assert len(streams['prose']) == 250
  assert np.uint64(streams['prose'][3]['split_key']) == streams['code'][3]['split_key']


def test_a_length_that_is_not_the_splits_is_noticed(tmp_path):
  files = stdlib.stdlib_files(library(tmp_path / 'lib', a='"""A."""', b='"""B."""'))
  stdlib_dataset.prepare(tmp_path / 'cache', tmp_path / 'lib', files)
  folder = next((tmp_path / 'cache' / 'stdlib').iterdir())
  stdlib_dataset.open_streams(folder)
  info = next(folder.rglob('dataset_info.json'))
  info.write_text(info.read_text().replace('"2"', '"3"'))
  with pytest.raises(config_lib.ConfigError, match='hold 2 records, but 3 were written'):
    stdlib_dataset.open_streams(folder)
  assert len(stdlib_dataset.prepare(tmp_path / 'cache', tmp_path / 'lib', files)['code']) == 2  # built again
  stdlib_dataset.open_streams(folder)
  records = next(folder.rglob('*-prose.array_record*'))
  records.write_bytes(records.read_bytes()[:100])
  assert len(stdlib_dataset.prepare(tmp_path / 'cache', tmp_path / 'lib', files)['prose']) == 2


def test_a_library_that_changes_while_it_is_read_leaves_nothing(tmp_path, monkeypatch):
  files = stdlib.stdlib_files(library(tmp_path / 'lib', a='"""A."""', b='"""B."""'))
  real = stdlib.docstrings
  monkeypatch.setattr(stdlib, 'docstrings', lambda source: files[0].write_text('x = 1') and real(source))
  with pytest.raises(config_lib.ConfigError, match='lib changed while it was read'):
    stdlib_dataset.prepare(tmp_path / 'cache', tmp_path / 'lib', files)
  assert list((tmp_path / 'cache' / 'stdlib').iterdir()) == []


def test_a_damaged_record_is_an_error_that_says_what_to_delete(tmp_path):
  files = stdlib.stdlib_files(library(tmp_path / 'lib', a='"""A."""\n' + 'x = 1\n' * 99, b='"""B."""'))
  source = StdlibSource('code', tmp_path / 'cache', files)
  source.root = tmp_path / 'lib'
  stdlib_dataset.prepare(tmp_path / 'cache', tmp_path / 'lib', files)
  records = next((tmp_path / 'cache' / 'stdlib').rglob('*-code.array_record*'))
  raw = bytearray(records.read_bytes())
  raw[raw.index(b'x = 1') if b'x = 1' in raw else 200] ^= 255
  records.write_bytes(raw)
  with pytest.raises(config_lib.ConfigError, match=r'cache/stdlib: example 0 of code cannot be read: .*; delete the folder'):
    list(source.documents(Notes()))


def test_unknown_stream_is_a_config_error(tmp_path):
  with pytest.raises(config_lib.ConfigError, match="'poetry'.*code, prose"):
    StdlibSource('poetry', tmp_path)
