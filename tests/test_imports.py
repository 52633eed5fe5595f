"""Who may import whom: no circle between modules, and arrows between the parts of the package that point one way."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODEL = {'config', 'kernels', 'models'}
BELOW_TRAIN = MODEL | {'parallel', 'plan', 'processes', 'data', 'batch', 'cache_root', 'exit_codes', 'unfinished'}
MAY = {  # part of lmscale -> the parts that it may import, beside itself and `errors`
  'errors': set(),
  'exit_codes': set(),
  'batch': set(),
  'unfinished': set(),
  'cache_root': set(),
  'config': set(),
  'processes': {'exit_codes', 'unfinished'},
  'data': {'config', 'batch', 'cache_root', 'unfinished'},
  'kernels': {'config', 'cache_root'},
  'models': {'config', 'kernels'},
  'parallel': MODEL | {'batch', 'processes'},
  'plan': MODEL | {'parallel'},
  'generate': MODEL | {'parallel', 'data'},
  'eval': MODEL | {'data', 'generate', 'parallel'},
  'interop': BELOW_TRAIN | {'train'},
  'train': BELOW_TRAIN | {'eval', 'generate'},  # samples are drawn and tasks are scored while a run trains
  'jobs': BELOW_TRAIN | {'eval', 'generate', 'interop', 'train'},
}
NOT_HERE = {  # part -> packages and names that it does not know
  'config': ('jax', 'flax', 'optax', 'orbax'),
  'data': ('jax', 'flax', 'optax', 'orbax'),
  'processes': ('flax', 'optax', 'orbax'),
  'models': ('jax.sharding', 'jax.experimental.shard_map', 'jax.experimental.mesh_utils'),
  'train': ('flax',),
}
EXCEPTIONS = {('lmscale.train.state', 'flax.struct')}  # dataclasses as pytrees, no modules


def module_of(path: pathlib.Path, root: pathlib.Path) -> str:
  name = '.'.join(path.relative_to(root).with_suffix('').parts)
  return name.removesuffix('.__init__')


def read_imports(root: pathlib.Path) -> dict[str, set[str]]:
  """{module of lmscale: the dotted names it imports, those inside of functions, too}."""
  found = {}
  for path in sorted((root / 'lmscale').rglob('*.py')):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        names |= {alias.name for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        assert not node.level, f'{path}: a relative import'
        names |= {f'{node.module}.{alias.name}' for alias in node.names}
    found[module_of(path, root)] = names
  return found


def edges(imports: dict[str, set[str]]) -> dict[str, set[str]]:
  """{module: modules of lmscale that it imports}: `from a.b import c` is module a.b.c if there is one, else a.b."""
  def target(name: str) -> str | None:
    while name and name not in imports:
      name = name.rpartition('.')[0]
    return name or None

  return {module: {t for t in map(target, names) if t and t != module} for module, names in imports.items()}


def find_circle(graph: dict[str, set[str]]) -> list[str]:
  """A path that comes back to its beginning, or an empty list."""
  done, path = set(), []

  def visit(node: str) -> list[str]:
    if node in path:
      return [*path[path.index(node):], node]
    if node in done:
      return []
    path.append(node)
    for other in sorted(graph[node]):
      if circle := visit(other):
        return circle
    done.add(path.pop())
    return []

  return next(filter(None, map(visit, graph)), [])


@pytest.fixture(scope='module')
def imports():
  return read_imports(ROOT)


def test_no_circle(imports):
  assert find_circle(edges(imports)) == []


def test_a_circle_is_found(tmp_path):
  for name, text in {'a': 'from lmscale import b', 'b': 'def f():\n  from lmscale.c import x', 'c': 'import lmscale.a'}.items():
    (tmp_path / 'lmscale').mkdir(exist_ok=True)
    (tmp_path / f'lmscale/{name}.py').write_text(text)
  assert find_circle(edges(read_imports(tmp_path))) == ['lmscale.a', 'lmscale.b', 'lmscale.c', 'lmscale.a']


def test_the_arrows_point_one_way(imports):
  part = {module: (module.split('.') + [''])[1] for module in imports}
  assert set(part.values()) - {''} == set(MAY), 'a new part of the package: say here what it may import'
  wrong = [
    f'{module} imports {other}' for module, others in edges(imports).items() for other in sorted(others)
    if part[module] and part[other] not in {'', 'errors', part[module], *MAY[part[module]]}
  ]  # fmt: skip
  assert not wrong


def test_parts_do_not_know_what_is_not_theirs(imports):
  wrong = [
    f'{module} imports {name}' for part, banned in NOT_HERE.items() for module, names in imports.items()
    if f'{module}.'.startswith(f'lmscale.{part}.') for name in sorted(names)
    if any(f'{name}.'.startswith(f'{b}.') for b in banned) and (module, name) not in EXCEPTIONS
  ]  # fmt: skip
  assert not wrong


def test_the_exceptions_are_still_there(imports):
  assert all(name in imports[module] for module, name in EXCEPTIONS)


def test_nothing_imports_what_stands_above_the_package(imports):
  assert not [module for module, names in imports.items() if any(name.split('.')[0] in ('run', 'tests', 'tools') for name in names)]
