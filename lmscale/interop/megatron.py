"""Checkpoints of Megatron-LM, such as the released 8B models of arXiv 2406.07887, as folders of runs.

A checkpoint is a folder `mp_rank_<t>` for each tensor-parallel rank (`mp_rank_<t>_<p>` where there are pipeline stages, whose layers
count from 0 in each), beside `latest_checkpointed_iteration.txt` or one folder below it. How a tensor is cut over the ranks:

  columns  each of its parts by itself along the first dim: a rank's in_proj holds its share of z, of x, of B, of C and of dt
  rows     along the second dim
  whole    every rank has all of it
  qkv      by query groups: for each group its queries, then its key, then its value

Files are safetensors, or, where that is asked for, `model_optim_rng.pt`, of which `torch.load(weights_only=True)` makes tensors and
plain values and nothing else; enumerations of Megatron's that lie beside the tensors become nothing at all.
"""

import argparse
import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lmscale.config import Config, ModelConfig
from lmscale.errors import ConfigError
from lmscale.interop.folder import Stored, inside, read_headers
from lmscale.interop.importing import write_sources
from lmscale.interop.mapping import MAMBA, MAMBA2, Part, Table
from lmscale.models import model as model_lib

TRACKER = 'latest_checkpointed_iteration.txt'
RANK = re.compile(r'mp_rank_(\d{2,3})(?:_(\d{3}))?')
LAYER = re.compile(r'decoder\.layers\.(\d+)\.')
SAFE, PICKLED = 'model.safetensors', 'model_optim_rng.pt'
IGNORED = ('._extra_state', '.inv_freq')  # of fp8, and constants
ENUMS = ('megatron.core.enums.ModelType', 'megatron.core.transformer.enums.AttnBackend', 'megatron.core.transformer.enums.AttnMaskType')

ATTENTION: Table = {
  'linear_qkv.weight': ('linear', 'q_kernel k_kernel v_kernel'),
  'linear_qkv.bias': ('same', 'q_bias k_bias v_bias'),
  'linear_proj.weight': ('linear', 'out_kernel'),
  'linear_proj.bias': ('same', 'out_bias'),
}
MLP: Table = {
  'linear_fc1.weight': ('linear', 'gate_kernel up_kernel'),
  'linear_fc1.bias': ('same', 'gate_bias up_bias'),
  'linear_fc2.weight': ('linear', 'down_kernel'),
  'linear_fc2.bias': ('same', 'down_bias'),
}
# kind: (table, where its tensors are, what its norm may be called, without `weight` and `bias`)
PLACES: dict[str, tuple[Table, str, tuple[str, ...]]] = {
  'M': (MAMBA2, 'mixer.', ('norm.', 'mixer.in_proj.layer_norm_')),
  'm': (MAMBA, 'mixer.', ('norm.', 'mixer.in_proj.layer_norm_')),
  '*': (ATTENTION, 'self_attention.', ('self_attention.linear_qkv.layer_norm_', 'input_layernorm.')),
  '-': (MLP, 'mlp.', ('mlp.linear_fc1.layer_norm_', 'pre_mlp_layernorm.')),
}
ROWS = ('out_proj.weight', 'x_proj.weight', 'linear_proj.weight', 'linear_fc2.weight')
WHOLE = ('linear_proj.bias', 'linear_fc2.bias')

Ranks = list[Stored]  # a tensor's share of each tensor-parallel rank


def import_megatron(
  folder: str | pathlib.Path, target: str | pathlib.Path, config: Config, pickled: bool = False, dtype: str = '', tokenizer: str = ''
) -> tuple[Config, list[str]]:  # fmt: skip
  """Makes `target`, the folder of a run, of a checkpoint of Megatron-LM. Returns its config and lines for people.

  config: of the same model; the checkpoint does not describe itself. pickled: read `.pt` files, by PyTorch's weights-only loading.
  dtype: as in `importing.import_model`. tokenizer: the file of its tokenizer, to be carried along.

  Raises:
    ConfigError: files that are missing or not plain data, tensors that do not fit the model, or a folder that cannot be written.
  """
  folder = pathlib.Path(folder).expanduser()
  notes: list[str] = []
  tensors = _open_ranks(_checkpoint(folder), pickled)
  sources = match(tensors, config.model, notes)
  about = {'from': 'megatron', 'tensor_parallel': len(next(iter(tensors.values())))}
  return write_sources(target, config, sources, dtype, about, tokenizer, notes)


@dataclasses.dataclass(frozen=True)
class Source:
  """A parameter of ours in the shares of the ranks. before: rows of a rank's share before its part, stop: behind."""

  name: str
  part: Part
  ranks: Ranks
  cut: str
  before: int
  stop: int
  groups: tuple[int, int, int] = (0, 0, 0)  # qkv: query groups, queries of each, which of (q, k, v)

  @property
  def shape(self) -> tuple[int, ...]:
    return self.part.shape

  @property
  def dtype(self) -> np.dtype:
    return self.ranks[0].dtype

  def read(self, dtype: Any = None) -> np.ndarray:
    """Our parameter, put together."""
    if self.cut == 'whole':
      whole = self.ranks[0].read()
    else:
      whole = np.concatenate([rank.read(self.before, self.stop) for rank in self.ranks], axis=int(self.cut == 'rows'))
    if self.cut == 'qkv':
      groups, queries, which = self.groups
      whole = whole.reshape(groups, queries + 2, -1, *whole.shape[1:])
      chosen = whole[:, :queries] if which == 0 else whole[:, queries + which - 1 : queries + which]
      whole = chosen.reshape(-1, *whole.shape[3:])
    return np.ascontiguousarray(self.part.to_ours(whole[: self.part.stored[0]]), dtype)


def match(tensors: Mapping[str, Ranks], config: ModelConfig, notes: list[str]) -> dict[str, Source]:
  """{canonical name: where it comes from}. Uses every tensor once.

  Raises:
    ConfigError: tensors that are missing, left over or of a wrong shape, or ranks that do not divide the model.
  """
  left, found, missing = dict(tensors), {}, []
  for names, parts, cut in _table(config, blocks=_has_blocks(tensors)):
    name = next((name for name in names if name in left), None)
    if name is None:
      missing.append(names[0])
      continue
    found |= {source.part.name: source for source in _cut(name, parts, cut, left.pop(name), config, notes)}
  parts = [f'{what} {", ".join(map(repr, sorted(names)[:5]))}' for what, names in (('missing', missing), ('unused', left)) if names]
  if parts:
    raise ConfigError(f'weights: the tensors do not fit the model of --config: {"; ".join(parts)}')
  return found


def _has_blocks(tensors: Mapping[str, Ranks]) -> bool:
  """Whether a layer of theirs is attention and MLP, as in GPT, and not one of them alone, as in a hybrid."""
  return all(any(name.startswith(f'decoder.layers.0.{part}.') for name in tensors) for part in ('self_attention', 'mlp'))


def _table(config: ModelConfig, blocks: bool) -> Iterator[tuple[list[str], list[Part], str]]:
  """(names that a tensor may have, its parts, its cut) of every tensor."""
  specs = model_lib.param_specs(config)

  def part(name: str, form: str, spec: Any) -> Part:
    return Part(name, form, spec.shape)

  def norm(beginnings: list[str], ours: str, specs: dict[str, Any]) -> Iterator[tuple[list[str], list[Part], str]]:
    for end in ('weight', 'bias'):
      if (leaf := {'weight': 'norm_scale', 'bias': 'norm_bias'}[end]) in specs:
        yield [f'{beginning}{end}' for beginning in beginnings], [part(f'{ours}/{leaf}', 'same', specs[leaf])], 'whole'

  yield ['embedding.word_embeddings.weight'], [part('embed/tokens', 'same', specs['embed']['tokens'])], 'columns'
  if 'positions' in specs['embed']:
    yield ['embedding.position_embeddings.weight'], [part('embed/positions', 'same', specs['embed']['positions'])], 'whole'
  for index, (kind, layer) in enumerate(zip(config.layers, specs['layers'], strict=True)):
    table, place, norms = PLACES[kind]
    prefix = f'decoder.layers.{index // 2 if blocks else index}.'
    yield from norm([f'{prefix}{name}' for name in norms], f'layers/{index}', layer)
    for name, (form, line) in table.items():
      parts = [part(f'layers/{index}/{leaf}', form, layer[leaf]) for leaf in line.split() if leaf in layer]
      if parts:
        cut = 'qkv' if 'qkv' in name else 'rows' if name in ROWS else 'whole' if name in WHOLE else 'columns'
        yield [f'{prefix}{place}{name}'], parts, cut
  yield from norm(['decoder.final_norm.', 'decoder.final_layernorm.'], 'final_norm', specs['final_norm'])
  if 'head' in specs:
    yield ['output_layer.weight'], [part('head/kernel', 'linear', specs['head']['kernel'])], 'columns'


def _cut(name: str, parts: list[Part], cut: str, ranks: Ranks, config: ModelConfig, notes: list[str]) -> Iterator[Source]:
  """The sources of a tensor's parts, after its shape was compared."""
  count = 1 if cut == 'whole' else len(ranks)
  along = int(cut == 'rows')
  whole = [sum(part.stored[0] for part in parts), *parts[0].stored[1:]]
  uneven = [part.name for part in parts if part.stored[along] % count]
  if 'M' in config.layers and '.mixer.' in name and cut != 'whole' and config.mamba2.groups % count:
    uneven.append(f'model.mamba2.groups {config.mamba2.groups}')
  if cut == 'qkv' and config.attention.kv_heads % count:
    uneven.append(f'model.attention.kv_heads {config.attention.kv_heads}')
  shape = [n // count if dim == along else n for dim, n in enumerate(whole)]
  for rank in ranks:
    given = list(rank.shape)
    if name in ('embedding.word_embeddings.weight', 'output_layer.weight') and given[0] * count > whole[0] and given[1:] == whole[1:]:
      padding = given[0] * count - whole[0]  # Megatron makes the vocabulary divide by the ranks
      if rank is ranks[0]:
        notes.append(f'{name}: {padding} rows beyond model.vocab {config.vocab} are left out')
      shape, uneven = given, []
    elif uneven:
      raise ConfigError(f'{name}: {count} ranks do not divide {", ".join(uneven)}')
    elif given != shape:
      raise ConfigError(f'{name} has shape {given} in {rank.path.parent.name}; the model of --config gives {shape}')
  start = 0
  for which, part in enumerate(parts):
    rows = shape[0] if len(parts) == 1 or cut == 'qkv' else part.stored[0] // count
    queries = config.attention.heads // config.attention.kv_heads
    yield Source(name, part, ranks, cut, start, start + rows, (config.attention.kv_heads, queries, which) if cut == 'qkv' else (0, 0, 0))
    start += rows if cut == 'columns' else 0


# The files.


def _checkpoint(folder: pathlib.Path) -> pathlib.Path:
  """The folder with the ranks: `folder`, or the one that its tracker names."""
  if not folder.is_dir():
    raise ConfigError(f'{folder}: no such folder; give the one with {TRACKER} or mp_rank_00')
  if any(RANK.fullmatch(path.name) for path in folder.iterdir()):
    return folder
  try:
    with inside(folder, TRACKER).open(encoding='utf-8') as file:
      text = file.read(100).strip()
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f'{folder}: neither mp_rank_00 nor a readable {TRACKER}') from error
  if text != 'release' and not (text.isascii() and text.isdigit()):
    raise ConfigError(f'{folder / TRACKER}: {text!r} is neither release nor an iteration')
  return inside(folder, text if text == 'release' else f'iter_{int(text):07}')


def _open_ranks(folder: pathlib.Path, pickled: bool) -> dict[str, Ranks]:
  """{name, its layer counted over all stages: its share of each tensor-parallel rank}."""
  ranks: dict[tuple[int, int], pathlib.Path] = {}
  for path in sorted(folder.iterdir()) if folder.is_dir() else ():
    if match := RANK.fullmatch(path.name):
      ranks[int(match[2] or 0), int(match[1])] = inside(folder, path.name)
  stages, tensors = len({stage for stage, _ in ranks}), len({rank for _, rank in ranks})
  if not ranks or sorted(ranks) != [(stage, rank) for stage in range(stages) for rank in range(tensors)]:
    raise ConfigError(f'{folder}: expected mp_rank_00, mp_rank_01, ... of all ranks; there are {[path.name for path in ranks.values()]}')
  found: dict[str, Ranks] = {}
  first = 0
  for stage in range(stages):
    shares = [_open_rank(ranks[stage, rank], pickled) for rank in range(tensors)]
    if any(share.keys() != shares[0].keys() for share in shares):
      raise ConfigError(f'{folder}: the ranks of stage {stage} hold different tensors')
    moved = {LAYER.sub(lambda m: f'decoder.layers.{int(m[1]) + first}.', name): [share[name] for share in shares] for name in shares[0]}  # noqa: B023 (used at once)
    if twice := sorted(moved.keys() & found.keys()):
      raise ConfigError(f'{folder}: two stages hold {twice[0]!r}')
    found |= moved
    first = 1 + max((int(m[1]) for name in found if (m := LAYER.match(name))), default=-1)
  return found


def _open_rank(folder: pathlib.Path, pickled: bool) -> dict[str, Any]:
  if inside(folder, SAFE).is_file():
    tensors = read_headers(folder / SAFE)
  elif not inside(folder, PICKLED).is_file():
    raise ConfigError(f'{folder}: neither {SAFE} nor {PICKLED}')
  elif not pickled:
    raise ConfigError(
      f'{folder / PICKLED}: a pickle is not read unless --torch says so, and then only by PyTorch\'s weights-only loading; or save its '
      f'tensors as {SAFE}'
    )
  else:
    tensors = _load_pickled(folder / PICKLED)
  return {name: tensor for name, tensor in tensors.items() if not name.endswith(IGNORED)}


class _Nothing:
  """Stands for an enumeration of Megatron's in a `.pt` file: none of its code is needed, and none is looked for."""

  def __init__(self, *args: Any):
    pass


class _Loaded:
  """A PyTorch tensor with the interface of `Stored`."""

  def __init__(self, path: pathlib.Path, tensor: Any, dtype: np.dtype):
    self.path, self.tensor, self.shape, self.dtype = path, tensor, tuple(tensor.shape), dtype

  def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
    import torch

    rows = self.tensor[start:stop].detach().contiguous()
    return rows.view(torch.int16).numpy().view(self.dtype) if self.dtype == jnp.bfloat16 else rows.numpy()


def _load_pickled(path: pathlib.Path) -> dict[str, _Loaded]:
  try:
    import torch
  except ModuleNotFoundError as error:
    raise ConfigError("--torch: needs the package torch; install it with: pip install -e '.[megatron]'") from error
  allowed = [argparse.Namespace, *((_Nothing, name) for name in ENUMS)]
  try:
    with torch.serialization.safe_globals(allowed):
      content = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
  except Exception as error:
    reason = next((line for line in map(str.strip, str(error).splitlines()) if 'GLOBAL' in line or 'Unsupported' in line), str(error))
    raise ConfigError(f'{path}: weights-only loading refuses it: {" ".join(reason.split())[:200]}; save its tensors as {SAFE}') from error
  model = content.get('model') if isinstance(content, dict) else None
  if not isinstance(model, dict):
    raise ConfigError(f"{path}: no entry 'model' (of a run with virtual pipeline stages nothing is read)")
  kinds = {getattr(torch, name): np.dtype(jnp.dtype(name)) for name in ('float32', 'float16', 'bfloat16', 'float64')}
  found = {}
  for name, tensor in model.items():
    if isinstance(name, str) and not name.endswith(IGNORED):
      if not isinstance(tensor, torch.Tensor) or tensor.dtype not in kinds:
        raise ConfigError(f'{path}: {name!r} is no tensor of floating numbers')
      found[name] = _Loaded(path, tensor, kinds[tensor.dtype])
  return found
