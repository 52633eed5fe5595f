"""The layer pattern: its symbols, and the rule that turns ratios into one.

A pattern is a string with one symbol per layer. It is written out in a config, or made by `hybrid_pattern` from the
shares of attention and MLP layers, the way the 8B Mamba-2-Hybrid of arXiv 2406.07887 was described (8 % attention,
50 % MLP, spread evenly, Mamba-2 first).
"""

import math

from lmscale.errors import ConfigError

LAYER_KINDS = {'M': 'Mamba-2', 'm': 'Mamba', '*': 'attention', '-': 'MLP'}


def hybrid_pattern(layers: int, attention_ratio: float, mlp_ratio: float, mixer: str = 'M') -> str:
  """Spreads attention and MLP layers evenly over a stack of Mamba layers.

  The rule is the one published with the 8B hybrid (Megatron-LM's allocation): `round(layers * ratio)` layers of each
  kind; the other layers form equal runs with one attention layer between two runs, so the stack neither starts nor
  ends with attention; MLP layers are then spread over the remaining places and lean towards the end.

  Args:
    layers: depth of the stack, at least 1.
    attention_ratio: share of attention layers, in [0, 1].
    mlp_ratio: share of MLP layers, in [0, 1]; together with `attention_ratio` at most 1.
    mixer: symbol of the remaining layers, `M` or `m`.

  Raises:
    ConfigError: a ratio outside [0, 1], or more attention and MLP layers than places.
  """
  if layers < 1:
    raise ConfigError(f'layers: {layers} is not a depth; give at least 1')
  for name, ratio in (('attention_ratio', attention_ratio), ('mlp_ratio', mlp_ratio)):
    if not 0 <= ratio <= 1 or not math.isfinite(ratio):
      raise ConfigError(f'{name}: {ratio} is outside [0, 1]')
  attention, mlp = round(layers * attention_ratio), round(layers * mlp_ratio)
  mixers = layers - attention - mlp
  if mixers < 0:
    raise ConfigError(
      f'attention_ratio and mlp_ratio: {attention} attention + {mlp} MLP layers = {attention + mlp} '
      f'exceed layers {layers}; lower a ratio'
    )
  others = _spread(layers, attention)
  inner = iter(_spread_mlp(mixers, mlp, mixer))
  return ''.join('*' if chosen else next(inner) for chosen in others)


def _spread(places: int, chosen: int) -> list[bool]:
  """Marks `chosen` of `places` so that the unmarked ones form `chosen + 1` runs of equal real length."""
  run = (places - chosen) / (chosen + 1)
  left, marks = run, []
  for _ in range(places):
    mark = left < 0.5 and sum(marks) < chosen
    left += run if mark else -1
    marks.append(mark)
  return marks


def _spread_mlp(mixers: int, mlp: int, mixer: str) -> str:
  """The same walk with `mixers / mlp` mixers before each MLP layer."""
  if not mlp:
    return mixer * mixers
  run = mixers / mlp
  left, symbols = run, ''
  for _ in range(mixers + mlp):
    is_mlp = left < 0.5 and symbols.count('-') < mlp or symbols.count(mixer) == mixers
    left += run if is_mlp else -1
    symbols += '-' if is_mlp else mixer
  return symbols
