"""Bytes per device: exact for what the state stores, an estimate for what a step holds besides.

Stored, from the same layouts that place the real arrays: the fp32 master (float64 in a float64 run) and Adam's two
moments, cut over `tensor` and, from ZeRO 1 up, over `data`. Held during a step: the compute copy, the gradients, the
activations and temporaries. In a pipeline every device has buffers of one size, and embedding and head, unless
mesh.vocab_on_pipe cuts them; ZeRO 3 gathers its layers once a step, as 2 does.

  parameters   master + compute copy. The copy is whole under ZeRO 0 to 2 and costs nothing where it is the master itself
               (fp32, not gathered); under ZeRO 3 only one layer's exists at a time, among the temporaries.
  gradients    in train.grad_dtype: whole under ZeRO 0 and 1, a share under 2 and 3 (arXiv 1910.02054, table 1).
  optimizer    both moments in the master's dtype.
  activations  what the backward pass needs, see `activations`, and one chunk of logits.
  temporaries  what no table of ZeRO lists: one microbatch's gradients beside the accumulated ones, the gradient that
               ZeRO 2 has not scattered yet, the layer that ZeRO 3 has gathered, the head's gradient from the forward pass.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from lmscale.config import Config
from lmscale.models.stack import blocks
from lmscale.models.stacking import make_stacking
from lmscale.parallel.layout import LeafLayout, make_layout
from lmscale.parallel.pipeline.layout import kept_slots, microbatches, stage_places, stage_stacking, step_table
from lmscale.parallel.rules import make_rules
from lmscale.plan.activations import layer_activations, layer_working

BYTES = {'bfloat16': 2, 'float32': 4, 'float64': 8}


class Widths(NamedTuple):
  """Bytes of one parameter in each part of the state. stored_copy: ZeRO 3 keeps its cut of the compute copy, too."""

  master: int
  copy: int
  gradient: int
  moments: int
  stored_copy: bool = False


PAPER = Widths(master=4, copy=2, gradient=2, moments=8, stored_copy=True)  # arXiv 1910.02054, section 3.1


def state_bytes(stored: float, whole: float, stage: int, widths: Widths) -> tuple[float, float, float]:
  """Bytes of (parameters, gradients, optimizer) of a device under a stage of ZeRO.

  stored: parameters that it keeps, whole: of how many that is its share.
  """
  copies = whole if stage < 3 else stored if widths.stored_copy else 0
  parameters = stored * widths.master + copies * widths.copy
  return parameters, widths.gradient * (stored if stage >= 2 else whole), stored * widths.moments


def zero_bytes(parameters: float, data: int, stage: int, widths: Widths = PAPER) -> float:
  """Model-state bytes per device over `data` ranks; in the widths of ZeRO's paper its table 1: stage 0 16 P, 1 4 P + 12 P / N,
  2 2 P + 14 P / N, 3 16 P / N."""
  return sum(state_bytes(parameters / data if stage else parameters, parameters, stage, widths))


def bytes_per_device(config: Config) -> dict[str, int]:
  """Bytes on the fullest device, by the groups of the module's docstring, and their `total`. mesh.data must be known."""
  groups = device_parameters(config)
  leaves = [leaf for group in groups for leaf in group]
  sizes = [(local_elements(config, leaf), local_elements(config, leaf, data=False)) for leaf in leaves]
  states = (state_bytes(*size, zero_stage(config), leaf_widths(config, leaf)) for size, leaf in zip(sizes, leaves, strict=True))
  parameters, gradients, optimizer = (sum(part) for part in zip(*states, strict=True))
  result = {
    'parameters': parameters,
    'gradients': gradients,
    'optimizer': optimizer,
    'activations': activations_held(config) + _working_bytes(config),
    'temporaries': _temporary_bytes(config, groups, *(sum(part) for part in zip(*sizes, strict=True))),
  }
  return {**result, 'total': sum(result.values())}


def device_parameters(config: Config) -> list[list[LeafLayout]]:
  """The parameters of a device, grouped by what is gathered together: each layer (in a pipeline each row of a stack, whether it
  holds one or not), embedding, final norm, head."""
  mesh = config.mesh
  stacking = stage_stacking(config) if mesh.pipe > 1 else make_stacking(config.model.layers, 'unrolled')
  layout = make_layout(config, stacking, make_rules(config))
  stacks = [(stack, leaves) for run, parts in zip(stacking, layout['layers'], strict=True)
            for stack, leaves in zip(run, parts, strict=True)]  # fmt: skip
  rows = [list(leaves.values()) for stack, leaves in stacks for _ in range(len(stack.layers) // mesh.pipe)]
  return rows + [list(layout[part].values()) for part in layout if part != 'layers']


def zero_stage(config: Config) -> int:
  """As which stage of ZeRO a step holds its parameters and gradients."""
  return min(config.mesh.zero, 2) if config.mesh.pipe > 1 else config.mesh.zero


def local_elements(config: Config, leaf: LeafLayout, data: bool = True) -> int:
  """Elements of a parameter on one device; `data=False` before ZeRO cuts it."""
  cuts = [config.mesh.tensor for axis in leaf.tensor if axis == 'tensor']
  cuts += [config.mesh.data] if data and leaf.data_dim is not None else []
  cuts += [config.mesh.pipe] if leaf.pipe_dim is not None else []
  return leaf.spec.size // math.prod(cuts)


def leaf_widths(config: Config, leaf: LeafLayout) -> Widths:
  """Of a parameter: master and moments in float32 (float64 in a float64 run), and a copy unless it is used as it is stored."""
  compute = BYTES[config.train.compute_dtype]
  master, copy = max(compute, 4), max(compute, 4) if leaf.spec.full_precision else compute
  gradient = max(BYTES[config.train.grad_dtype], master if master == 8 else 0)
  return Widths(master, copy if leaf.data_dim is not None or copy < 4 else 0, gradient, 2 * master)


def _copy_bytes(config: Config, leaves: Iterable[LeafLayout]) -> int:
  """The compute copy of these parameters, whole but for `tensor`."""
  return sum(leaf_widths(config, leaf).copy * local_elements(config, leaf, data=False) for leaf in leaves)


def _temporary_bytes(config: Config, groups: list[list[LeafLayout]], stored: int, whole: int) -> int:
  train, mesh, zero = config.train, config.mesh, zero_stage(config)
  compute = BYTES[train.compute_dtype]
  grad = leaf_widths(config, groups[0][0]).gradient
  several = microbatches(config) > 1
  if zero == 3:
    largest = max(_copy_bytes(config, group) for group in groups)
    microbatch = 2 * largest + (stored * grad if several else 0)  # the layer, and its gradient before it is scattered
  else:
    unscattered = grad * (whole - stored) if zero == 2 else 0
    # A pipeline adds a layer's gradient as soon as it is there, with rows of zeros for the other kinds.
    rows = {leaf.stack.kind: sum(local_elements(config, leaf, data=False) for leaf in group) for group in groups
            if (leaf := group[0]).stack}  # fmt: skip
    beside = grad * sum(rows.values()) if mesh.pipe > 1 else whole * compute
    microbatch = unscattered + (beside if several else 0)
  vocab = config.model.vocab // mesh.tensor // (mesh.pipe if mesh.vocab_on_pipe else 1)
  return microbatch + config.model.d_model * vocab * max(4, compute)


def activations_held(config: Config) -> int:
  """Bytes that wait on a device for backward passes.

  Without a pipeline of one microbatch, of which each layer's share waits (under `full` the input of each block). In one, buffers as
  `pipeline.executor` has them, each with one row more for what nobody reads: inputs of stages, gradients of their outputs,
  outputs, and what the fullest stage's layers save, for every microbatch in flight or (`full`) for one.
  """
  mesh, train, layers = config.mesh, config.train, config.model.layers
  if mesh.pipe == 1:
    kept = {kind: _kept(config, kind) for kind in set(layers)}
    return train.microbatch * sum(kept[block[0]] if train.remat == 'full' else kept[block] for block in layer_blocks(config))
  table, saved = step_table(config), 'none' if train.remat == 'none' else 'selective'
  places, rows = stage_places(config), sum(kept_slots(config, table)) + 1
  ring = sum(most * layer_activations(config, kind, saved) for kind, most in zip(places.kinds, places.most, strict=True))
  streams = table.slots['activation'] + table.slots['cotangent'] + 2 + rows
  return train.microbatch * (rows * ring + streams * _stream(config) * train.seq_len)


def layer_blocks(config: Config) -> list[str]:
  """The layers in the parts that are recomputed as one."""
  runs = make_stacking(config.model.layers, config.train.stack)
  units = ((''.join(stack.kind for stack in run), len(run[0].layers)) for run in runs)
  return [block for unit, rows in units for block in blocks(unit, config.train.remat) * rows]


def _kept(config: Config, kind: str) -> int:
  """Bytes per sequence that a layer keeps until its backward pass."""
  if config.train.remat == 'full':
    return _stream(config) * config.train.seq_len
  return layer_activations(config, kind, config.train.remat)


def _working_bytes(config: Config) -> int:
  """What one block holds, beside what it keeps, while its backward pass runs, and one chunk of the loss."""
  train = config.train
  parts = layer_blocks(config) if config.mesh.pipe == 1 else config.model.layers
  working = max(_block_working(config, part) for part in set(parts))
  return train.microbatch * working + _loss_bytes(config, train.microbatch * train.seq_len)


def _block_working(config: Config, kinds: str) -> int:
  """Bytes per sequence: the layer that holds most, and what the others of the block keep until it is their turn."""
  every = {kind: layer_activations(config, kind, 'none') for kind in kinds} if len(kinds) > 1 else dict.fromkeys(kinds, 0)
  working = max(layer_working(config, kind) - every[kind] for kind in kinds) + sum(every.values())
  return max(working - _kept(config, kinds[0]), 0)


def _stream(config: Config) -> int:
  """Bytes per token of the residual stream, cut over `tensor` under sequence parallelism."""
  width = BYTES[config.train.compute_dtype] * config.model.d_model
  return width // config.mesh.tensor if config.mesh.sequence_parallel else width


def _loss_bytes(config: Config, tokens: int) -> int:
  """One chunk's logits and their gradient, and the hidden states with theirs."""
  compute, mesh = BYTES[config.train.compute_dtype], config.mesh
  vocab = config.model.vocab // mesh.tensor // (mesh.pipe if mesh.vocab_on_pipe else 1)
  logits = min(config.train.loss_chunk, tokens) * vocab * 2 * max(4, compute)
  return logits + 2 * compute * config.model.d_model * tokens
