"""From the command line to a Config: recipe files, their argument strings, saved configs, overrides.

A recipe is a Python file with `get_config()` or `get_config(argument)` that returns an `ml_collections.ConfigDict` made by
`lmscale.config.to_config_dict`; the part after `:` in `configs/x.py:arch=mamba2,size=8b` is its argument. A saved
`config.json` is data only: nothing in it is run.
"""

import copy
import dataclasses
import difflib
import importlib.util
import inspect
import json
import pathlib
import re
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from lmscale.config import parse
from lmscale.config.fields import Config
from lmscale.config.ramp import run_tokens
from lmscale.errors import ConfigError, UnknownField

MAX_JSON_BYTES = 1 << 20
WARMUP = 'optimizer.warmup_tokens'
# As people write numbers. Python also takes 1_0 for 10, full-width digits and spaces around them.
NUMBERS = {int: r'-?[0-9]+', float: r'-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|-?inf|nan'}


def load(spec: str, overrides: Sequence[tuple[str, str]] = ()) -> Config:
  """The config of `file.py`, `file.py:argument` or `config.json`, with overrides (dotted field, text) applied in order.

  Overrides that make the run shorter shorten its warm-up in the same proportion, unless they set optimizer.warmup_tokens.

  Raises:
    ConfigError: no such file, a file that fails, an unknown field, a value that does not parse or does not validate.
  """
  path, argument = _split(spec)
  if path.is_dir():
    raise ConfigError(f'--config: {path} is a folder; give a .py recipe or a saved config.json')
  if not path.is_file():
    raise ConfigError(f'--config: no file {path}{_near_file(path)}')
  if path.suffix == '.json':
    if argument is not None:
      raise ConfigError(f'--config: {path} is data and takes no argument {argument!r}')
    values = _read_json(path)
  elif path.suffix == '.py':
    values = _run_recipe(path, argument)
  else:
    raise ConfigError(f'--config: {path} is neither a .py recipe nor a .json config')
  recipe = copy.deepcopy(values)
  for field, text in overrides:
    _override(values, field, text)
  try:
    if WARMUP not in dict(overrides):
      _follow_length(values, recipe)
    return parse.from_dict(values)
  except UnknownField as error:
    if path.suffix == '.py':
      raise
    raise ConfigError(f'--config: {path} is of another version of lmscale or was changed by hand: {error}') from error


def change(config: Config, overrides: Sequence[tuple[str, str]]) -> Config:
  """`config` with overrides (dotted field, text) applied in order. Raises ConfigError like `load`."""
  values = parse.to_dict(config)
  for field, text in overrides:
    _override(values, field, text)
  return parse.from_dict(values)


def _follow_length(values: dict[str, Any], recipe: dict[str, Any]) -> None:
  """Where `values` make the run shorter than the recipe's, shortens its warm-up in proportion."""
  try:
    whole = parse.from_dict(recipe)
  except ConfigError:
    return  # what is wrong and not mended by `values` will be told
  if not whole.optimizer.warmup_tokens:
    return
  group = values.setdefault('optimizer', {})
  changed = parse.from_dict({**values, 'optimizer': {**group, 'warmup_tokens': 0}})
  tokens, before = run_tokens(changed.train), run_tokens(whole.train)
  if tokens < before:
    group['warmup_tokens'] = whole.optimizer.warmup_tokens * tokens // before


def arguments(text: str, allowed: Mapping[str, Sequence[str]]) -> dict[str, str]:
  """Parses a recipe's argument `key=value,key=value`; a key left out takes its first allowed value.

  Raises:
    ConfigError: an unknown key or value, or a key given twice; names what is allowed.
  """
  chosen: dict[str, str] = {}
  for part in filter(None, text.split(',')):
    key, equals, value = part.partition('=')
    if not equals or key not in allowed:
      keys = ', '.join(f'{name}={"|".join(values)}' for name, values in allowed.items())
      raise ConfigError(f'config argument {part!r}: not of the form key=value with a known key; known: {keys}')
    if key in chosen:
      raise ConfigError(f'config argument {key}: given twice')
    if value not in allowed[key]:
      raise ConfigError(f'config argument {key}: {value!r} is not one of {", ".join(allowed[key])}')
    chosen[key] = value
  return {key: chosen.get(key, values[0]) for key, values in allowed.items()}


def _split(spec: str) -> tuple[pathlib.Path, str | None]:
  match = re.match(r'(.*\.(?:py|json)):(.*)$', spec, re.DOTALL)
  return (pathlib.Path(match[1]), match[2]) if match else (pathlib.Path(spec), None)


def _near_file(path: pathlib.Path) -> str:
  folder = path.parent
  names = sorted(p.name for p in folder.glob('*') if p.suffix in ('.py', '.json')) if folder.is_dir() else []
  near = difflib.get_close_matches(path.name, names, 1, 0.7)
  return f'; did you mean {folder / near[0]}?' if near else ''


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  if path.stat().st_size > MAX_JSON_BYTES:
    raise ConfigError(f'--config: {path} has {path.stat().st_size} bytes, a config has fewer than {MAX_JSON_BYTES}')
  try:
    values = json.loads(path.read_text('utf-8'))
  except (OSError, ValueError, RecursionError) as error:
    raise ConfigError(f'--config: {path} is not a readable JSON config: {_one_line(error)}') from error
  if not isinstance(values, dict):
    raise ConfigError(f'--config: {path} holds a {type(values).__name__}, not an object of fields')
  return values


def _run_recipe(path: pathlib.Path, argument: str | None) -> dict[str, Any]:
  """Runs a recipe; whatever goes wrong inside is told as file:line and one line of reason."""
  try:
    spec = importlib.util.spec_from_file_location(f'recipe_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
  except Exception as error:
    raise _recipe_error(path, error) from error
  get_config = getattr(module, 'get_config', None)
  if not callable(get_config):
    raise ConfigError(f'--config: {path} defines no function get_config')
  takes_argument = bool(inspect.signature(get_config).parameters)
  if argument is not None and not takes_argument:
    raise ConfigError(f'--config: {path} takes no argument, but got {argument!r}')
  try:
    values = parse.plain_dict(get_config(argument) if argument is not None else get_config())
  except ConfigError:
    raise
  except Exception as error:
    raise _recipe_error(path, error) from error
  if not isinstance(values, dict):
    raise ConfigError(f'--config: get_config of {path} returned a {type(values).__name__}, not a ConfigDict')
  return values


def _recipe_error(path: pathlib.Path, error: Exception) -> ConfigError:
  file = str(path.absolute())  # as importlib names it
  if isinstance(error, SyntaxError) and error.filename in (file, str(path)):
    return ConfigError(f'{path}:{error.lineno}: {_one_line(error)}')
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename in (file, str(path))]
  where = f'{path}:{lines[-1]}' if lines else str(path)
  return ConfigError(f'{where}: {_one_line(error)}')


def _one_line(error: Exception) -> str:
  text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
  text = re.sub(r'Other fields present:.*?(?=Did you mean|\Z)', '', str(text), flags=re.DOTALL)  # ml_collections
  text = ' '.join(text.replace('\\n', ' ').split()).strip('\'"')
  return f'{type(error).__name__}: {text[:300]}'


def _override(values: dict[str, Any], field: str, text: str) -> None:
  """Sets `field` (dotted; a number picks a list's element) of nested dicts to `text`, read as the field's type."""
  kind: Any = Config
  node: Any = values
  *parents, last = field.split('.')
  for depth, name in enumerate(parents):
    node, kind = _descend(node, kind, name, '.'.join(parents[: depth + 1]), field)
  types = parse.field_types(kind) if dataclasses.is_dataclass(kind) else {}
  if last not in types or not isinstance(node, dict):
    raise parse.unknown_field(field)
  if dataclasses.is_dataclass(types[last]):
    names = ', '.join(f'{field}.{name}' for name in parse.field_types(types[last]))
    raise ConfigError(f'{field}: a group of fields; set one of {names}')
  node[last] = _parse(field, types[last], text)


def _descend(node: Any, kind: Any, name: str, path: str, field: str) -> tuple[Any, Any]:
  if item := parse.element(kind):
    if not name.isdecimal() or int(name) >= len(node):
      raise ConfigError(f'{path}: no such element; there are {len(node)}, counted from 0')
    return node[int(name)], item
  types = parse.field_types(kind) if dataclasses.is_dataclass(kind) else {}
  if name not in types or not isinstance(node, dict):
    raise parse.unknown_field(field)
  return node.setdefault(name, {}), types[name]


def _parse(field: str, kind: Any, text: str) -> Any:
  if kind is str:
    return text
  if kind is bool:
    if text.lower() not in ('true', 'false'):
      raise ConfigError(f'{field}: expected true or false, got {text!r}')
    return text.lower() == 'true'
  try:
    if kind in NUMBERS and not re.fullmatch(NUMBERS[kind], text):
      raise ValueError(text)
    return kind(text) if kind in NUMBERS else json.loads(text)
  except (ValueError, RecursionError) as error:
    expected = {int: 'an integer', float: 'a number'}.get(kind, 'a JSON list')
    raise ConfigError(f'{field}: expected {expected}, got {text[:60]!r}') from error
