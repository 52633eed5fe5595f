"""Times and weighs the kernels of this package, beside the floor of the device and beside PyTorch's, in one run.

  python tools/bench_kernels.py                                            # this machine, a few minutes on a CPU
  python tools/bench_kernels.py --shapes=8b,peers --out=bench/ssd_h200     # a GPU: all 23 shapes, with the peers it finds
  python tools/bench_kernels.py --op=selective_scan --implementations=scan,xla --lengths=1024,4096

Per shape a fresh process, in which all candidates take turns: the median of --repeats samples, on a GPU with the L2
cache flushed. Prints Markdown; --out=PREFIX also writes PREFIX.md, PREFIX.json and PREFIX.svg. See bench_timing for
what a sample is, bench_ops for the shapes and the floors, bench_peers for how a peer is checked first.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable

from bench_ops import OPS, Peaks, Shape, costs, floor, make_functions, make_inputs

PASSES = ('forward', 'forward+backward')
COLOURS = ('#08519c', '#d94801', '#238b45', '#6a51a3', '#a50f15', '#dd1c77', '#7f6000', '#17becf', '#525252')


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--op', choices=sorted(OPS), default='ssd')
  parser.add_argument('--shapes', default='', help='small, 8b, wide, peers (these two ssd alone) or several; default small, on a GPU 8b')
  parser.add_argument('--lengths', default='', help='replaces the lengths of the shapes, e.g. 1024,4096')
  parser.add_argument('--implementations', default='', help='default: all of the operation')
  parser.add_argument('--dtype', default='', help='of the activations; default float32 on a CPU, else bfloat16')
  parser.add_argument('--repeats', type=int, default=20)
  parser.add_argument('--out', type=pathlib.Path, help='prefix of the files to write')
  parser.add_argument('--worker', help=argparse.SUPPRESS)
  options = parser.parse_args(argv)
  try:
    if options.worker:
      print(json.dumps(work(**json.loads(options.worker))))
      return 0
    report = run(options)
  except ValueError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  text = markdown(report)
  print(text)
  if options.out:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix('.md').write_text(text + '\n')
    options.out.with_suffix('.json').write_text(json.dumps(report, indent=1) + '\n')
    draw(report, options.out.with_suffix('.svg'))
  return 0


def run(options: argparse.Namespace) -> dict:
  """The report: where and how, and a row per shape, candidate and pass. Raises ValueError for a wrong flag."""
  op = OPS[options.op]
  names = [name for name in options.implementations.split(',') if name]
  if unknown := set(names) - set(op.implementations):
    raise ValueError(f'--implementations: {", ".join(sorted(unknown))} unknown; {options.op} has {", ".join(op.implementations)}')
  sets = [name for name in options.shapes.split(',') if name]
  if unknown := set(sets) - set(op.shapes):
    raise ValueError(f'--shapes: {", ".join(sorted(unknown))} unknown; {options.op} has {", ".join(op.shapes)}')
  if options.lengths and not op.backward:
    raise ValueError(f'--lengths: {options.op} is one decoding step, of one token')
  where = in_fresh_process(task='describe', dtype=options.dtype)
  dtype = where['dtype']
  sets = sets or ['small' if where['platform'] == 'cpu' else '8b']
  shapes = [shape for name in sets for shape in op.shapes[name]]
  if options.lengths:
    shapes = list(dict.fromkeys(s._replace(length=int(l)) for s in shapes for l in options.lengths.split(',')))
  rows = []
  for shape in shapes:
    print(f'{options.op} {shape} ...', file=sys.stderr, flush=True)
    task = {'op': options.op, 'shape': shape, 'dtype': dtype, 'repeats': options.repeats}
    rows += in_fresh_process(task='time', implementations=names or op.implementations, **task)
  return {'op': options.op, 'repeats': options.repeats, 'command': ' '.join(sys.argv), **where, 'rows': rows}


def in_fresh_process(**task: object) -> object:
  """What `work` returns in a new interpreter. Raises ValueError with its message where that refuses the task."""
  environment = os.environ | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
  command = [sys.executable, __file__, f'--worker={json.dumps(task)}']
  done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
  if done.returncode == 2:
    raise ValueError(done.stderr.strip().splitlines()[-1].removeprefix('error: '))
  if done.returncode:
    raise RuntimeError(f'{" ".join(command)} ended with {done.returncode}:\n{done.stderr}')
  return json.loads(done.stdout.splitlines()[-1])


def work(task: str, **options: object) -> object:
  """The entry of a worker process."""
  import jax

  if jax.default_backend() == 'cpu' and jax.device_count() > 1:
    raise ValueError('the CPU is cut into emulated devices, which distorts timings: unset XLA_FLAGS and try again')
  return {'describe': describe, 'time': time_shape}[task](**options)


def describe(dtype: str) -> dict:
  """Device, versions, load and measured peaks."""
  import jax
  from bench_timing import measure_peaks

  device = jax.devices()[0]
  dtype = dtype or ('float32' if device.platform == 'cpu' else 'bfloat16')
  kind = device.device_kind if device.platform != 'cpu' else f'CPU {platform.machine()}'
  cores = len(os.sched_getaffinity(0))
  versions = {'python': platform.python_version(), 'jax': jax.__version__}
  load = round(os.getloadavg()[0], 1)
  with jax.default_matmul_precision('highest' if dtype == 'float32' else 'default'):
    peaks = measure_peaks(dtype)
  return {'platform': device.platform, 'device': kind, 'cores': cores, 'load': load, 'versions': versions,
          'xla_flags': os.environ.get('XLA_FLAGS', ''), 'dtype': dtype, 'peaks': peaks}  # fmt: skip


def time_shape(op: str, shape: list, dtype: str, repeats: int, implementations: list[str]) -> list[dict]:
  """Rows of one shape: all implementations, in both modes where there are two, and for the SSD the peers."""
  import jax
  from bench_timing import jax_candidate, measure

  shape, op = Shape(*shape), OPS[op]
  rows, candidates = [], {}
  inputs = make_inputs(op, shape, dtype)
  found = costs(op, shape, inputs)
  dy = next(inputs[name] for name in 'xyq' if name in inputs)  # any values of y's shape and dtype

  def refuse(name: str, reason: object) -> None:
    rows.append({'shape': shape, 'candidate': name, 'refused': str(reason).splitlines()[0]})

  with jax.default_matmul_precision('highest' if dtype == 'float32' else 'default'):
    for implementation in implementations:
      for deterministic in (True, False) if implementation.startswith('pallas') and op.modes else (True,):
        name = implementation if deterministic else f'{implementation}, not deterministic'
        for part, function in make_functions(op, shape, implementation, deterministic).items():
          try:
            candidates[name, part] = jax_candidate(function, inputs, *[dy] * (part != 'forward'))
          except (ValueError, NotImplementedError, ImportError, RuntimeError) as reason:
            refuse(name, reason)
  if op is OPS['ssd']:
    with jax.default_matmul_precision('highest' if dtype == 'float32' else 'default'):
      add_peers(candidates, refuse, shape, dtype, (inputs, dy))
  for part in PASSES:  # the two passes apart, so that short calls are not always preceded by long ones
    group = {key: candidate for key, candidate in candidates.items() if key[1] == part}
    for key, samples in measure(group, repeats, jax.default_backend() != 'cpu').items():
      low, median, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
      rows.append({
        'shape': shape, 'candidate': key[0], 'pass': part, 'seconds': median, 'quartiles': [low, high],
        'cost': {name: found[name] for name in part.split('+')}, 'memory': group[key].memory,
      })  # fmt: skip
  return rows


def add_peers(candidates: dict, refuse: Callable, shape: Shape, dtype: str, arguments: tuple) -> None:
  """Those of PyTorch, and of JAX with `arguments` (inputs, dy), that can be imported and are right."""
  from bench_jla import jla_candidates, jla_peers
  from bench_peers import Refused, peer_candidates, peers

  of_jax = functools.partial(jla_candidates, arguments=arguments)
  for packages, find, time_them in (('mamba_ssm, fla', peers, peer_candidates), ('jax-linear-attention', jla_peers, of_jax)):
    try:
      found = find()
    except Refused as reason:
      refuse(packages, reason)
      continue
    for name, function in found.items():
      try:
        candidates.update({(name, part): candidate for part, candidate in time_them(function, shape, dtype).items()})
      except Refused as reason:
        refuse(name, reason)


def markdown(report: dict) -> str:
  """Where and how, then one table; times beside the floor, rates as least work / time, memory beside inputs + outputs."""
  peaks = Peaks(*report['peaks'])
  lines = [
    f'**{report["op"]}**, {report["dtype"]}, on {report["device"]} ({report["cores"]} cores, load {report["load"]}), '
    + ', '.join(f'{name} {version}' for name, version in report['versions'].items())
    + (f', XLA_FLAGS {report["xla_flags"]}' if report['xla_flags'] else ''),
    f'`{report["command"]}`: median of {report["repeats"]}, candidates in turns.',
    f'Floors: {peaks.bytes / 1e9:.3g} GB/s (copy) and {peaks.flops / 1e12:.3g} TFLOP/s (matmul), measured in the same run.',
    '',
    '| shape | candidate | pass | ms | quartiles | floor ms | GB/s | TFLOP/s | peak MB | in + out MB |',
    '|---|---|---|---|---|---|---|---|---|---|',
  ]
  for row in timed(report):
    size, flops = (sum(cost[i] for cost in row['cost'].values()) for i in (0, 1))
    t, (low, high) = row['seconds'], row['quartiles']
    rate = f'{flops / t / 1e12:.3g}' if flops else '-'
    lines.append(
      f'| {Shape(*row["shape"])} | {row["candidate"]} | {row["pass"]} | {t * 1e3:.4g} | {low * 1e3:.4g} to {high * 1e3:.4g} | '
      f'{floor(row["cost"], row["pass"], peaks) * 1e3:.3g} | {size / t / 1e9:.3g} | {rate} | '
      f'{row["memory"] / 1e6:,.1f} | {row["cost"]["forward"][0] / 1e6:,.1f} |'
    )
  for ratio in ratios(report):
    lines += ['', ratio]
  refused: dict[tuple[str, str], list[str]] = {}
  for row in report['rows']:
    if 'refused' in row:
      refused.setdefault((row['candidate'], row['refused']), []).append(str(Shape(*row['shape'])))
  for (name, reason), where in refused.items():
    lines += ['', f'Not timed: {name}: {reason} ({"; ".join(dict.fromkeys(where))})']
  return '\n'.join(lines)


def timed(report: dict) -> list[dict]:
  return [row for row in report['rows'] if 'seconds' in row]


def ratios(report: dict) -> list[str]:
  """How many times as fast as 'scan' every other candidate is, per shape."""
  lines = []
  for shape in dict.fromkeys(tuple(row['shape']) for row in timed(report)):
    seconds = {(row['candidate'], row['pass']): row['seconds'] for row in timed(report) if tuple(row['shape']) == shape}
    for name in dict.fromkeys(name for name, _ in seconds if name != 'scan'):
      parts = [f'{part} {seconds["scan", part] / seconds[name, part]:.2f}x' for part in PASSES
               if ('scan', part) in seconds and (name, part) in seconds]  # fmt: skip
      if parts:
        lines.append(f'{Shape(*shape)}: {name} against scan: {", ".join(parts)} as fast')
  return lines


def draw(report: dict, path: pathlib.Path) -> None:
  """Times of every candidate and the floor against the shape, one panel per pass."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  rows, peaks = timed(report), Peaks(*report['peaks'])
  shapes = list(dict.fromkeys(tuple(row['shape']) for row in rows))
  names = list(dict.fromkeys(row['candidate'] for row in rows))
  passes = [part for part in PASSES if any(row['pass'] == part for row in rows)]
  style = {'svg.fonttype': 'none', 'font.size': 10, 'axes.spines.top': False, 'axes.spines.right': False}
  with pyplot.rc_context(style):
    height = 2 + 0.32 * len(shapes)
    figure, axes = pyplot.subplots(1, len(passes), figsize=(11, height), sharey=True, squeeze=False, layout='constrained')
    for axis, part in zip(axes[0], passes, strict=True):
      at = {tuple(row['shape']): floor(row['cost'], part, peaks) * 1e3 for row in rows if row['pass'] == part}
      axis.plot(at.values(), [shapes.index(s) for s in at], 'k|', markersize=12, markeredgewidth=2, label='floor')
      for name, colour in zip(names, COLOURS * 3, strict=False):
        mine = [row for row in rows if (row['candidate'], row['pass']) == (name, part)]
        y = [shapes.index(tuple(row['shape'])) for row in mine]
        axis.plot([row['seconds'] * 1e3 for row in mine], y, 'o', color=colour, label=name)
      axis.set(xscale='log', xlabel='ms', title=part, ylim=(len(shapes) - 0.5, -0.5))
      axis.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
      axis.xaxis.set_major_formatter('{x:g}')
      axis.xaxis.set_minor_formatter('')
      axis.grid(axis='x', which='both', color='#dddddd', linewidth=0.6)
      axis.set_axisbelow(True)
    axes[0, 0].set_yticks(range(len(shapes)), [str(Shape(*shape)) for shape in shapes])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=4, frameon=False)
    figure.suptitle(f'{report["op"]}, {report["dtype"]}, {report["device"]}')
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == '__main__':
  sys.exit(main())
