"""What the devices of a mesh send each other in a step, by formula, in the collectives that the code asks for.

Bytes are those that a device receives where each group is a ring (`collectives.ring_bytes`): the least that there is.

tensor  each mixer's output is one sum over the devices, and in the backward pass the gradient of its input: an all-reduce of the
        stream, under sequence parallelism a gather before and a scatter behind (arXiv 2205.05198, section 4.2), and one more gather
        where the mixer's input is recomputed. The embedding's look-up and the head's gradient are sums in float32.
data    ZeRO's: the compute copy gathered once a step and gradients reduced (stages 1 and 2), or both in each microbatch (3)
pipe    every tick a device sends an activation on and a gradient back
Scalars, losses, gradients of norms and what is not divided by `tensor` in Mamba-2's norms are left out: they are small.
"""

import collections
from typing import NamedTuple

from lmscale.config import Config
from lmscale.parallel.layout import LeafLayout
from lmscale.parallel.pipeline.layout import microbatches, stage_layers, step_table
from lmscale.parallel.pipeline.stages import device_layers
from lmscale.plan.collectives import ring_bytes
from lmscale.plan.memory import BYTES, device_parameters, leaf_widths, local_elements


class Message(NamedTuple):
  """A kind of collective over an axis; bytes received by a device in a step."""

  axis: str
  kind: str
  bytes: float


def step_traffic(config: Config) -> dict[str, dict[str, float]]:
  """{axis: {kind: bytes}} of one step, on each axis of the device that receives most. mesh.data must be known."""
  most: dict[str, dict[str, float]] = {}
  for messages in _by_device(config):
    sums: dict[str, dict[str, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
    for axis, kind, size in messages:
      sums[axis][kind] += size
    for axis, kinds in sums.items():
      if sum(kinds.values()) > sum(most.get(axis, {}).values()):
        most[axis] = dict(kinds)
  return {axis: most[axis] for axis in ('tensor', 'data', 'pipe') if axis in most}


def _by_device(config: Config) -> list[list[Message]]:
  mesh, kinds = config.mesh, config.model.layers
  layers = device_layers(stage_layers(config), mesh.pipe)
  count = microbatches(config)
  found = []
  for device, groups in enumerate(device_parameters(config)):
    messages = [message for group in groups for leaf in group for message in parameter_messages(config, leaf)] if mesh.data > 1 else []
    if mesh.tensor > 1:
      ends = [embedding_messages(config)] * (device == 0) + [head_messages(config)] * (device == mesh.pipe - 1)
      parts = [*(layer_messages(config, kinds[i]) for i in layers[device]), *ends]
      messages += [message._replace(bytes=count * message.bytes) for part in parts for message in part]
    if mesh.pipe > 1:
      messages.append(_pipe(config))
    found.append(messages)
  return found


def parameter_messages(config: Config, leaf: LeafLayout) -> list[Message]:
  """Of one parameter in a step: ZeRO's."""
  mesh, size = config.mesh, local_elements(config, leaf, data=False)
  widths = leaf_widths(config, leaf)
  gather = _message(mesh.data, 'data', 'all-gather', size * widths.copy)
  scatter = _message(mesh.data, 'data', 'reduce-scatter', size * widths.gradient)
  reduce = _message(mesh.data, 'data', 'all-reduce', size * widths.gradient)
  if leaf.data_dim is None or mesh.zero == 0:
    return [reduce]
  if mesh.zero == 1:
    return [gather, reduce]
  if mesh.zero == 2 or mesh.pipe > 1:
    return [gather, scatter]
  again = leaf.stack is not None  # the embedding and the head are read once
  return ([gather] * (2 if again else 1) + [scatter]) * microbatches(config)


def layer_messages(config: Config, kind: str) -> list[Message]:
  """Of one layer in one microbatch, over `tensor`."""
  model, train, mesh = config.model, config.train, config.mesh
  stream, width = _tokens(config) * model.d_model, BYTES[train.compute_dtype]
  kinds = ['all-reduce'] * 2  # the output, and the gradient of the input
  if mesh.sequence_parallel:
    kinds = ['all-gather', 'reduce-scatter'] * 2 + ['all-gather'] * (train.remat != 'none')
  messages = [_message(mesh.tensor, 'tensor', name, stream * width) for name in kinds]
  channels, times = _whole_channels(config, kind)
  return messages + [_message(mesh.tensor, 'tensor', 'all-reduce', _tokens(config) * channels * width)] * times


def _whole_channels(config: Config, kind: str) -> tuple[int, int]:
  """Channels within a layer that every device has whole, and how often they, or their gradients, are a sum over the devices."""
  model, tensor = config.model, config.mesh.tensor
  if kind == 'm':  # dt, B and C come from channels that are cut; their gradients go to matrices that are whole
    return model.mamba.dt_rank + 2 * model.mamba.state, 3 if config.train.remat == 'full' else 2
  if kind == '*' and model.attention.kv_heads % tensor:
    return 2 * model.attention.kv_heads * model.attention.head_dim, 1
  if kind == 'M' and model.mamba2.groups % tensor:
    return 2 * model.mamba2.groups * model.mamba2.state, 1
  return 0, 0


def embedding_messages(config: Config) -> list[Message]:
  """Of the look-up in one microbatch, a sum in float32."""
  stream, mesh = _tokens(config) * config.model.d_model, config.mesh
  compute = BYTES[config.train.compute_dtype]
  if not mesh.sequence_parallel:
    return [_message(mesh.tensor, 'tensor', 'all-reduce', stream * max(4, compute))]
  sizes = {'reduce-scatter': stream * max(4, compute), 'all-gather': stream * compute}  # the gradient is gathered
  return [_message(mesh.tensor, 'tensor', kind, size) for kind, size in sizes.items()]


def head_messages(config: Config) -> list[Message]:
  """Of head and loss in one microbatch: the gradient of the hidden states, a sum in float32, and three numbers a token."""
  mesh, compute = config.mesh, BYTES[config.train.compute_dtype]
  stream = _tokens(config) * config.model.d_model
  reduce = _message(mesh.tensor, 'tensor', 'all-reduce', (stream + 3 * _tokens(config)) * max(4, compute))
  return [reduce] + [_message(mesh.tensor, 'tensor', 'all-gather', stream * compute)] * mesh.sequence_parallel


def _pipe(config: Config) -> Message:
  """Every tick an activation to the next device and a gradient to the one before."""
  mesh = config.mesh
  stream = _tokens(config) * config.model.d_model * BYTES[config.train.compute_dtype]
  cut = mesh.tensor if mesh.sequence_parallel else 1
  return Message('pipe', 'collective-permute', 2 * step_table(config).ticks * stream / cut)


def _tokens(config: Config) -> int:
  """Of a microbatch on one data rank."""
  return config.train.microbatch * config.train.seq_len


def _message(ranks: int, axis: str, kind: str, size: float) -> Message:
  return Message(axis, kind, ring_bytes(kind, size, ranks))
