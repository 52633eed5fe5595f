"""Bytes per device: exact for what the state stores, an estimate for what a step holds besides.

Stored, from the same layouts that place the real arrays: the fp32 master (float64 in a float64 run) and Adam's two
moments, cut over `tensor` and, from ZeRO 1 up, over `data`. Held during a step: the compute copy, the gradients, the
activations and temporaries. With pipe > 1 the figures are those of the fullest device.

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
from lmscale.models.stacking import make_stacking
from lmscale.parallel.layout import LeafLayout, make_layout
from lmscale.parallel.pipeline.layout import microbatches, stage_layers, stage_stacking, step_table
from lmscale.parallel.pipeline.replay import in_flight
from lmscale.parallel.pipeline.stages import device_layers
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
  layers = device_layers(stage_layers(config), config.mesh.pipe)
  groups = device_parameters(config)
  each = enumerate(zip(layers, activations_held(config), strict=True))
  return max((_device_bytes(config, device, groups, *parts) for device, parts in each), key=lambda plan: plan['total'])


def device_parameters(config: Config) -> list[list[LeafLayout]]:
  """The parameters of a device, grouped by what is gathered together: each layer, embedding, final norm, head.

  The devices of a pipeline run one program: each has room for the most layers of a kind that one of them has, and the embedding and
  the head, whole or its part of their vocabulary.
  """
  pipe = config.mesh.pipe
  stacking = make_stacking(config.model.layers, 'unrolled') if pipe == 1 else stage_stacking(config)
  layout = make_layout(config, stacking, make_rules(config))
  rows = [(len(run[0].layers) // pipe, leaves[0]) for run, leaves in zip(stacking, layout['layers'], strict=True)]
  groups = [leaves for count, leaves in rows for _ in range(count)]
  groups += [layout[part] for part in ('embed', 'final_norm', 'head') if part in layout]
  return [list(group.values()) for group in groups]


def _device_bytes(
  config: Config, device: int, groups: list[list[LeafLayout]], layers: list[int], held: int
) -> dict[str, int]:
  leaves = [leaf for group in groups for leaf in group]
  sizes = [(local_elements(config, leaf), local_elements(config, leaf, data=False)) for leaf in leaves]
  states = (state_bytes(*size, _stage(config), leaf_widths(config, leaf)) for size, leaf in zip(sizes, leaves, strict=True))
  parameters, gradients, optimizer = (sum(part) for part in zip(*states, strict=True))
  result = {
    'parameters': parameters,
    'gradients': gradients,
    'optimizer': optimizer,
    'activations': held + _working_bytes(config, device, layers),
    'temporaries': _temporary_bytes(config, groups, device, *(sum(part) for part in zip(*sizes, strict=True))),
  }
  return {**result, 'total': sum(result.values())}


def local_elements(config: Config, leaf: LeafLayout, data: bool = True) -> int:
  """Elements of a parameter on one device; `data=False` before ZeRO cuts it."""
  cuts = [config.mesh.tensor for axis in leaf.tensor if axis == 'tensor']
  cuts += [config.mesh.data] if data and leaf.data_dim is not None else []
  cuts += [config.mesh.pipe] if leaf.pipe_dim is not None else []
  return leaf.spec.size // math.prod(cuts)


def _stage(config: Config) -> int:
  """ZeRO's stage: a pipeline gathers the parameters of its stages once a step, under 3 as under 2."""
  return min(config.mesh.zero, 2) if config.mesh.pipe > 1 else config.mesh.zero


def leaf_widths(config: Config, leaf: LeafLayout) -> Widths:
  """Of a parameter: master and moments in float32 (float64 in a float64 run), and a copy unless it is used as it is stored."""
  compute = BYTES[config.train.compute_dtype]
  master, copy = max(compute, 4), max(compute, 4) if leaf.spec.full_precision else compute
  gradient = max(BYTES[config.train.grad_dtype], master if master == 8 else 0)
  return Widths(master, copy if leaf.data_dim is not None or copy < 4 else 0, gradient, 2 * master)


def _copy_bytes(config: Config, leaves: Iterable[LeafLayout]) -> int:
  """The compute copy of these parameters, whole but for `tensor`."""
  return sum(leaf_widths(config, leaf).copy * local_elements(config, leaf, data=False) for leaf in leaves)


def _temporary_bytes(config: Config, groups: list[list[LeafLayout]], device: int, stored: int, whole: int) -> int:
  train, zero = config.train, _stage(config)
  compute = BYTES[train.compute_dtype]
  grad = leaf_widths(config, groups[0][0]).gradient
  several = microbatches(config) > 1
  if zero == 3:
    largest = max(_copy_bytes(config, group) for group in groups)
    microbatch = 2 * largest + (stored * grad if several else 0)  # the layer, and its gradient before it is scattered
  else:
    unscattered = grad * (whole - stored) if zero == 2 else 0
    microbatch = unscattered + (whole * compute if several else 0)
  last = device == config.mesh.pipe - 1
  head = config.model.d_model * config.model.vocab // config.mesh.tensor * max(4, compute) if last else 0
  return microbatch + head


def activations_held(config: Config) -> list[int]:
  """Bytes that wait on each device for backward passes: those of the microbatches in flight, at the worst tick.

  Without a pipeline one microbatch is in flight, of which each layer's share waits (under `full` its input). With one the
  schedule says how many; under `full` a stage's input waits, and its layers' inputs only while one microbatch goes backward.
  """
  mesh, train = config.mesh, config.train
  layer = {kind: _kept(config, kind) for kind in set(config.model.layers)}
  stage = [train.microbatch * sum(layer[config.model.layers[i]] for i in layers) for layers in stage_layers(config)]
  if mesh.pipe == 1:
    return stage
  table = step_table(config)
  if train.remat != 'full':
    return in_flight(table, stage).tolist()
  inputs = in_flight(table, [train.microbatch * _stream(config) * train.seq_len] * table.stages)
  return [int(n) + max(stage[device :: mesh.pipe]) for device, n in enumerate(inputs)]


def _kept(config: Config, kind: str) -> int:
  """Bytes per sequence that a layer keeps until its backward pass."""
  if config.train.remat == 'full':
    return _stream(config) * config.train.seq_len
  return layer_activations(config, kind, config.train.remat)


def _working_bytes(config: Config, device: int, layers: list[int]) -> int:
  """What one layer holds, beside what it keeps, while its backward pass runs, and one chunk of the loss."""
  train = config.train
  kinds = {config.model.layers[i] for i in layers}
  working = max(max(layer_working(config, kind) - _kept(config, kind), 0) for kind in kinds)
  loss = _loss_bytes(config, train.microbatch * train.seq_len) if device == config.mesh.pipe - 1 else 0
  return train.microbatch * working + loss


def _stream(config: Config) -> int:
  """Bytes per token of the residual stream, cut over `tensor` under sequence parallelism."""
  width = BYTES[config.train.compute_dtype] * config.model.d_model
  return width // config.mesh.tensor if config.mesh.sequence_parallel else width


def _loss_bytes(config: Config, tokens: int) -> int:
  """One chunk's logits and their gradient, and the hidden states with theirs."""
  compute = BYTES[config.train.compute_dtype]
  logits = min(config.train.loss_chunk, tokens) * config.model.vocab // config.mesh.tensor * 2 * max(4, compute)
  return logits + 2 * compute * config.model.d_model * tokens
