"""Rotary positions as transformers' config.json has them (`rope_parameters`, of older files `rope_scaling`), both ways.

The type `dynamic` depends on the length of each text, and has no counterpart; our `ntk` is a larger `rope_theta` there.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from lmscale.config import ModelConfig, RopeScalingConfig
from lmscale.errors import ConfigError
from lmscale.interop.huggingface_fields import Fields, read_number, shown
from lmscale.models.positions import attention_factor, ntk_base

ORIGINAL, LONGEST = 'original_max_position_embeddings', 'max_position_embeddings'


def read_rope(fields: Fields, default_fraction: float) -> dict[str, Any]:
  """Fields of ModelConfig for rotary positions, from `rope_parameters` or the older names. Raises ConfigError for what lmscale lacks."""
  name = 'rope_scaling' if fields.values.get('rope_scaling') else 'rope_parameters'
  rope = fields.get(name, {})
  if not isinstance(rope, dict) or any(isinstance(v, dict) for v in rope.values()):
    raise ConfigError(f'{name}: {shown(rope)}: expected one set of values for all layers')
  base = rope.get('rope_theta', fields.get('rope_theta', 10000.0))
  fraction = rope.get('partial_rotary_factor', fields.get('partial_rotary_factor', default_fraction))
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if not isinstance(kind, str) or kind not in KINDS:
    raise ConfigError(f'{name}.rope_type: {shown(kind)} is not supported; supported: {", ".join(KINDS)}')
  lengths = (fields.values.get(ORIGINAL), rope.get(ORIGINAL), fields.values.get(LONGEST))  # transformers' order
  inner = Fields({**rope, ORIGINAL: next((n for n in lengths if n is not None), None), LONGEST: fields.values.get(LONGEST)})
  return {
    'positions': 'rope',
    'rope_base': read_number('rope_theta', base),
    'rope_fraction': read_number('partial_rotary_factor', fraction),
    'rope_scaling': KINDS[kind](inner),
  }


def write_rope(model: ModelConfig) -> dict[str, Any]:
  """The values of a config.json for the rotary positions of `model`; older names beside today's."""
  plain, scaling = with_plain_base(model), model.rope_scaling
  own = {name: getattr(scaling, field) for name, field in WRITTEN.get(scaling.kind, {}).items()}
  if scaling.kind in TURNS:
    own |= dict(zip(TURNS[scaling.kind], scaling.turns, strict=True))
  if scaling.kind == 'longrope':
    own |= {'short_factor': list(scaling.factors), 'long_factor': list(scaling.factors)}
  kind = scaling.kind if own else 'default'
  older = {'rope_theta': plain.rope_base, 'partial_rotary_factor': model.rope_fraction}
  return {'rope_parameters': {'rope_type': kind, **older, **own}, **older}


def with_plain_base(model: ModelConfig) -> ModelConfig:
  """The same function, `ntk` written as the base that it comes to."""
  scaling = model.rope_scaling
  if scaling.kind != 'ntk':
    return model
  rotary = int(model.attention.head_dim * model.rope_fraction)
  return dataclasses.replace(model, rope_base=ntk_base(model.rope_base, scaling.factor, rotary), rope_scaling=RopeScalingConfig())


TURNS = {'llama3': ('low_freq_factor', 'high_freq_factor'), 'yarn': ('beta_slow', 'beta_fast')}
LONGER = {'factor': 'factor', ORIGINAL: 'length'}
WRITTEN = {'linear': {'factor': 'factor'}, 'yarn': LONGER, 'llama3': LONGER, 'longrope': LONGER}


def _default(rope: Fields) -> RopeScalingConfig:
  return RopeScalingConfig()


def _linear(rope: Fields) -> RopeScalingConfig:
  return RopeScalingConfig('linear', factor=rope.number('factor'))


def _llama3(rope: Fields) -> RopeScalingConfig:
  return RopeScalingConfig('llama3', rope.number('factor'), rope.integer(ORIGINAL), tuple(rope.number(name) for name in TURNS['llama3']))


def _yarn(rope: Fields) -> RopeScalingConfig:
  rope.must('truncate', True, True)
  turns = rope.number('beta_slow', 1.0), rope.number('beta_fast', 32.0)
  scaling = RopeScalingConfig('yarn', _factor(rope), rope.integer(ORIGINAL), turns)
  if rope.values.get('mscale') and rope.values.get('mscale_all_dim'):
    over, under = (0.1 * rope.number(name) * math.log(max(scaling.factor, 1)) + 1 for name in ('mscale', 'mscale_all_dim'))
    return _with_factor_of_its_kind(scaling, 'mscale', over / under)
  return _with_factor_of_its_kind(scaling, 'attention_factor', rope.values.get('attention_factor'))


def _longrope(rope: Fields) -> RopeScalingConfig:
  short, long = rope.get('short_factor'), rope.get('long_factor')
  if short != long:
    raise ConfigError('short_factor: not the same as long_factor; texts of all lengths have the same positions here: write the one that '
                      f'is to be used, long_factor for texts beyond {rope.integer(ORIGINAL)} tokens, in place of both')
  if not isinstance(long, list):
    raise ConfigError(f'long_factor: {shown(long)}: expected a list of numbers')
  factors = tuple(read_number('long_factor', value) for value in long)
  scaling = RopeScalingConfig('longrope', _factor(rope), rope.integer(ORIGINAL), factors=factors)
  return _with_factor_of_its_kind(scaling, 'attention_factor', rope.values.get('attention_factor'))


def _factor(rope: Fields) -> float:
  """`factor`, or where it is null how many times longer the longest texts are than those that were trained."""
  return rope.number('factor', rope.integer(LONGEST) / rope.integer(ORIGINAL) if rope.values.get('factor') is None else None)


def _with_factor_of_its_kind(scaling: RopeScalingConfig, name: str, given: Any) -> RopeScalingConfig:
  """`scaling`, where `given` (None: nothing) is what its kind multiplies queries and keys by."""
  if given is not None and scaling.factor >= 1 and scaling.length > 1:  # else it is refused for that
    own = attention_factor(scaling)
    if not math.isclose(read_number(name, given), own, rel_tol=1e-6):
      raise ConfigError(f'{name}: {shown(given)} is not supported; lmscale has the one that follows from factor {scaling.factor:g}, {own:.6f}')
  return scaling


KINDS: Mapping[str, Callable[[Fields], RopeScalingConfig]] = {
  'default': _default, 'linear': _linear, 'llama3': _llama3, 'yarn': _yarn, 'longrope': _longrope,
}  # fmt: skip
