"""The plan of a run as a dict for scripts and as text for people."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from lmscale.config import Config, run_tokens
from lmscale.kernels.choice import Choice
from lmscale.models.flops import flops_per_token, flops_per_token_paper
from lmscale.parallel.layout import zero_share
from lmscale.plan.bounds import bounds_report
from lmscale.plan.executed import executed_flops
from lmscale.plan.hardware import Hardware
from lmscale.plan.memory import bytes_per_device
from lmscale.plan.parameters import parameters_by_kind
from lmscale.plan.pipeline import pipeline_report
from lmscale.plan.traffic import step_traffic

ENOUGH = 0.99  # of the parameters cut by ZeRO: what is left over is small
_DEVICES = {'cpu': 'a CPU', 'gpu': 'a GPU', 'tpu': 'a TPU'}
NEAR = 8  # how far from mesh.data another size is looked for


def make_report(config: Config, hardware: Sequence[Hardware] = (), kernels: Sequence[Choice] = ()) -> dict[str, Any]:
  """Parameters, FLOPs and bytes of a config whose mesh.data is known. Allocates nothing; values are JSON-able.

  Keys that scripts rely on: parameters.total, parameters.by_kind, flops_per_token, flops_per_token_paper,
  bytes_per_device.{parameters, gradients, optimizer, activations, total}, and with mesh.pipe > 1 those of `pipeline_report`
  under pipeline. zero_share: of the parameters, cut over `data`. traffic: see `step_traffic`. bounds: of a step on each `hardware`, see
  `bounds_report`; none for a config that does not compute in bfloat16, in which their peaks are. kernels: those that were chosen.
  """
  kinds = parameters_by_kind(config.model)
  train, seq_len = config.train, config.train.seq_len
  tokens = run_tokens(train)
  flops = flops_per_token(config.model, seq_len)
  used, traffic = bytes_per_device(config), step_traffic(config)
  pipeline = pipeline_report(config) if config.mesh.pipe > 1 else {}
  named = hardware if train.compute_dtype == 'bfloat16' else ()
  return {
    'name': config.name,
    'pattern': config.model.pattern,
    'parameters': {'total': sum(kinds.values()), 'by_kind': kinds},
    'flops_per_token': flops,
    'flops_per_token_paper': flops_per_token_paper(config.model, seq_len),
    'tokens': tokens,
    'flops': flops * tokens,
    'steps': train.steps,
    'tokens_per_step': train.batch * seq_len,
    'mesh': dataclasses.asdict(config.mesh),
    'devices': config.mesh.size,
    'zero_share': zero_share(config),
    'zero_advice': zero_advice(config),
    'flops_executed_per_token': executed_flops(config),
    'kernels': [choice._asdict() for choice in kernels],
    'bytes_per_device': used,
    'traffic': traffic,
    'bounds': [bounds_report(config, of, used['total'], traffic, pipeline.get('bubble_flops', 0.0)) for of in named],
    **({'pipeline': pipeline} if pipeline else {}),
  }


def zero_advice(config: Config) -> str:
  """What stands against cutting the parameters over `data`, and which sizes would cut more; empty where all that is large is cut."""
  mesh, share = config.mesh, zero_share(config)
  if not mesh.zero or mesh.data == 1 or share > ENOUGH:
    return ''
  sizes = (dataclasses.replace(mesh, data=data) for data in range(max(2, mesh.data - NEAR), mesh.data + NEAR + 1))
  better = [m.data for m in sizes if zero_share(dataclasses.replace(config, mesh=m)) > ENOUGH]
  nearest = ' or '.join(map(str, sorted(better, key=lambda d: (abs(d - mesh.data), d))[:2]))
  return f'no dim of the rest divides by data {mesh.data}' + (f', mesh.data {nearest} would' if nearest else '')


def format_report(report: dict[str, Any]) -> str:
  """The report as a table of about twenty lines, and with a pipeline its timetable."""
  total, mesh = report['parameters']['total'], report['mesh']
  rows = [('parameters', f'{total:,}', short(total))]
  rows += [(f'  {kind}', f'{n:,}', f'{n / total:.1%}') for kind, n in report['parameters']['by_kind'].items() if n]
  rows += [
    ('FLOPs per token', f'{report["flops_per_token"]:,}', 'forward + backward, causal attention halved'),
    ('  as in papers', f'{report["flops_per_token_paper"]:,}', 'attention in full'),
    ('  executed', f'{report["flops_executed_per_token"]:,}', 'recomputation included'),
    ('tokens', f'{report["tokens"]:,}', f'{report["steps"]:,} steps, up to {report["tokens_per_step"]:,} a step'),
    ('  per parameter', f'{report["tokens"] / total:.1f}', ''),
    ('FLOPs of the run', f'{report["flops"]:.3g}', ''),
    ('devices', f'{report["devices"]:,}', _mesh_text(mesh)),
    *([('  cut by ZeRO', f'{report["zero_share"]:.1%}', report['zero_advice'])] if mesh['zero'] and mesh['data'] > 1 else []),
    *_kernel_rows(report['kernels']),
    ('bytes per device', '', 'estimate; the fullest device'),
  ]
  rows += [(f'  {group}', size(n), '') for group, n in report['bytes_per_device'].items()]
  rows += _traffic_rows(report['traffic'])
  pipeline = report.get('pipeline')
  rows += _pipeline_rows(pipeline) if pipeline else []
  rows += _bounds_rows(report['bounds'])
  rows += _compiled_rows(report) if 'compiled' in report else []
  left = max(len(row[0]) for row in rows)
  middle = max(len(row[1]) for row in rows)
  head = f'{report["name"]}: {_short_pattern(report["pattern"])}'
  lines = [head, *(f'{a:<{left}}  {b:>{middle}}  {c}'.rstrip() for a, b, c in rows)]
  advice = [f'This does not fit. {report["advice"]}'] if 'advice' in report else []
  return '\n'.join([*lines, *advice, *(['', *pipeline['picture']] if pipeline else [])])


def _kernel_rows(kernels: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
  """What runs the operations, and of what would come first why it does not."""
  rows = [('kernels' * (not i), k['name'], f'{k["op"].replace("_", " ")} on {_DEVICES.get(k["on"], k["on"])}' + ', as named' * k['named']) for i, k in enumerate(kernels)]
  return rows + [('', '', f'not {name}: {why}') for k in kernels for name, why in k['passed_over']]


def _pipeline_rows(pipeline: dict[str, Any]) -> list[tuple[str, str, str]]:
  several = f' * {pipeline["virtual_stages"]} a device' if pipeline['virtual_stages'] > 1 else ''
  bound = '' if pipeline['bubble'] - pipeline['bubble_async'] < 1e-9 else f'; {pipeline["bubble_async"]:.1%} without lock step'
  sizes = _repeats([len(layers) for layers in pipeline['layers']])
  return [
    ('pipeline', pipeline['schedule'], f'{pipeline["stages"]} stages{several}, {pipeline["microbatches"]:,} microbatches'),
    ('  ticks', f'{pipeline["ticks"]:,}', 'of the timetable; all devices walk it in lock step'),
    ('  bubble', f'{pipeline["bubble"]:.1%}', f'over the ideal time, a backward pass being 2 forward{bound}'),
    ('  by real FLOPs', f'{pipeline["bubble_flops"]:.1%}', 'over the ideal time, unequal stages included'),
    ('  in flight', f'{max(pipeline["in_flight"])}', f'by device {_repeats(pipeline["in_flight"])}'),
    ('  layers', f'{max(map(len, pipeline["layers"]))}', f'by stage {sizes}'),
    ('', '', pipeline['cut']),
  ]


def _traffic_rows(traffic: dict[str, dict[str, float]]) -> list[tuple[str, str, str]]:
  rows = [('sent per step', '', 'what the fullest device receives, by axis')] if traffic else []
  for axis, kinds in traffic.items():
    rows.append((f'  {axis}', size(sum(kinds.values())), ', '.join(f'{kind} {size(n)}' for kind, n in kinds.items())))
  return rows


def _bounds_rows(bounds: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
  rows = [('time of a step', '', 'at least, if all peaks are reached; of what takes longest')] if bounds else []
  for b in bounds:
    parts = {'FLOPs': b['flops'], 'memory': b['memory'], **b['sent']}
    each = ', '.join(f'{name} {duration(seconds)}' for name, seconds in parts.items())
    fits = '' if b['fits'] else f'; does not fit in {b["memory_bytes"] / 1e9:.0f} GB'
    rows.append((f'  {b["hardware"]}', duration(b['seconds']), f'{each}: at most {b["mfu"]:.1%} MFU{fits}'))
  return rows


def duration(seconds: float) -> str:
  """Seconds to three digits, in seconds or milliseconds."""
  return f'{seconds:.3g} s' if seconds >= 1 else f'{1000 * seconds:.3g} ms'


def _compiled_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
  compiled, plan = report['compiled'], report['bytes_per_device']
  used, state, seconds = compiled['bytes'], compiled['state'], compiled['seconds']
  exact = 'the plan says the same' if state['equal'] else f'the plan says {size(state["plan"])}'
  rows = [
    ('compiled for', f'{compiled["devices"]:,}', f'{compiled["device_kind"]}, lowered in {seconds["lower"]:.0f} s, compiled in {seconds["compile"]:.0f} s'),
    ('  arguments', size(used['arguments']), f'{state["arguments"]:,} B of them parameters and optimizer: {exact}'),
    ('  temporaries', size(used['temporaries']), f'and outputs that are no arguments {size(used["outputs"] - used["aliased"])}'),
    ('  total', size(used['total']), f'{used["total"] / plan["total"]:.2f} of the plan'),
  ]
  for axes, kinds in compiled['collectives'].items():
    sent, formula = sum(k['bytes'] for k in kinds.values()), sum(report['traffic'].get(axes, {}).values())
    at_most = 'at most ' if any(k['at_most'] for k in kinds.values()) else ''
    beside = f'{at_most}{sent / formula:.2f} of the plan; ' if formula else at_most
    rows.append((f'  sent, {axes}', size(sent), beside + ', '.join(f'{n["count"]:,} {kind}' for kind, n in kinds.items())))
  return rows


def _repeats(values: list[int], most: int = 60) -> str:
  """Numbers in a line of at most about `most` characters, equal neighbours counted, the middle left out."""
  runs = [(value, len(list(group))) for value, group in itertools.groupby(values)]
  words = [f'{value} ({n} times)' if n > 2 else ', '.join([str(value)] * n) for value, n in runs]
  while len(', '.join(words)) > most:
    words = [word for word in words if word != '...']
    words[len(words) // 2 : len(words) // 2 + 1] = ['...']
  return ', '.join(words)


def short(n: float) -> str:
  """A count as people say it: 8,655,000,000 -> 8.655 B."""
  for unit, name in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'K')):
    if n >= unit:
      return f'{n / unit:.3f} {name}'
  return str(n)


def size(n: float) -> str:
  """Bytes in binary units."""
  for unit in ('B', 'KiB', 'MiB', 'GiB'):
    if n < 1024:
      return f'{n:.0f} {unit}' if unit == 'B' else f'{n:.2f} {unit}'
    n /= 1024
  return f'{n:.2f} TiB'


def _mesh_text(mesh: dict[str, Any]) -> str:
  sequence = ', sequence parallel' if mesh['sequence_parallel'] else ''
  return f'pipe {mesh["pipe"]} * data {mesh["data"]} * tensor {mesh["tensor"]}, ZeRO {mesh["zero"]}{sequence}'


def _short_pattern(pattern: str) -> str:
  layers = pattern.replace('|', '')
  return f'{pattern if len(pattern) <= 70 else pattern[:67] + "..."} ({len(layers)} layers)'
