"""Which mesh to train a config on: the fastest ones, by a model of a step, that fit in the devices' memory.

A step takes, each after the other: its executed FLOPs at `EFFICIENCY` of the peak, stretched by the pipeline's bubble; the traffic of
parameters, gradients and optimizer to and from memory; what each axis of the mesh sends, over the slowest link that it crosses. Nothing
is hidden behind anything else, so real steps may be faster, and layouts that hide more of what they send may be ahead of others.
Kernels are taken to be as efficient on a sixteenth of a layer as on the whole: of two layouts that are close, take the one with less `tensor`.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from lmscale.config import Config, ConfigError, check_mesh
from lmscale.plan.bounds import bounds_report
from lmscale.plan.hardware import Hardware
from lmscale.plan.memory import bytes_per_device
from lmscale.plan.pipeline import pipeline_report
from lmscale.plan.report import duration
from lmscale.plan.rough import Rough
from lmscale.plan.traffic import step_traffic

EFFICIENCY = 0.6  # of the peak, of what computes
USABLE = 0.9  # of a device's memory: the rest is for the runtime, collectives' buffers and fragments
FOUND = 5  # meshes that are suggested
TRIED = 200  # layouts that are planned exactly
VIRTUAL = (1, 2, 3, 4, 6, 8)
MOST_MICROBATCH = 16
FIELDS = {
  'mesh': ('pipe', 'data', 'tensor', 'zero', 'sequence_parallel', 'schedule', 'virtual', 'vocab_on_pipe'),
  'train': ('microbatch', 'remat', 'stored_microbatches'),
}


def suggest(config: Config, hardware: Hardware, devices: int) -> list[dict[str, Any]]:
  """The best layouts of a config on `devices` of `hardware`, the fastest first, each of another mesh; JSON-able.

  Each: `estimate`, and `flags` that make it of the config. Whatever train.batch divides into is tried; the batch stays as it is.

  Raises:
    ConfigError: no layout can be trained, or none fits, or the config does not compute in bfloat16.
  """
  if devices < 1:
    raise ConfigError(f'--suggest: {devices} devices; give the number of devices that there are')
  if config.train.compute_dtype != 'bfloat16':
    raise ConfigError(f'--suggest: train.compute_dtype is {config.train.compute_dtype}, but peaks are known for bfloat16 only; set it')
  rough = Rough(config, hardware, EFFICIENCY)
  usable = USABLE * hardware.memory
  possible = list(layouts(config, devices))
  if not possible:
    raise ConfigError(_none_possible(config, devices))
  small = [layout for layout in possible if rough.bytes(layout) < 1.1 * usable]
  small += [storing for layout in small if (storing := _storing(layout, rough.stored(layout, usable)))]
  ranked = sorted(small, key=rough.seconds)
  best: dict[Any, dict[str, Any]] = {}
  for layout in ranked[:TRIED]:
    mesh = (layout.mesh.pipe, layout.mesh.data, layout.mesh.tensor)
    if mesh in best or len(best) == FOUND:
      continue
    found = estimate(layout, hardware)
    if found['bytes'] <= usable:
      best[mesh] = found | {'flags': _flags(config, layout)}
  if not best:
    least = min(map(rough.bytes, possible))
    raise ConfigError(
      f'--suggest: {config.name} does not fit on {devices} {hardware.name}: the smallest layout needs about {least / 1e9:.0f} GB of '
      f'{USABLE:.0%} of {hardware.memory / 1e9:.0f} GB a device; use more devices or a shorter train.seq_len'
    )
  return sorted(best.values(), key=lambda found: found['seconds'])


def estimate(config: Config, hardware: Hardware) -> dict[str, Any]:
  """A step of a config on hardware by the model of the module's docstring: seconds, its parts, mfu, and the plan's bytes per device."""
  used, traffic = bytes_per_device(config)['total'], step_traffic(config)
  bubble = pipeline_report(config)['bubble_flops'] if config.mesh.pipe > 1 else 0.0
  bounds = bounds_report(config, hardware, used, traffic, bubble)
  parts = {'FLOPs': bounds['flops'] / EFFICIENCY, 'memory': bounds['memory'], **bounds['sent']}
  if 'tensor' in parts:
    parts['tensor'] *= 1 + bubble  # within the ticks
  seconds = sum(parts.values())
  return {'seconds': seconds, 'parts': parts, 'bubble': bubble, 'mfu': bounds['mfu'] * bounds['seconds'] / seconds, 'bytes': used}


def format_suggestions(config: Config, hardware: Hardware, devices: int, found: list[dict[str, Any]]) -> str:
  """`suggest`'s layouts as text: for each the flags to paste, its time and where it goes."""
  head = (
    f'{config.name} on {devices:,} {hardware.name}, {config.train.batch:,} sequences a step: the fastest meshes whose bytes are within '
    f'{USABLE:.0%} of {hardware.memory / 1e9:.0f} GB.'
  )
  note = f'FLOPs at {EFFICIENCY:.0%} of the peak, nothing that is sent hidden behind them: to rank by, no promise.'
  lines = [head, note]
  for i, layout in enumerate(found, 1):
    parts = ', '.join(f'{name} {duration(seconds)}' for name, seconds in layout['parts'].items())
    bubble = f' (bubble {layout["bubble"]:.1%})' if layout['bubble'] else ''
    lines += ['', f'{i}. {duration(layout["seconds"])} a step, MFU {layout["mfu"]:.1%}, {layout["bytes"] / 1e9:.1f} GB a device']
    lines += [f'   {parts}{bubble}', f'   {" ".join(layout["flags"])}']
  return '\n'.join(lines)


def layouts(config: Config, devices: int) -> Iterator[Config]:
  """Every layout of a config on `devices` that its checks allow."""
  for tensor, pipe in itertools.product(_divisors(devices), repeat=2):
    if devices % (tensor * pipe):
      continue
    data = devices // (tensor * pipe)
    cuts = [(virtual, vocab) for virtual in VIRTUAL for vocab in (False, True)] if pipe > 1 else [(1, False)]
    for (virtual, vocab), power in itertools.product(cuts, range(MOST_MICROBATCH.bit_length())):
      mesh = {'pipe': pipe, 'data': data, 'tensor': tensor, 'virtual': virtual, 'sequence_parallel': False}
      mesh |= {'schedule': 'interleaved' if virtual > 1 else '1f1b', 'vocab_on_pipe': vocab}
      plain = _changed(config, mesh, {'microbatch': 2**power, 'stored_microbatches': 0})
      if not _allowed(plain):
        continue
      cut = _changed(plain, {'sequence_parallel': True})
      for layout in [plain, cut] if tensor > 1 and _allowed(cut) else [plain]:
        stages = (1,) if data == 1 else (1, 2) if pipe > 1 else (1, 2, 3)  # a pipeline does under 3 what it does under 2
        for zero, remat in itertools.product(stages, ('none', 'selective', 'full')):
          yield _changed(layout, {'zero': zero}, {'remat': remat})


def _changed(config: Config, mesh: dict[str, Any], train: dict[str, Any] | None = None) -> Config:
  mesh_config, train_config = dataclasses.replace(config.mesh, **mesh), dataclasses.replace(config.train, **(train or {}))
  return dataclasses.replace(config, mesh=mesh_config, train=train_config)


def _storing(layout: Config, microbatches: int) -> Config | None:
  """The same layout, with so many of the microbatches in flight stored; None where that is no other."""
  if not microbatches or layout.mesh.pipe == 1 or layout.train.remat != 'full':
    return None
  return _changed(layout, {}, {'stored_microbatches': microbatches})


def _allowed(config: Config) -> bool:
  try:
    check_mesh(config)
  except ConfigError:
    return False
  return True


def _divisors(n: int) -> list[int]:
  return [i for i in range(1, n + 1) if n % i == 0]


def _none_possible(config: Config, devices: int) -> str:
  """Why no layout is allowed: that of plain data parallelism, which is the easiest to mend."""
  try:
    check_mesh(_changed(config, {'pipe': 1, 'data': devices, 'tensor': 1, 'virtual': 1, 'schedule': '1f1b'}, {'microbatch': 1}))
  except ConfigError as error:
    return f'--suggest: no mesh of {devices} devices divides {config.name}; with mesh.data={devices}: {error}'
  return f'--suggest: no mesh of {devices} devices divides {config.name}'


def _flags(config: Config, layout: Config) -> list[str]:
  """What makes `layout` of `config`; of the mesh all that is not its default."""
  flags = [f'--config.mesh.{axis}={getattr(layout.mesh, axis)}' for axis in ('pipe', 'data', 'tensor')]
  for section, names in FIELDS.items():
    before, after = getattr(config, section), getattr(layout, section)
    values = {name: getattr(after, name) for name in names if getattr(after, name) != getattr(before, name)}
    flags += [f'--config.{section}.{name}={str(value).lower()}' for name, value in values.items()]
  return list(dict.fromkeys(flags))

