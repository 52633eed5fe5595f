"""Time and bytes of a step on an average device, by the plan's own formulas but per kind of layer: quick enough for thousands of layouts."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

from lmscale.config import Config, MeshConfig
from lmscale.models.flops import head_flops
from lmscale.models.stacking import make_stacking
from lmscale.parallel.layout import LeafLayout, make_layout
from lmscale.parallel.pipeline.layout import microbatches
from lmscale.parallel.pipeline.stages import balance
from lmscale.parallel.rules import make_rules
from lmscale.plan.activations import layer_activations
from lmscale.plan.bounds import axis_link, parameter_traffic
from lmscale.plan.executed import layer_executed_flops
from lmscale.plan.hardware import Hardware
from lmscale.plan.memory import BYTES, leaf_widths, local_elements, state_bytes
from lmscale.plan.traffic import (
  embedding_messages,
  head_messages,
  layer_messages,
  parameter_messages,
  vocabulary_messages,
)


class Rough:
  """Estimates for the layouts of one config: its mesh, train.microbatch, remat and stored_microbatches may differ. efficiency: of the peak."""

  def __init__(self, config: Config, hardware: Hardware, efficiency: float):
    self._config, self._hardware, self._rate = config, hardware, hardware.peak * efficiency
    layers = config.model.layers
    self._counts = {kind: layers.count(kind) for kind in sorted(set(layers))}
    self._parameters = functools.cache(self._of_parameters)
    self._stream = functools.cache(self._of_stream)
    self._dearest = functools.cache(self._of_dearest)
    self._kept = functools.cache(self._of_kept)

  def seconds(self, config: Config) -> float:
    """A step: what computes and what `tensor` sends, stretched by the bubble, then the rest."""
    mesh, train = config.mesh, config.train
    count, rows = microbatches(config), train.microbatch
    turns = count * mesh.virtual + mesh.pipe - 1  # of the dearest stage
    tokens = rows * train.seq_len
    stages, stored = mesh.pipe * mesh.virtual, train.stored_microbatches / self.slots(config)
    dearest = (1 - stored) * self._dearest(stages, train.remat, mesh.vocab_on_pipe)
    dearest += stored * self._dearest(stages, 'selective', mesh.vocab_on_pipe)
    seconds = turns * tokens * dearest / mesh.tensor / self._rate
    parameters = self._parameters(mesh.tensor, mesh.data, mesh.zero, count, train.remat == 'full')
    seconds += _share(parameters['traffic'], mesh) / self._hardware.hbm
    if mesh.tensor > 1:
      layers, ends = self._stream(mesh.tensor, mesh.sequence_parallel, train.remat, mesh.pipe > 1)
      sent = (layers / mesh.pipe + ends) * rows * turns / mesh.virtual
      seconds += sent / axis_link(config, self._hardware, 'tensor')
    if mesh.data > 1:
      seconds += _share(parameters['sent'], mesh) / axis_link(config, self._hardware, 'data')
    if mesh.pipe > 1:
      ticks = count * mesh.virtual + (mesh.virtual + 1) * mesh.pipe - 2
      sent = 2 * ticks * rows * self._width(config) + sum(message.bytes for message in vocabulary_messages(config))
      seconds += sent / axis_link(config, self._hardware, 'pipe')
    return seconds

  def bytes(self, config: Config) -> float:
    """State, gradients of a microbatch, and activations of the first device's microbatches in flight."""
    mesh, train = config.mesh, config.train
    count, rows = microbatches(config), train.microbatch
    parameters = self._parameters(mesh.tensor, mesh.data, mesh.zero, count, train.remat == 'full')
    if mesh.pipe > 1:  # in a ring of what a stage's layers save, for each microbatch in flight, or where it is made again for one
      slots = self.slots(config)
      rows_held = min(train.stored_microbatches + 2, slots + 1) if train.remat == 'full' else slots + 1
      saved = 'none' if train.remat == 'none' else 'selective'
      ring = self._kept(mesh.tensor, mesh.sequence_parallel, saved) / (mesh.pipe * mesh.virtual)
      held = rows_held * ring + (slots + rows_held) * self._width(config)
    elif train.remat == 'full':
      held = self._width(config) * len(self._config.model.layers)
    else:
      held = self._kept(mesh.tensor, mesh.sequence_parallel, train.remat)
    return _share(parameters['state'], mesh) + rows * held

  def stored(self, config: Config, usable: float) -> int:
    """How many of the microbatches in flight `usable` bytes have room for what their layers save, under train.remat `full`."""
    one = dataclasses.replace(config, train=dataclasses.replace(config.train, stored_microbatches=1))
    none, each = self.bytes(config), self.bytes(one) - self.bytes(config)
    return max(0, min(int((usable - none) / each), self.slots(config) - 1)) if each > 0 else 0

  def slots(self, config: Config) -> int:
    """Microbatches in flight on the first device of a pipeline."""
    mesh = config.mesh
    return min(microbatches(config) * mesh.virtual, (mesh.virtual + 1) * mesh.pipe - 1)

  def _width(self, config: Config) -> float:
    """Bytes of one sequence of the residual stream."""
    cut = config.mesh.tensor if config.mesh.sequence_parallel else 1
    return config.train.seq_len * config.model.d_model * BYTES[config.train.compute_dtype] / cut

  def _of_dearest(self, stages: int, remat: str, vocab_on_pipe: bool) -> float:
    """FLOPs per token of the dearest of `stages` stages."""
    costs, head = layer_executed_flops(self._changed({'pipe': 1}, {'remat': remat})), 3 * head_flops(self._config.model)
    costs[-1] += 0 if vocab_on_pipe else head
    each = iter(costs)
    return max(sum(itertools.islice(each, size)) for size in balance(costs, stages)) + (head / stages if vocab_on_pipe else 0)

  def _of_stream(self, tensor: int, sequence_parallel: bool, remat: str, pipeline: bool) -> tuple[float, float]:
    """Bytes received over `tensor` for one sequence: (by all layers, by embedding and head)."""
    mesh = {'pipe': 2 if pipeline else 1, 'tensor': tensor, 'sequence_parallel': sequence_parallel}
    config = self._changed(mesh, {'remat': remat, 'microbatch': 1})
    layers = sum(count * sum(m.bytes for m in layer_messages(config, kind)) for kind, count in self._counts.items())
    return layers, sum(m.bytes for m in [*embedding_messages(config), *head_messages(config)])

  def _of_kept(self, tensor: int, sequence_parallel: bool, remat: str) -> int:
    """Bytes that all layers keep of one sequence."""
    config = self._changed({'tensor': tensor, 'sequence_parallel': sequence_parallel})
    return sum(count * layer_activations(config, kind, remat) for kind, count in self._counts.items())

  def _of_parameters(self, tensor: int, data: int, zero: int, count: int, full: bool) -> dict[str, tuple[float, float]]:
    """(of all layers, of embedding, final norm and head): bytes of state, of traffic with the memory, and received over `data`."""
    mesh = {'pipe': 1, 'virtual': 1, 'tensor': tensor, 'data': data, 'zero': zero, 'vocab_on_pipe': False}
    config = self._changed(mesh, {'remat': 'full' if full else 'none', 'microbatch': 1, 'batch': count * data})
    layout = make_layout(config, make_stacking(''.join(self._counts), 'unrolled'), make_rules(config))
    layers = [(leaf, n) for run, n in zip(layout['layers'], self._counts.values(), strict=True) for leaf in run[0].values()]
    outer = [(leaf, 1) for part in ('embed', 'final_norm', 'head') if part in layout for leaf in layout[part].values()]
    of = {
      'state': functools.partial(_state, config),
      'traffic': functools.partial(parameter_traffic, config),
      'sent': lambda leaf: sum(m.bytes for m in parameter_messages(config, leaf)) if data > 1 else 0.0,
    }
    return {name: (_sum(count, layers), _sum(count, outer)) for name, count in of.items()}

  def _changed(self, mesh: dict[str, Any] | None = None, train: dict[str, Any] | None = None) -> Config:
    changed = {name: dataclasses.replace(getattr(self._config, name), **(part or {})) for name, part in (('mesh', mesh), ('train', train))}
    return dataclasses.replace(self._config, **changed)


def _share(parts: tuple[float, float], mesh: MeshConfig) -> float:
  """Of one device: its part of the layers, and what all stages have or share."""
  return parts[0] / mesh.pipe + parts[1] / (mesh.pipe if mesh.vocab_on_pipe else 1)


def _sum(of: Callable[[LeafLayout], float], leaves: list[tuple[LeafLayout, int]]) -> float:
  return sum(times * of(leaf) for leaf, times in leaves)


def _state(config: Config, leaf: LeafLayout) -> float:
  """Bytes of a parameter's state, and with several microbatches of the gradient beside the accumulated one."""
  whole = local_elements(config, leaf, data=False)
  state = sum(state_bytes(local_elements(config, leaf), whole, config.mesh.zero, leaf_widths(config, leaf)))
  several = microbatches(config) > 1 and config.mesh.zero < 3
  return state + (whole * BYTES[config.train.compute_dtype] if several else 0)
