"""What the tensors of Hugging Face models are called, and of which of our parameters each is made: one table for both ways.

A line of a table reads `theirs: (form, ours ...)`: their tensor holds our parameters one after another along its first dim,
each in a form:

  linear  ours [in, out], theirs [out, in], as torch stores a linear map
  conv    ours [width, channels], theirs [channels, 1, width]
  same    as it is

Shapes follow from ours, so a table cannot get one wrong. Rotary positions rotate halves in both, so nothing is permuted.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from lmscale.config import ModelConfig
from lmscale.models import model as model_lib

Table = dict[str, tuple[str, str]]

MAMBA2: Table = {
  'in_proj.weight': ('linear', 'z_kernel x_kernel B_kernel C_kernel dt_kernel'),
  'conv1d.weight': ('conv', 'conv_x_kernel conv_B_kernel conv_C_kernel'),
  'conv1d.bias': ('same', 'conv_x_bias conv_B_bias conv_C_bias'),
  'dt_bias': ('same', 'dt_bias'),
  'A_log': ('same', 'A_log'),
  'D': ('same', 'D'),
  'norm.weight': ('same', 'gate_norm_scale'),
  'out_proj.weight': ('linear', 'out_kernel'),
}
MAMBA: Table = {
  'in_proj.weight': ('linear', 'x_kernel z_kernel'),
  'conv1d.weight': ('conv', 'conv_kernel'),
  'conv1d.bias': ('same', 'conv_bias'),
  'x_proj.weight': ('linear', 'bcdt_kernel'),  # dt's low-rank input, B, C
  'dt_proj.weight': ('linear', 'dt_kernel'),
  'dt_proj.bias': ('same', 'dt_bias'),
  'A_log': ('same', 'A_log'),
  'D': ('same', 'D'),
  'out_proj.weight': ('linear', 'out_kernel'),
}
ATTENTION: Table = {
  'q_proj.weight': ('linear', 'q_kernel'),
  'k_proj.weight': ('linear', 'k_kernel'),
  'v_proj.weight': ('linear', 'v_kernel'),
  'o_proj.weight': ('linear', 'out_kernel'),
  'q_proj.bias': ('same', 'q_bias'),
  'k_proj.bias': ('same', 'k_bias'),
  'v_proj.bias': ('same', 'v_bias'),
  'o_proj.bias': ('same', 'out_bias'),
}
MLP: Table = {
  'gate_proj.weight': ('linear', 'gate_kernel'),
  'up_proj.weight': ('linear', 'up_kernel'),
  'down_proj.weight': ('linear', 'down_kernel'),
  'gate_proj.bias': ('same', 'gate_bias'),
  'up_proj.bias': ('same', 'up_bias'),
  'down_proj.bias': ('same', 'down_bias'),
}
MIXERS = {'M': MAMBA2, 'm': MAMBA, '*': ATTENTION, '-': MLP}
NORM: Table = {'weight': ('same', 'norm_scale'), 'bias': ('same', 'norm_bias')}


@dataclasses.dataclass(frozen=True)
class Family:
  """How a family calls its parts. prefix: of all names in a file but the head's. places: for a kind of layer, what its norm and
  its mixer are called. per_block: how many of our layers are one of theirs."""

  prefix: str
  embed: str
  final_norm: str
  places: dict[str, tuple[str, str]]
  per_block: int = 1


ONE_NORM = ('norm', 'mixer')
BLOCK = {'*': ('input_layernorm', 'self_attn'), '-': ('post_attention_layernorm', 'mlp')}
FAMILIES = {
  'llama': Family('model.', 'embed_tokens', 'norm', BLOCK, 2),
  'nemotron': Family('model.', 'embed_tokens', 'norm', BLOCK, 2),
  'bamba': Family(
    'model.', 'embed_tokens', 'final_layernorm',
    {'*': BLOCK['*'], 'M': ('input_layernorm', 'mamba'), '-': ('pre_ff_layernorm', 'feed_forward')}, 2,
  ),
  'nemotron_h': Family('backbone.', 'embeddings', 'norm_f', dict.fromkeys('M*-', ONE_NORM)),
  'mamba': Family('backbone.', 'embeddings', 'norm_f', {'m': ONE_NORM}),
  'mamba2': Family('backbone.', 'embeddings', 'norm_f', {'M': ONE_NORM}),
}  # fmt: skip
PREFIXES = ('model.', 'backbone.')  # a file may have either: NemotronH's have the one in memory and the other on disk


@dataclasses.dataclass(frozen=True)
class Part:
  """One parameter of ours in a tensor of theirs. name: canonical, `layers/3/q_kernel` or `embed/tokens`; shape: ours."""

  name: str
  form: str
  shape: tuple[int, ...]

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def stored(self) -> tuple[int, ...]:
    """The shape of theirs."""
    if self.form == 'conv':
      return (self.shape[1], 1, self.shape[0])
    return self.shape[::-1] if self.form == 'linear' else self.shape

  def to_ours(self, theirs: np.ndarray) -> np.ndarray:
    """Our parameter of this part of their tensor."""
    return theirs[:, 0].T if self.form == 'conv' else theirs.T if self.form == 'linear' else theirs

  def to_theirs(self, ours: np.ndarray) -> np.ndarray:
    """Inverse of `to_ours`."""
    return ours.T[:, None] if self.form == 'conv' else ours.T if self.form == 'linear' else ours


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of theirs; its parts lie one after another along its first dim."""

  name: str
  parts: tuple[Part, ...]

  @property
  def shape(self) -> tuple[int, ...]:
    first = sum(part.stored[0] for part in self.parts)
    return (first, *self.parts[0].stored[1:])

  @property
  def rows(self) -> Iterator[tuple[Part, int, int]]:
    """(part, its first row, the row behind its last)."""
    start = 0
    for part in self.parts:
      yield part, start, start + part.stored[0]
      start += part.stored[0]


def tensors(family: str, config: ModelConfig) -> list[Tensor]:
  """Every tensor of a model, in the order of its layers; together they hold each parameter once.

  Raises:
    ValueError: a parameter that the tables do not know.
  """
  names, specs = FAMILIES[family], model_lib.param_specs(config)
  outer = {'embed': specs['embed'], 'final_norm': specs['final_norm'], 'head': specs.get('head', {})}
  found = [*_table({f'{names.prefix}{names.embed}.weight': ('same', 'tokens')}, outer['embed'], '', 'embed/')]
  for index, (kind, layer) in enumerate(zip(config.layers, specs['layers'], strict=True)):
    norm, mixer = names.places[kind]
    block = f'{names.prefix}layers.{index // names.per_block}'
    table = {f'{norm}.{name}': line for name, line in NORM.items()} | {f'{mixer}.{name}': line for name, line in MIXERS[kind].items()}
    found += _table(table, layer, f'{block}.', f'layers/{index}/')
  found += _table(NORM, outer['final_norm'], f'{names.prefix}{names.final_norm}.', 'final_norm/')
  return found + list(_table({'lm_head.weight': ('linear', 'kernel')}, outer['head'], '', 'head/'))


def _table(table: Table, specs: dict, prefix: str, ours: str) -> Iterator[Tensor]:
  """The lines of a table whose parameters this model has."""
  left = set(specs)
  for name, (form, line) in table.items():
    parts = [part for part in line.split() if part in specs]
    left -= set(parts)
    if parts:
      yield Tensor(f'{prefix}{name}', tuple(Part(f'{ours}{part}', form, specs[part].shape) for part in parts))
  if left:
    raise ValueError(f'{ours}: {", ".join(sorted(left))}: no tensor of this family holds it')
