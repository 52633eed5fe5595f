"""How long a step must take on named hardware: the least time that its FLOPs, its memory traffic and its messages need.

Each is a lower bound by itself, none is a prediction: all peaks are reached, nothing waits but for the pipeline's bubble, and the
messages of different axes are sent at the same time.
"""

from typing import Any

from lmscale.config import Config
from lmscale.models.flops import flops_per_token
from lmscale.parallel.layout import LeafLayout
from lmscale.parallel.mesh import AXES
from lmscale.parallel.pipeline.layout import microbatches
from lmscale.plan.executed import executed_flops
from lmscale.plan.hardware import Hardware
from lmscale.plan.memory import device_parameters, leaf_widths, local_elements


def bounds_report(config: Config, hardware: Hardware, total: int, traffic: dict[str, dict[str, float]], bubble: float) -> dict[str, Any]:
  """Of one step of the full batch, in seconds, JSON-able.

  total: bytes per device; traffic: `step_traffic`; bubble: overhead over the ideal time, by FLOPs.
  flops: executed ones at the peak of bfloat16, the bubble included. memory: `memory_traffic` at the full bandwidth. sent: by axis, each
  over the slowest link that it crosses, `tensor` on neighbouring devices. bound: the name of the largest; seconds: it; mfu: what it leaves.
  fits: whether `total` is in the device's memory.
  """
  devices, tokens = config.mesh.size, config.train.batch * config.train.seq_len
  seconds = {'flops': executed_flops(config) * tokens / devices / hardware.peak * (1 + bubble)}
  seconds['memory'] = memory_traffic(config) / hardware.hbm
  sent = {axis: sum(kinds.values()) / axis_link(config, hardware, axis) for axis, kinds in traffic.items()}
  bound, longest = max([*seconds.items(), *sent.items()], key=lambda item: item[1])
  mfu = flops_per_token(config.model, config.train.seq_len) * tokens / devices / hardware.peak / longest
  found = {'hardware': hardware.name, **seconds, 'sent': sent, 'bound': bound, 'seconds': longest, 'mfu': mfu}
  return found | {'memory_bytes': int(hardware.memory), 'fits': total <= hardware.memory}


def axis_link(config: Config, hardware: Hardware, axis: str) -> float:
  """Bytes/s at which a device receives along a mesh axis. Devices lie in the order of `AXES`, the last one's next to each other."""
  stride = 1
  for inner in AXES[AXES.index(axis) + 1 :]:
    stride *= getattr(config.mesh, inner)
  return hardware.link(getattr(config.mesh, axis), stride)


def memory_traffic(config: Config) -> float:
  """Bytes that a step reads and writes at least on a device: parameters, gradients and the optimizer's state.

  In each microbatch the compute copy is read in the forward and the backward pass, and once more where layers are recomputed, and the
  gradients are written, with several microbatches read and written; the update reads gradients, master and moments and writes the latter
  two. Activations are left out.
  """
  return sum(parameter_traffic(config, leaf) for group in device_parameters(config) for leaf in group)


def parameter_traffic(config: Config, leaf: LeafLayout) -> float:
  """The share of one parameter in `memory_traffic`."""
  stored, whole, widths = local_elements(config, leaf), local_elements(config, leaf, data=False), leaf_widths(config, leaf)
  count, passes = microbatches(config), 3 if config.train.remat == 'full' else 2
  each = (widths.copy or widths.master) * passes + widths.gradient * (2 if count > 1 else 1)
  return count * whole * each + stored * (widths.gradient + 2 * (widths.master + widths.moments))
