"""What two configs differ in, and which fields may: of a run that goes on, and of a model whose parameters are taken over."""

import json
from typing import Any

from lmscale import config as config_lib
from lmscale.config import USES, Config

# A resumed run may change how and for how long it runs, and what it skips, not what it computes. Fields not named here may not change.
MAY_CHANGE = (
  'name', 'emulate', 'mesh.', 'loop.', 'generate.', 'eval.', 'data.cache', 'train.microbatch', 'train.remat', 'train.stored_microbatches', 'train.stack', 'train.loss_chunk',
  'train.nonfinite_budget', 'train.spike_skip', 'train.spike_budget', 'train.deterministic', 'model.attention.implementation',
  'model.mamba2.implementation', 'model.mamba2.chunk', 'model.mamba.implementation', 'model.mamba.chunk',
)  # fmt: skip
# Of a model whose parameters another one takes over: what is no part of the function, and what may be changed on purpose.
NO_FUNCTION = ('model.init_std', 'model.pattern', *(name for name in MAY_CHANGE if name.startswith('model.')))
ON_PURPOSE = ('train.seq_len', 'model.rope_base', 'model.rope_scaling.', 'model.mamba2.dt_min', 'model.mamba2.dt_max')


def changed_function(old: Config, new: Config) -> list[str]:
  """A line for each field that makes equal parameters another function."""
  lines = [] if old.model.layers == new.model.layers else changed(old, new, ('model.pattern',))
  return lines + changed(old, new, ('model.',), but=(*NO_FUNCTION, *ON_PURPOSE, *unused_fields(old, new)))


def unused_fields(old: Config, new: Config) -> tuple[str, ...]:
  """Beginnings of the names of fields that have no effect on models of these layers."""
  unused = [f'{section}.' for section, symbol in USES.items() if symbol not in new.model.layers]
  if not set(new.model.layers) & set('*-'):
    unused.append('model.bias')
  positions = (old.model.positions, new.model.positions)
  if 'rope' not in positions or '*' not in new.model.layers:
    unused.append('model.rope_')
  if 'learned' not in positions and '*' not in new.model.layers:
    unused.append('model.positions')
  return tuple(unused)


def changed(old: Config, new: Config, of: tuple[str, ...] = ('',), but: tuple[str, ...] = ()) -> list[str]:
  """`field: before -> after` for each field of two configs that differs. of, but: beginnings of names, a whole name included."""
  before, after = (config_lib.flatten(config_lib.to_dict(config)) for config in (old, new))
  return [f'{name}: {show(before, name)} -> {show(after, name)}' for name in {**before, **after}
          if before.get(name) != after.get(name) and _named(name, of) and not _named(name, but)]  # fmt: skip


def _named(name: str, beginnings: tuple[str, ...]) -> bool:
  """Whether `beginnings` holds the name, or a prefix of it that ends with a dot or an underscore (or is empty)."""
  return any(name == b or b[-1:] in ('', '.', '_') and name.startswith(b) for b in beginnings)


def show(values: dict[str, Any], name: str) -> str:
  """A value of flattened ones as JSON, or `absent`."""
  return json.dumps(values[name]) if name in values else 'absent'
