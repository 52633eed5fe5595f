"""What the compiler made of a step: bytes and collectives of one device, beside the plan's formulas."""

import collections
import math
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import Mesh

from lmscale.config import Config
from lmscale.parallel.pipeline.layout import microbatches, step_table
from lmscale.plan.collectives import Collective, read_collectives
from lmscale.plan.memory import bytes_per_device


def compiled_report(config: Config, compiled: Any, state: Any, mesh: Mesh) -> dict[str, Any]:
  """Of a compiled step and the shapes and shardings of its state, JSON-able. Bytes are of one device.

  bytes: arguments, outputs, aliased, temporaries as the compiler allocates them, and `total` = arguments + outputs - aliased +
  temporaries. state: master and moments by the plan, by the shardings of the arguments, and whether they are equal;
  other_arguments: what else is handed over, counters and the batch.
  collectives: {axis: {kind: {count, bytes, at_most}}} of one step, bytes as received in a ring; at_most: each branch counts as if it were always
  taken.
  """
  memory = compiled.memory_analysis()
  plan = bytes_per_device(config)
  used = {
    'arguments': memory.argument_size_in_bytes,
    'outputs': memory.output_size_in_bytes,
    'aliased': memory.alias_size_in_bytes,
    'temporaries': memory.temp_size_in_bytes,
  }
  used['total'] = used['arguments'] + used['outputs'] - used['aliased'] + used['temporaries']
  arguments = shard_bytes([state.params, *_moments(state)])
  return {
    'bytes': used,
    'plan_total': plan['total'],
    'state': {'plan': plan['optimizer'] * 3 // 2, 'arguments': arguments, 'equal': plan['optimizer'] * 3 == 2 * arguments},
    'other_arguments': used['arguments'] - arguments,
    'collectives': sum_collectives(read_collectives(compiled.as_text(), mesh, unknown=_turns(config))),
  }


def _turns(config: Config) -> int:
  """Of the step's one loop whose end the program is told: over microbatches, in a pipeline over the ticks of its table."""
  return step_table(config).ticks if config.mesh.pipe > 1 else microbatches(config)


def _moments(state: Any) -> list[Any]:
  """Adam's two, out of the optimizer's state: all in it that has a dim."""
  return [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]


def shard_bytes(tree: Any) -> int:
  """Bytes on one device of a tree of arrays or of their shapes with shardings."""
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def sum_collectives(found: Iterable[Collective]) -> dict[str, dict[str, dict[str, float]]]:
  """{axes, joined by +: {kind: {count, bytes, at_most}}}."""
  sums: dict[str, dict[str, dict[str, float]]] = collections.defaultdict(dict)
  for c in found:
    entry = sums['+'.join(c.axes)].setdefault(c.kind, {'count': 0, 'bytes': 0.0, 'at_most': False})
    entry['count'] += c.times
    entry['bytes'] += c.received
    entry['at_most'] |= c.sometimes
  return dict(sums)
