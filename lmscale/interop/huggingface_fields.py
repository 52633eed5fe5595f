"""Checked access to the values of an untrusted `config.json` of a Hugging Face model; each error names the field."""

import math
from collections.abc import Mapping
from typing import Any

from lmscale.errors import ConfigError

LARGEST = 1 << 28  # bound on every size


class Fields:
  """Checked access to the values of an untrusted `config.json`; each error names the field."""

  def __init__(self, values: Mapping[str, Any]):
    self.values = values
    self.notes: list[str] = []  # for people
    self.dt_min: float | None = None

  def get(self, name: str, default: Any = None) -> Any:
    """The value, or `default` where it is absent or null; without a default the field is required."""
    value = self.values.get(name)
    if value is None and default is None:
      raise ConfigError(f'{name}: missing from config.json')
    return default if value is None else value

  def integer(self, name: str, default: int | None = None, largest: int = LARGEST) -> int:
    value = self.get(name, default)
    if type(value) is not int or not 1 <= value <= largest:
      raise ConfigError(f'{name}: {shown(value)} is not an integer from 1 to {largest}')
    return value

  def number(self, name: str, default: float | None = None) -> float:
    value = read_number(name, self.get(name, default))
    if math.isinf(value):
      raise ConfigError(f'{name}: {value} is not finite')
    return value

  def flag(self, name: str, default: bool) -> bool:
    value = self.get(name, default)
    if type(value) is not bool:
      raise ConfigError(f'{name}: {shown(value)} is not true or false')
    return value

  def choice(self, name: str, table: Mapping[str, str]) -> str:
    value = self.get(name)
    if not isinstance(value, str) or value not in table:
      raise ConfigError(f'{name}: {shown(value)} is not supported; supported: {", ".join(table)}')
    return table[value]

  def must(self, name: str, wanted: Any, default: Any) -> None:
    """Refuses any other value than `wanted`; `default` stands for an absent one."""
    value = self.values.get(name, default)
    if value != wanted:
      raise ConfigError(f'{name}: {shown(value)} is not supported; lmscale has {shown(wanted)} alone')


def read_number(name: str, value: Any) -> float:
  """A number; transformers writes infinity as {"__float__": "Infinity"}."""
  if isinstance(value, dict) and set(value) == {'__float__'}:
    try:
      value = float(value['__float__'])
    except (TypeError, ValueError):
      value = None
  if type(value) is int and abs(value) <= LARGEST:
    value = float(value)
  if type(value) is not float or math.isnan(value):
    raise ConfigError(f'{name}: {shown(value)} is not a number')
  return value


def shown(value: Any) -> str:
  """A value in a message, cut where it is long."""
  text = repr(value)
  return text if len(text) <= 60 else text[:57] + '...'
