"""How many parameters a model has, and where they are. Everything comes from the layers' own declarations."""

import math
from collections import Counter

from lmscale.config import ModelConfig
from lmscale.models.layers import LAYERS
from lmscale.models.model import param_specs

KINDS = ('embedding', 'positions', *(layer.section for layer in LAYERS.values()), 'norms', 'head')


def parameters_by_kind(config: ModelConfig) -> dict[str, int]:
  """Parameters of each of `KINDS`; `norms` are the pre-norms and the final one, a mixer's inner norm is the mixer's."""
  specs = param_specs(config)
  counts: Counter[str] = Counter()
  for symbol, layer in zip(config.layers, specs['layers'], strict=True):
    for name, spec in layer.items():
      counts['norms' if name.startswith('norm_') else LAYERS[symbol].section] += math.prod(spec.shape)
  outer = {'tokens': 'embedding', 'positions': 'positions', 'kernel': 'head'}
  for part in ('embed', 'final_norm', 'head'):
    for name, spec in specs.get(part, {}).items():
      counts[outer.get(name, 'norms')] += math.prod(spec.shape)
  return {kind: counts[kind] for kind in KINDS}


def parameter_count(config: ModelConfig) -> int:
  """All parameters; a tied head is counted once."""
  return sum(parameters_by_kind(config).values())
