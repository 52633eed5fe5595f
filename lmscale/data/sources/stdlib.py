"""The running Python's own standard library as a corpus: text that is on every machine, nothing to download.

Two streams. `code`: the library's .py files, without site-packages, test suites, machine-specific build settings and
the help topics. `prose`: the docstrings of those files, one document per file, and Python's help topics, one each.
Docstrings take the split key of their file, so a held-out file is held out of both streams.

`stdlib_dataset.py` stores both streams with TFDS, `stdlib_source.py` opens one of them.
"""

import ast
import hashlib
import inspect
import io
import os
import pathlib
import platform
import tokenize
import warnings
from collections.abc import Iterator, Sequence

from lmscale import config as config_lib
from lmscale.data import document, file_digest

STREAMS = ('code', 'prose')
FORMAT = 1  # raise when the same sources would give other documents
LEFT_OUT = {  # other people's code, test suites, settings of one machine
  'site-packages', 'dist-packages', '__pycache__', 'test', 'tests', 'idle_test', 'sitecustomize.py',
  'usercustomize.py',
}
TOPICS = 'pydoc_data/topics.py'


def stdlib_files(root: pathlib.Path) -> list[pathlib.Path]:
  """The library's source files below `root`, sorted by path. Raises ConfigError if the sources are not installed."""
  files = []
  for folder, folders, names in os.walk(root):
    folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith('config-')]
    files += [pathlib.Path(folder, name) for name in names
              if name.endswith('.py') and name not in LEFT_OUT and not name.startswith('_sysconfigdata')]
  if not files:
    raise config_lib.ConfigError(f'data source kind stdlib: no Python sources below {root}; use kind text or jsonl')
  return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def version(root: pathlib.Path, files: Sequence[pathlib.Path]) -> str:
  """For example 'py3.12.1-0f3a…': the running Python and the SHA-256 (16 digits) of names and content of `files`."""
  total = hashlib.sha256(f'{FORMAT}'.encode())
  for path in files:
    content = file_digest.digest(path).hex()
    total.update(f'{path.relative_to(root).as_posix()} {content}\n'.encode())
  return f'py{platform.python_version()}-{total.hexdigest()[:16]}'


def code(root: pathlib.Path, files: Sequence[pathlib.Path]) -> Iterator[tuple[str, bytes, int]]:
  """(path, source as UTF-8, split key) of every file that is not empty; exact copies only once."""
  seen = set()
  for path in files:
    name = path.relative_to(root).as_posix()
    text = _source(path)
    key = document.split_key(text)
    if text and key not in seen and name != TOPICS:
      seen.add(key)
      yield name, text, key


def prose(root: pathlib.Path, files: Sequence[pathlib.Path]) -> Iterator[tuple[str, bytes, int]]:
  """(path or topic, text, split key): each file's docstrings in source order, then the help topics."""
  seen = set()
  for path in files:
    name = path.relative_to(root).as_posix()
    source = _source(path)
    text = '' if name == TOPICS else '\n\n'.join(docstrings(source))
    if text and text not in seen:
      seen.add(text)
      yield name, (text + '\n').encode(), document.split_key(source)
  if root / TOPICS in files:
    from pydoc_data import topics
    for topic in sorted(topics.topics):
      text = topics.topics[topic].encode()
      yield f'topic {topic}', text, document.split_key(text)


def docstrings(source: bytes) -> list[str]:
  """The docstrings of a module in source order, indentation removed; none if it does not parse."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # old escape sequences in the library
    try:
      tree = ast.parse(source.decode())  # as text: the coding line of the file no longer holds
    except (SyntaxError, ValueError):
      return []
  found = []

  def visit(node: ast.AST) -> None:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
      text = ast.get_docstring(node, clean=False)
      if text and text.strip():
        found.append(inspect.cleandoc(text))
    for child in ast.iter_child_nodes(node):
      if isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):
        visit(child)

  visit(tree)
  return found


def _source(path: pathlib.Path) -> bytes:
  """The file as UTF-8, whatever its coding line says."""
  raw = path.read_bytes()
  encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
  return raw.decode(encoding, 'replace').encode()
