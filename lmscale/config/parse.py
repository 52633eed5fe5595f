"""Between a config's frozen dataclasses and plain values: dicts for JSON, a `ConfigDict` for a recipe to change."""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from lmscale.config.checks import validate
from lmscale.config.fields import Config
from lmscale.config.scaling import renamed
from lmscale.errors import ConfigError, UnknownField


def to_dict(config: Any) -> dict[str, Any]:
  """The config as plain dicts, lists, strings and numbers, fit for JSON: the exact inverse of `from_dict`."""

  def plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
      return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [plain(v) for v in value] if isinstance(value, tuple) else value

  return plain(config)


def flatten(value: Any, prefix: str = '') -> dict[str, Any]:
  """Nested dicts and lists, such as `to_dict` gives, as {dotted path: leaf}; empty ones vanish."""
  items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
  if items is None:
    return {prefix: value}
  join = prefix + '.' if prefix else ''
  return {name: leaf for key, part in items for name, leaf in flatten(part, f'{join}{key}').items()}


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
  """A mutable, locked copy for a recipe to change: a field that does not exist cannot be set by accident."""
  values = to_dict(config)
  values['data']['sources'] = tuple(values['data']['sources'])
  for section, name in ((values['generate'], 'stop'), (values['model']['rope_scaling'], 'turns'), (values['model']['rope_scaling'], 'factors')):
    section[name] = tuple(section[name])
  return ml_collections.ConfigDict(values).lock()


def plain_dict(values: Any) -> Any:
  """Mappings (`ConfigDict` included), lists and tuples as plain dicts and lists; everything else unchanged."""
  if isinstance(values, Mapping | ml_collections.ConfigDict):
    return {str(key): plain_dict(value) for key, value in values.items()}
  return [plain_dict(v) for v in values] if isinstance(values, list | tuple) else values


def from_dict(values: Any) -> Config:
  """Frozen dataclasses from a mapping; fields left out keep their defaults.

  Types are strict: an int is neither a bool nor 64.0; a float may be written as an int. Names of older versions are understood.

  Raises:
    ConfigError: an unknown field, a wrong type, or anything `validate` rejects.
  """
  config = _build(Config, renamed(plain_dict(values)), '')
  validate(config)
  return config


def field_types(section: type) -> dict[str, Any]:
  """Field names of a section and their types, in order."""
  hints = typing.get_type_hints(section)
  return {f.name: hints[f.name] for f in dataclasses.fields(section)}


def element(field_type: Any) -> Any:
  """The element type of a tuple field, or None."""
  return typing.get_args(field_type)[0] if typing.get_origin(field_type) is tuple else None


def unknown_field(path: str) -> UnknownField:
  """The error for a field that does not exist, with the nearest one that does."""
  known = _paths(Config, '')
  by_leaf: dict[str, list[str]] = {}
  for name in known:
    by_leaf.setdefault(name.rpartition('.')[2], []).append(name)
  leaf = path.rpartition('.')[2]
  near = difflib.get_close_matches(path, known, 1, 0.8)
  near = near or [n for m in difflib.get_close_matches(leaf, by_leaf, 1, 0.6) for n in by_leaf[m]]
  near = near or difflib.get_close_matches(path, known, 1, 0.4)
  return UnknownField(f'{path}: no such field' + (f'; did you mean {" or ".join(near)}?' if near else ''))


def _paths(section: type, prefix: str) -> list[str]:
  found = []
  for name, kind in field_types(section).items():
    found.append(prefix + name)
    found += _paths(kind, f'{prefix}{name}.') if dataclasses.is_dataclass(kind) else []
    if dataclasses.is_dataclass(element(kind)):
      found += _paths(element(kind), f'{prefix}{name}.0.')
  return found


def _build(kind: Any, value: Any, path: str) -> Any:
  """`value` as type `kind`, or a ConfigError that names `path`."""
  if dataclasses.is_dataclass(kind):
    if not isinstance(value, dict):
      raise ConfigError(f'{path or "config"}: expected a group of fields, got {_shown(value)}')
    types = field_types(kind)
    prefix = f'{path}.' if path else ''
    for name in value:
      if name not in types:
        raise unknown_field(prefix + name)
    return kind(**{name: _build(types[name], v, prefix + name) for name, v in value.items()})
  if item := element(kind):
    if not isinstance(value, list):
      raise ConfigError(f'{path}: expected a list, got {_shown(value)}')
    return tuple(_build(item, v, f'{path}.{i}') for i, v in enumerate(value))
  if kind is float and type(value) is int:
    return float(value)
  if type(value) is not kind:
    expected = {int: 'an integer', float: 'a number', bool: 'true or false', str: 'a string'}[kind]
    raise ConfigError(f'{path}: expected {expected}, got {_shown(value)}')
  return value


def _shown(value: Any) -> str:
  text = ' '.join(repr(value).split())
  return f'{text if len(text) <= 60 else text[:57] + "..."} ({type(value).__name__})'
