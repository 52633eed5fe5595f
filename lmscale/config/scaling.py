"""Checks of scaled rotary positions (`model.rope_scaling`), and how older configs wrote them."""

import math
from typing import Any

from lmscale.config.fields import Config, RopeScalingConfig
from lmscale.errors import ConfigError

READ = {
  'none': (), 'linear': ('factor',), 'ntk': ('factor',), 'yarn': ('factor', 'length', 'turns'), 'llama3': ('factor', 'length', 'turns'),
  'longrope': ('factor', 'length', 'factors'),
}  # fmt: skip
SECTION = 'model.rope_scaling'
FACTORS = (1e-3, 1e6)  # where LongRoPE's must lie
OLDER = {name: f'rope_scaling_{name}' for name in ('factor', 'length', 'low', 'high')}  # one field each, of llama3 alone


def check_scaling(config: Config) -> None:
  """Raises ConfigError where a kind lacks what it reads, or is given what it does not."""
  model, scaling = config.model, config.model.rope_scaling
  if scaling.kind != 'none' and model.positions != 'rope':
    raise ConfigError(f'{SECTION}.kind: {scaling.kind} is only used with model.positions=rope, not {model.positions}; set it to none')
  for name in ('factor', 'length', 'turns', 'factors'):
    value, unset, read = getattr(scaling, name), getattr(RopeScalingConfig, name), name in READ[scaling.kind]
    if read and name != 'factor' and value == unset:
      raise ConfigError(f'{SECTION}.{name}: not set; {SECTION}.kind={scaling.kind} reads {", ".join(READ[scaling.kind])}')
    if not read and value != unset:
      raise ConfigError(f'{SECTION}.{name}: {_shown(value)} is not used with {SECTION}.kind={scaling.kind}; leave it out')
  if scaling.turns:
    _check_turns(scaling)
  if scaling.kind == 'yarn' and model.rope_base <= 1:
    raise ConfigError(f'model.rope_base: {model.rope_base:g} is not above 1, and {SECTION}.kind=yarn divides by its logarithm')
  rotated = int(model.attention.head_dim * model.rope_fraction)
  if scaling.kind == 'ntk' and rotated < 4:
    raise ConfigError(f'{SECTION}.kind: ntk slows the slowest of several rotations; {rotated} rotated dimensions have one')
  if scaling.factors:
    _check_factors(scaling, rotated)


def _check_turns(scaling: RopeScalingConfig) -> None:
  turns = scaling.turns
  if len(turns) != 2 or not 0 < turns[0] < turns[1] < math.inf:
    raise ConfigError(f'{SECTION}.turns: {_shown(turns)} is not [low, high] with 0 < low < high; Llama 3.1 has [1, 4], YaRN [1, 32]')


def _check_factors(scaling: RopeScalingConfig, rotated: int) -> None:
  factors, (low, high) = scaling.factors, FACTORS
  if len(factors) != rotated // 2:
    raise ConfigError(f'{SECTION}.factors: {len(factors)} numbers for {rotated} rotated dimensions / 2 = {rotated // 2} rotations; give one each')
  if wrong := [factor for factor in factors if not low <= factor <= high]:
    raise ConfigError(f'{SECTION}.factors: {wrong[0]} is not in [{low:g}, {high:g}]')
  if scaling.length < 2:
    raise ConfigError(f'{SECTION}.length: {scaling.length} is less than 2, and longrope divides by its logarithm')


def _shown(value: Any) -> str:
  return str(list(value) if isinstance(value, tuple) else value)


def renamed(values: Any) -> Any:
  """The plain values of a config with the fields of older versions under today's names; anything else as it is."""
  model = values.get('model') if isinstance(values, dict) else None
  if not isinstance(model, dict) or not model.keys() & set(OLDER.values()):
    return values
  old = {name: model[field] for name, field in OLDER.items() if model.get(field)}
  kept = {name: value for name, value in model.items() if name not in OLDER.values()}
  if old:
    turns = [old.pop(name) for name in ('low', 'high') if name in old]
    kept['rope_scaling'] = {'kind': 'llama3', 'turns': turns} | old | kept.get('rope_scaling', {})
  return values | {'model': kept}
