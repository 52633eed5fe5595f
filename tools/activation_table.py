"""What one layer keeps for its backward pass, and what it computes twice, beside the formulas: docs/activations.md.

  python tools/activation_table.py --case=22b                # 22b, 175b, mamba2 or hybrid; all of them without --case

Every row is a gradient program of the layers alone, compiled from shapes for emulated CPU devices at two depths; nothing is
allocated or run. Bytes are the slope of the compiler's temporaries between the depths, FLOPs that of the matrix products in the
compiled text. The layers are in float16: XLA for CPUs would make float32 of bfloat16.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# What is compiled is never run.
os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true')

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lmscale.config import Config, ModelConfig, recipes
from lmscale.kernels import choice
from lmscale.kernels.attention.xla import default_chunk
from lmscale.models import stack
from lmscale.models.context import Context
from lmscale.models.flops import layer_flops
from lmscale.models.layers import RESIDUAL
from lmscale.models.stacking import make_stacking, map_stacks
from lmscale.parallel.mesh import MANUAL, make_mesh
from lmscale.parallel.rules import make_constrain, make_local, make_rules, partition
from lmscale.plan.matmuls import matmul_flops
from lmscale.plan.papers import block_activations

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
DTYPE = jnp.float16
STATE_TOKENS = 256  # between two states that the SSD keeps in XLA on accelerators
ACCELERATOR = types.SimpleNamespace(platform='gpu', device_kind='any')  # whose sizes of blocks XLA's implementations take
CHUNK = 64  # of the SSD: that of GPUs and of the FLOPs' formula; the CPU's own choice is smaller


class Case(NamedTuple):
  """What is repeated: a pattern, and after how many rows it is the model; rows of the batch; ways of `tensor`."""

  title: str
  recipe: str
  unit: str
  depth: int
  batch: int
  tensor: int = 8


CASES = {
  '22b': Case('22B, 4 rows of 2,048: a Transformer block', 'megatron_gpt.py:size=22b', '*-', 48, 4),
  '175b': Case('175B, a row of 2,048: a Transformer block', 'megatron_gpt.py:size=175b', '*-', 96, 1),
  'mamba2': Case('8B Mamba-2, a row of 4,096: a layer', 'mamba_study.py:arch=mamba2,size=8b', 'M', 56, 1),
  'hybrid': Case('8B hybrid, a row of 4,096: the four layers `M-*-`', 'mamba_study.py:arch=hybrid,size=8b', 'M-*-', 8, 1),
}
# (title, whether `tensor` is used, sequence parallel, train.remat)
ROWS = [
  ('no parallelism', False, False, 'none'),
  ('TP', True, False, 'none'),
  ('TP + SP', True, True, 'none'),
  ('TP, selective', True, False, 'selective'),
  ('TP + SP, selective', True, True, 'selective'),
  ('TP, full', True, False, 'full'),
  ('TP + SP, full', True, True, 'full'),
]


class Row(NamedTuple):
  """Of one unit on one device: bytes as measured and by both formulas (the papers' has none for Mamba), FLOPs as executed."""

  kept: float
  ours: float
  paper: float | None
  flops: float


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--case', choices=CASES, help='default: all')
  options = parser.parse_args(argv)
  jax.config.update('jax_num_cpu_devices', 8)
  for name in [options.case] if options.case else CASES:
    print(table(CASES[name], load(CASES[name])) + '\n', flush=True)
  return 0


def load(case: Case) -> Config:
  """The recipe, with nothing but the pattern repeated."""
  config = recipes.load(f'{CONFIGS}/{case.recipe}')
  mamba2 = dataclasses.replace(config.model.mamba2, chunk=CHUNK)
  return dataclasses.replace(config, model=dataclasses.replace(config.model, pattern=case.unit * case.depth, mamba2=mamba2))


def table(case: Case, config: Config) -> str:
  """Markdown: bytes in units of tokens times width, and FLOPs over those of the model and over those without recomputation."""
  tokens, width = case.batch * config.train.seq_len, config.model.d_model
  model_flops = 3 * tokens * sum(layer_flops(config.model, config.train.seq_len, causal=False)[: len(case.unit)])
  unit, published = tokens * width, is_transformer(case.unit, config.model)
  columns = ['', 'MB', 'bytes / s b h', 'ours', 'ratio', *(["paper's", 'ratio'] * published), "FLOPs / model's", '/ none']
  lines = [f'{case.title}, s b h = {unit:,}, {case.tensor} devices', '', '| ' + ' | '.join(columns) + ' |', '|---' * len(columns) + '|']
  none: dict[bool, float] = {}
  for title, parallel, sequence, remat in ROWS:
    row = measure(case, config, parallel, sequence, remat)
    flops = row.flops * (case.tensor if parallel else 1)
    none.setdefault(parallel, flops)
    paper = [] if row.paper is None else [f'{row.paper / unit:.3f}', f'{row.kept / row.paper:.3f}']
    cells = [title, f'{row.kept / 1e6:,.1f}', f'{row.kept / unit:.3f}', f'{row.ours / unit:.3f}', f'{row.kept / row.ours:.3f}', *paper,
             f'{flops / model_flops:.4f}', f'{flops / none[parallel]:.4f}']  # fmt: skip
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def is_transformer(unit: str, model: ModelConfig) -> bool:
  """Whether the papers' formula is about these layers."""
  return unit == '*-' and model.attention.kv_heads == model.attention.heads


def measure(case: Case, config: Config, parallel: bool, sequence: bool, remat: str) -> Row:
  """One row, from depths of a half and the whole of case.depth."""
  tensor = case.tensor if parallel else 1
  mesh = dataclasses.replace(config.mesh, pipe=1, data=1, tensor=tensor, zero=0, sequence_parallel=sequence)
  config = dataclasses.replace(config, mesh=mesh, train=dataclasses.replace(config.train, remat=remat))
  depths = case.depth // 2, case.depth
  found = []
  for depth in depths:
    compiled = lower_gradients(config, case.unit, depth, case.batch).compile()
    found.append((compiled.memory_analysis().temp_size_in_bytes, matmul_flops(compiled.as_text(), visited_blocks(config.train.seq_len))))
  kept, flops = ((b - a) / (depths[1] - depths[0]) for a, b in zip(*found, strict=True))
  tokens, size = case.batch * config.train.seq_len, (tensor, sequence, remat)
  ours = tokens * formula(config.model, case.unit, *size)
  paper = block_activations(tokens, config.model.d_model, *size) if is_transformer(case.unit, config.model) else None
  return Row(kept, ours, paper, flops)


def visited_blocks(seq_len: int) -> float:
  """Blocks of keys that attention in XLA visits for a chunk of queries of a causal row, on average: how often its inner loop runs."""
  with choice.tracing_for(ACCELERATOR):
    return (-(-seq_len // default_chunk()) + 1) / 2


def lower_gradients(config: Config, unit: str, depth: int, batch: int, backward: bool = True) -> Any:
  """The gradients of `depth` times the layers of `unit` with respect to parameters and input, lowered from shapes in DTYPE.

  backward: False for the forward pass alone, whose results are then what it keeps.
  """
  model, mesh, rules = config.model, make_mesh(config.mesh, jax.devices()[: config.mesh.size]), make_rules(config)
  stacking = make_stacking(unit * depth, 'runs')
  constrain, local = make_constrain(config, rules), make_local(config, rules)

  def shape(dims: tuple[int, ...], dtype: Any, axes: tuple, stacked: tuple = ()) -> jax.ShapeDtypeStruct:
    spec = PartitionSpec(*(None for _ in stacked), *partition(axes, rules, drop=MANUAL))
    return jax.ShapeDtypeStruct((*stacked, *dims), dtype, sharding=NamedSharding(mesh, spec))

  def stacked(layers: Any) -> dict[str, jax.ShapeDtypeStruct]:
    rows = (len(layers.layers),)
    return {name: shape(spec.shape, jnp.float32 if spec.full_precision else DTYPE, spec.axes, rows)
            for name, spec in stack.layer_specs(model, layers.kind).items()}  # fmt: skip

  def gradients(params: tuple, x_BTD: jax.Array, dy_BTD: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> Any:
    ctx = Context(positions, segment_ids, constrain=constrain, local=local, tensor=config.mesh.tensor)

    def layers(params: tuple, x_BTD: jax.Array) -> jax.Array:
      return stack.apply_stack(model, stacking, params, x_BTD, ctx, None, config.train.remat)[0]

    y_BTD, pull = jax.vjp(layers, params, x_BTD)
    return pull(constrain(y_BTD + dy_BTD, RESIDUAL)) if backward else pull

  params = map_stacks(stacked, stacking)
  x = shape((batch, config.train.seq_len, model.d_model), DTYPE, RESIDUAL)
  ids = shape((batch, config.train.seq_len), jnp.int32, ('batch', 'length'))
  mapped: Callable = jax.shard_map(
    gradients, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), axis_names=set(MANUAL), check_vma=False
  )
  places = jax.tree.map(lambda leaf: leaf.sharding, (params, x))
  with jax.set_mesh(mesh), choice.tracing_for(ACCELERATOR):
    return jax.jit(mapped, out_shardings=places if backward else None).lower(params, x, x, ids, ids)


def formula(model: ModelConfig, unit: str, tensor: int, sequence: bool, remat: str) -> float:
  """Bytes per token and device that lmscale means to keep of `unit`, of 16 bits each where not said otherwise."""
  stream = 2 * model.d_model / (tensor if sequence else 1)
  if remat == 'full':
    return stream * len(stack.blocks(unit, 'full'))
  inputs = 1 if remat == 'selective' else 2  # the layer's, and the normalised one
  inside = SELECTIVE if remat == 'selective' else EVERYTHING
  return sum(inputs * stream + inside[kind](model) / tensor for kind in unit)


def attention(model: ModelConfig) -> float:
  """q, k, v, and what attention gives."""
  c = model.attention
  return 2 * c.head_dim * (2 * c.heads + 2 * c.kv_heads)


def mlp(model: ModelConfig, selective: bool) -> float:
  """The input of the activation, and its output."""
  return 2 * model.mlp.d_ff * (1 if selective else 2)


def mamba2(model: ModelConfig, selective: bool) -> float:
  """z, x, B, C, dt; then the convolved x, B, C, eight float32 numbers per head, the float32 states, y twice: before and after
  the gated norm."""
  c = model.mamba2
  inner, grouped = c.heads * c.head_dim, c.groups * c.state
  projected = 2 * (2 * inner + 2 * grouped + c.heads)
  if selective:
    return projected
  return projected + 2 * (inner + 2 * grouped) + 8 * 4 * c.heads + 4 * inner * c.state / STATE_TOKENS + 2 * 2 * inner


SELECTIVE = {'*': attention, '-': functools.partial(mlp, selective=True), 'M': functools.partial(mamba2, selective=True)}
EVERYTHING = {'*': attention, '-': functools.partial(mlp, selective=False), 'M': functools.partial(mamba2, selective=False)}

if __name__ == '__main__':
  sys.exit(main())
