"""What the devices of a mesh send each other in a step, by formula, in the collectives that the code asks for.

Bytes are those that a device receives where each group is a ring (`collectives.ring_bytes`): the least that there is.

tensor  each mixer's output is one sum over the devices, and in the backward pass the gradient of its input: an all-reduce of the
        stream, under sequence parallelism a gather before and a scatter behind (arXiv 2205.05198, section 4.2), and one more gather
        of the mixer's input, which is kept cut. The embedding's look-up and the head's gradient are sums in float32.
data    ZeRO's: the compute copy gathered once a step and gradients reduced (stages 1 and 2), or both in each microbatch (3)
pipe    every tick a device sends an activation on and a gradient back; gradients of what all stages have are summed once a step
Scalars, losses, gradients of norms and what is not divided by `tensor` in Mamba-2's norms are left out: they are small.
"""

import collections
from typing import NamedTuple

from lmscale.config import Config
from lmscale.parallel.layout import LeafLayout
from lmscale.parallel.pipeline.layout import microbatches, stage_layers, step_table
from lmscale.parallel.pipeline.stages import device_layers
from lmscale.plan.collectives import ring_bytes
from lmscale.plan.memory import BYTES, device_parameters, layer_blocks, leaf_widths, local_elements


class Message(NamedTuple):
  """A collective and the bytes that a device receives in it."""

  kind: str
  bytes: float


def step_traffic(config: Config) -> dict[str, dict[str, float]]:
  """{axis: {kind: bytes}} of one step, over `tensor` of the device that receives most. mesh.data must be known."""
  mesh, count = config.mesh, microbatches(config)
  sent: dict[str, dict[str, float]] = {}
  if mesh.tensor > 1:
    devices = (_sums(messages, count) for messages in _over_tensor(config))
    sent['tensor'] = max(devices, key=lambda kinds: sum(kinds.values()))
  parameters = [leaf for group in device_parameters(config) for leaf in group]
  if mesh.data > 1:
    sent['data'] = _sums([message for leaf in parameters for message in parameter_messages(config, leaf)])
  if mesh.pipe > 1:
    sent['pipe'] = _sums([_ticks(config), *vocabulary_messages(config), *(_outer(config, leaf) for leaf in parameters if not leaf.on_pipe)])
  return sent


def _sums(messages: list[Message], times: int = 1) -> dict[str, float]:
  """{kind: bytes}"""
  sums: dict[str, float] = collections.defaultdict(float)
  for message in messages:
    sums[message.kind] += times * message.bytes
  return dict(sums)


def _over_tensor(config: Config) -> list[list[Message]]:
  """Of each device in one microbatch."""
  mesh, kinds = config.mesh, config.model.layers
  of = {kind: layer_messages(config, kind) for kind in set(kinds)}
  devices = [[message for i in layers for message in of[kinds[i]]] for layers in device_layers(stage_layers(config), mesh.pipe)]
  for device, messages in enumerate(devices):
    messages += embedding_messages(config) if device == 0 or mesh.vocab_on_pipe else []
    messages += head_messages(config) if device == mesh.pipe - 1 or mesh.vocab_on_pipe else []
  return devices


def parameter_messages(config: Config, leaf: LeafLayout) -> list[Message]:
  """Of one parameter in a step: ZeRO's."""
  mesh, size = config.mesh, local_elements(config, leaf, data=False)
  widths = leaf_widths(config, leaf)
  gather = _message(mesh.data, 'all-gather', size * widths.copy)
  scatter = _message(mesh.data, 'reduce-scatter', size * widths.gradient)
  reduce = _message(mesh.data, 'all-reduce', size * widths.gradient)
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
  # The output, and the gradient of the input. Recomputation makes the output again: in a pipeline of each layer, else of a block's first.
  first = {block[0] for block in layer_blocks(config) if len(block) > 1}
  passes = 3 if train.remat == 'full' and (mesh.pipe > 1 or kind in first) else 2
  kinds = ['all-reduce'] * passes
  if mesh.sequence_parallel:
    kinds = ['all-gather', 'reduce-scatter'] * passes + ['all-gather'] * (passes == 2)
  messages = [_message(mesh.tensor, name, stream * width) for name in kinds]
  channels, times = _whole_channels(config, kind)
  return messages + [_message(mesh.tensor, 'all-reduce', _tokens(config) * channels * width)] * times


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
  """Of the look-up in one microbatch, a sum in float32, and once more where a pipeline recomputes."""
  stream, mesh = _tokens(config) * config.model.d_model, config.mesh
  compute = BYTES[config.train.compute_dtype]
  times = 2 if mesh.pipe > 1 and config.train.remat == 'full' else 1
  if not mesh.sequence_parallel:
    return [_message(mesh.tensor, 'all-reduce', stream * max(4, compute))] * times
  gathered = _message(mesh.tensor, 'all-gather', stream * compute)  # the gradient
  return [_message(mesh.tensor, 'reduce-scatter', stream * max(4, compute))] * times + [gathered]


def head_messages(config: Config) -> list[Message]:
  """Of head and loss in one microbatch: the gradient of the hidden states, a sum in float32, and three numbers a token."""
  mesh, compute = config.mesh, BYTES[config.train.compute_dtype]
  stream = _tokens(config) * config.model.d_model
  reduce = _message(mesh.tensor, 'all-reduce', (stream + 3 * _tokens(config)) * max(4, compute))
  return [reduce] + [_message(mesh.tensor, 'all-gather', stream * compute)] * mesh.sequence_parallel


def _ticks(config: Config) -> Message:
  """Of a pipeline's ticks: in each an activation to the next device and a gradient to the one before."""
  return Message('collective-permute', 2 * step_table(config).ticks * _stream(config))


def _outer(config: Config, leaf: LeafLayout) -> Message:
  """The gradient of a parameter that all stages have, once it is reduced over `data`: summed over them."""
  cut = config.mesh.zero > 0 and leaf.data_dim is not None
  size = local_elements(config, leaf, data=cut) * leaf_widths(config, leaf).gradient
  return _message(config.mesh.pipe, 'all-reduce', size)


def vocabulary_messages(config: Config) -> list[Message]:
  """With the vocabulary on `pipe`: what the first stage takes in and the last gives, and their gradients, on all devices.

  The embedding's output (again where it is recomputed) and the gradient of the head's input are sums in float32.
  """
  if not config.mesh.vocab_on_pipe:
    return []
  width = BYTES[config.train.compute_dtype]
  sums = (3 if config.train.remat == 'full' else 2) * max(4, width) / width
  sizes = [_stream(config) * (2 + sums), 3 * _tokens(config) * max(4, width)]
  return [_message(config.mesh.pipe, 'all-reduce', size) for size in sizes] * microbatches(config)


def _stream(config: Config) -> float:
  """Bytes of a microbatch between two layers, on a device."""
  cut = config.mesh.tensor if config.mesh.sequence_parallel else 1
  return _tokens(config) * config.model.d_model * BYTES[config.train.compute_dtype] / cut


def _tokens(config: Config) -> int:
  """Of a microbatch on one data rank."""
  return config.train.microbatch * config.train.seq_len


def _message(ranks: int, kind: str, size: float) -> Message:
  return Message(kind, ring_bytes(kind, size, ranks))
