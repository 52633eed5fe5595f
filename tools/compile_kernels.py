"""Compiles the GPU kernels for an H200 that is not there, and says what the compiler made of them.

  python tools/compile_kernels.py                          every case at every shape, as a Markdown table
  python tools/compile_kernels.py 'ssd pallas_triton'      the cases whose name starts so; --shape=8b-b1, --json=FILE

Registers, spills and shared memory are those of the machine code, as ptxas reports them; temporary memory is what XLA
allocates beside arguments and results; a launch within a loop counts once. Nothing runs, so nothing here is a time on
a GPU. The exit code is 1 if a kernel does not compile or is outside BOUNDS, and 2 if the CUDA compiler is not
installed (the message says how).

A new kernel is a line in CASES; one that may spill or serialise needs a line in BOUNDS that says how much.
"""

import argparse
import dataclasses
import functools
import glob
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parent.parent

# heads, head_dim, state, groups, length, batch; the Mamba-1 layer has heads * head_dim channels and a state of 16.
SHAPES = {
  '8b-b1': (128, 64, 128, 8, 4096, 1),
  '8b-b4': (128, 64, 128, 8, 4096, 4),
  '2.7b-b8': (80, 64, 128, 1, 2048, 8),
}


@dataclasses.dataclass(frozen=True)
class Bound:
  """What one kernel may use: bytes spilled (the larger of stores and loads), bytes of shared memory, and whether
  ptxas may serialise its wgmma instructions."""

  spill: int = 0
  smem: int = 232_448
  serialised: bool = False


# By the beginning of the kernel's name, the longest first; every other kernel has Bound(). Measured for the shapes
# above and rounded up, so that a change which costs registers or shared memory is noticed.
BOUNDS = {
  'ssd_forward': Bound(spill=256, smem=104_000),  # Triton gives a program 255 registers at most
  'ssd_backward': Bound(spill=208, smem=113_000),  # two programs per multiprocessor
  'ssd_mosaic_walk': Bound(spill=64, smem=156_000),
  'ssd_mosaic_outer': Bound(spill=72, smem=146_000),
}


def bound_of(kernel: str, bounds: dict[str, Bound]) -> Bound:
  """The bound whose key is the longest beginning of the kernel's name."""
  matching = [key for key in bounds if kernel.startswith(key)]
  return bounds[max(matching, key=len)] if matching else Bound()


# What is compiled: a function and the shapes and dtypes of its arguments ------------------------------------------


def _ssd(shape, implementation, gradient=False, packed=False):
  import jax.numpy as jnp

  from lmscale.kernels import segments
  from lmscale.kernels.ssd import ssd
  from lmscale.kernels.ssd.mosaic import entry

  h, p, n, g, l, b = shape
  x, B, dt = ((b, l, h, p), jnp.bfloat16), ((b, l, g, n), jnp.bfloat16), ((b, l, h), jnp.float32)
  head, ids = ((h,), jnp.float32), ((b, l), jnp.int32)

  def forward(x, dt, A, B, C, D, segment_ids):
    if implementation == 'pallas_mosaic':  # `ssd` refuses it until its numerics were checked on a GPU.
      state = jnp.zeros((b, h, p, n), jnp.float32)
      document = None if segment_ids is None else segments.documents(segment_ids)[0]
      return entry.ssd_pallas_mosaic(x, dt, A, B, C, D, state, document, 64)
    return ssd(x, dt, A, B, C, D=D, segment_ids=segment_ids, implementation=implementation)

  return _maybe_gradient(forward, gradient), (x, dt, head, B, B, head, ids if packed else None)


def _selective_scan(shape, implementation, gradient=False):
  import jax.numpy as jnp

  from lmscale.kernels.selective_scan import selective_scan

  h, p, _, _, l, b = shape
  x, dt = ((b, l, h * p), jnp.bfloat16), ((b, l, h * p), jnp.float32)
  A, B, D = ((h * p, 16), jnp.float32), ((b, l, 16), jnp.bfloat16), ((h * p,), jnp.float32)

  def forward(x, dt, A, B, C, D):
    return selective_scan(x, dt, A, B, C, D=D, implementation=implementation)

  return _maybe_gradient(forward, gradient), (x, dt, A, B, B, D)


def _ssd_update(shape, implementation):
  import jax.numpy as jnp

  from lmscale.kernels.ssd_update import ssd_update

  h, p, n, g, _, b = shape
  b *= 16
  x, B, head = ((b, h, p), jnp.bfloat16), ((b, g, n), jnp.bfloat16), ((h,), jnp.float32)

  def step(state, x, dt, A, B, C, D, z):
    return ssd_update(state, x, dt, A, B, C, D=D, z=z, implementation=implementation)

  return step, (((b, h, p, n), jnp.float32), x, ((b, h), jnp.float32), head, B, B, head, x)


def _maybe_gradient(forward, gradient):
  """forward, or the function of the same arguments that returns the gradient of every floating one."""
  import jax
  import jax.numpy as jnp

  if not gradient:
    return forward

  def backward(*args):
    floating = [i for i, m in enumerate(args) if m is not None and jnp.issubdtype(m.dtype, jnp.floating)]

    def of_floating(*values):
      filled = list(args)
      for i, value in zip(floating, values, strict=True):
        filled[i] = value
      return forward(*filled)

    out, vjp = jax.vjp(of_floating, *(args[i] for i in floating))
    return out, vjp(jax.tree.map(lambda m: (m * 0.5).astype(m.dtype), out))

  return backward


def _cases() -> dict[str, Callable]:
  cases = {}
  for name in ('xla', 'pallas_triton', 'pallas_mosaic'):
    cases[f'ssd {name} forward'] = functools.partial(_ssd, implementation=name)
    cases[f'ssd {name} gradient'] = functools.partial(_ssd, implementation=name, gradient=True)
    cases[f'ssd {name} gradient, packed'] = functools.partial(_ssd, implementation=name, gradient=True, packed=True)
  for name in ('xla', 'pallas_triton'):
    cases[f'selective_scan {name} forward'] = functools.partial(_selective_scan, implementation=name)
    cases[f'selective_scan {name} gradient'] = functools.partial(_selective_scan, implementation=name, gradient=True)
  for name in ('xla', 'pallas_triton'):
    cases[f'ssd_update {name}'] = functools.partial(_ssd_update, implementation=name)
  return cases


CASES = _cases()


# One case in a process of its own, because the dump flags are read once per process ------------------------------


def compile_case(case: str, shape: str) -> dict:
  """Compiles a case for the H200 in this process. Returns its compile time in s and its temporary memory in bytes."""
  import jax
  import numpy as np
  from jax.experimental import topologies
  from jax.sharding import NamedSharding, PartitionSpec

  from lmscale.plan.hardware import gpu_target

  devices = topologies.get_topology_desc(
    platform='cuda', topology_name='h200', target_config=gpu_target('H200'), topology='1x1x1'
  ).devices
  mesh = jax.sharding.Mesh(np.array(devices), ('device',), axis_types=(jax.sharding.AxisType.Auto,))
  jax.default_backend = lambda: 'gpu'  # what the operations ask for their chunks and layouts; a process per case
  one = NamedSharding(mesh, PartitionSpec())
  function, specs = CASES[case](SHAPES[shape])
  args = [spec and jax.ShapeDtypeStruct(*spec, sharding=one) for spec in specs]
  # Where there is no GPU, JAX 0.11 takes the compute capability from the context mesh.
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = jax.jit(function).trace(*args).lower(lowering_platforms=('cuda',))
  began = time.perf_counter()
  compiled = lowered.compile()
  seconds = time.perf_counter() - began
  return {'compile_seconds': round(seconds, 1), 'temp_bytes': compiled.memory_analysis().temp_size_in_bytes}


def measure(case: str, shape: str, ptxas: str) -> dict:
  """Compiles a case in a fresh process and reads its dumps.

  Returns {case, shape, compile_seconds, temp_bytes, launches, kernels: [...]} or {case, shape, error}.
  """
  with tempfile.TemporaryDirectory() as folder:
    environment = os.environ | {
      'JAX_PLATFORMS': 'cpu', 'JAX_SKIP_CUDA_CONSTRAINTS_CHECK': '1', 'TF_CPP_MIN_LOG_LEVEL': '3',
      'XLA_FLAGS': f'--xla_dump_to={folder} --xla_dump_emitter_re=ptx', 'MOSAIC_GPU_DUMP_TO': folder,
      'PYTHONPATH': str(ROOT),
    }  # fmt: skip
    command = [sys.executable, __file__, '--worker', case, shape]
    result = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    row = {'case': case, 'shape': shape}
    if result.returncode:
      lines = [line for line in result.stderr.splitlines() if re.match(r'[\w.]*(Error|Exception)\b', line)]
      return row | {'error': (lines or result.stderr.splitlines() or ['no message'])[-1]}
    dumps = read_dumps(pathlib.Path(folder), ptxas)
    return row | json.loads(result.stdout.splitlines()[-1]) | dumps


def read_dumps(folder: pathlib.Path, ptxas: str) -> dict:
  """The number of launches and, of each Pallas kernel, what ptxas says of the PTX that XLA and Mosaic dumped."""
  sequence = '\n'.join(path.read_text() for path in folder.glob('*.thunk_sequence.txt'))
  launches, kernels = re.findall(r': k(?:CustomKernel|CustomCall|Gemm|Convolution|Kernel)\b', sequence), []
  triton = set()
  for path in folder.glob('*gpu_after_optimizations.txt'):
    found = re.findall(r'"__gpu\$xla\.gpu\.triton".*? name = "([^"]+)", num_stages', path.read_text())
    triton |= set(found)
  for path in sorted(folder.glob('*.ptx')):
    text = path.read_text()
    for name in re.findall(r'\.entry (\w+)\(', text):
      mosaic = name.endswith('_mosaic_gpu_kernel')
      if not mosaic and not any(re.fullmatch(rf'{re.escape(wanted)}(_+\d+)*', name) for wanted in triton):
        continue
      target = re.search(r'\.target (\w+)', text)[1]
      command = [ptxas, '-v', f'-arch={target}', str(path), '-o', os.devnull]
      report = parse_ptxas(subprocess.run(command, check=False, capture_output=True, text=True).stderr, name)
      if mosaic:
        report['kernel'] = name.removesuffix('_mosaic_gpu_kernel')
        report['smem'] = _mosaic_smem(path.with_suffix('.mlir-passes.log'))
      else:
        report['smem'] = max(report['smem'], parse_smem(sequence, name))
      kernels.append(report)
  return {'launches': len(launches), 'kernels': kernels}


def parse_ptxas(text: str, name: str) -> dict:
  """Of the output of `ptxas -v`: {kernel, registers, spill, smem, serialised} of one entry function.

  spill is the larger of the bytes stored and loaded; smem is the static part. Raises ValueError if it is not there.
  """
  entries = re.split(r"Compiling entry function '(\w+)'", text)
  reports = dict(zip(entries[1::2], entries[2::2], strict=True))
  if name not in reports or not (registers := re.search(r'Used (\d+) registers', reports[name])):
    raise ValueError(f'ptxas did not report on {name}: {text.strip()[-300:] or "no output"}')
  spills = re.search(r'(\d+) bytes spill stores, (\d+) bytes spill loads', reports[name])
  smem = re.search(r'(\d+) bytes smem', reports[name])
  return {
    'kernel': name, 'registers': int(registers[1]), 'spill': max(int(spills[1]), int(spills[2])),
    'smem': int(smem[1]) if smem else 0,
    # The warning stands before or within the report of its function.
    'serialised': any('serialized' in line and name in line for line in text.splitlines()),
  }  # fmt: skip


def parse_smem(sequence: str, name: str) -> int:
  """The shared memory of a kernel's launches, in bytes, from XLA's dump of its thunks; 0 if it is not there."""
  found = re.findall(rf'\s{re.escape(name)} grid: .*shared_memory: (\d+) bytes', sequence)
  return max(map(int, found), default=0)


def _mosaic_smem(log: pathlib.Path) -> int:
  with log.open() as lines:
    for line in lines:
      if found := re.search(r'dynamic_shared_memory_size %c(\d+)_i32', line):
        return int(found[1])
  raise ValueError(f'{log.name} has no dynamic_shared_memory_size')


def violations(row: dict, bounds: dict[str, Bound]) -> list[str]:
  """One sentence for each bound that a row of `measure` breaks."""
  where = f'{row["case"]} at {row["shape"]}'
  if 'error' in row:
    return [f'{where} did not compile: {row["error"]}']
  found = []
  for kernel in row['kernels']:
    bound, name = bound_of(kernel['kernel'], bounds), kernel['kernel']
    if kernel['spill'] > bound.spill:
      found.append(f'{where}: {name} spills {kernel["spill"]} B, {bound.spill} are allowed')
    if kernel['smem'] > bound.smem:
      found.append(f'{where}: {name} needs {kernel["smem"]} B of shared memory, {bound.smem} are allowed')
    if kernel['serialised'] and not bound.serialised:
      found.append(f'{where}: ptxas serialises the wgmma instructions of {name}')
  if not row['kernels'] and 'pallas' in row['case']:
    found.append(f'{where}: no Pallas kernel was found in what was compiled')
  return found


def table(rows: list[dict]) -> str:
  """A Markdown row per Pallas kernel, or one per case where XLA made all kernels."""
  head = 'case | shape | kernel | registers | spill B | shared memory B | launches | temporary MB | compile s'
  lines = [f'| {head} |', '|---' * 9 + '|']
  for row in rows:
    first = [row['case'], row['shape']]
    if 'error' in row:
      lines.append('| ' + ' | '.join([*first, 'does not compile', *['-'] * 6]) + ' |')
      continue
    last = [str(row['launches']), f'{row["temp_bytes"] / 1e6:,.0f}', f'{row["compile_seconds"]:.1f}']
    for kernel in row['kernels'] or [None]:
      middle = ['-'] * 4
      if kernel:
        middle = [f'`{kernel["kernel"]}`', str(kernel['registers']), str(kernel['spill']), f'{kernel["smem"]:,}']
      lines.append('| ' + ' | '.join([*first, *middle, *last]) + ' |')
      last = [''] * 3
  return '\n'.join(lines)


def missing() -> str | None:
  """What to install for this Python, in one line, or None if the CUDA compiler is there."""
  import jaxlib

  version = jaxlib.__version__
  plugin = importlib.util.find_spec('jax_cuda13_plugin') or importlib.util.find_spec('jax_cuda12_plugin')
  if plugin and find_ptxas():
    return None
  wheels = ' '.join(f'nvidia-{name}' for name in (
    'cuda-nvcc', 'nvvm', 'cuda-runtime', 'cuda-nvrtc', 'cuda-crt', 'cuda-cccl'))  # fmt: skip
  return (
    'compile_kernels needs the CUDA compiler (no GPU, about 1.5 GB): '
    f'pip install --no-deps jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version} {wheels}'
  )


def find_ptxas() -> str | None:
  """The path of ptxas: of the installed CUDA wheels, else of the system."""
  for folder in map(pathlib.Path, sys.path):
    for path in sorted(glob.glob(str(folder / 'nvidia' / '*' / 'bin' / 'ptxas'))):
      return path
  return shutil.which('ptxas')


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code: 0, 1 for a broken bound, 2 for a mistake of the user's."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('cases', nargs='*', default=[''], help=f'beginnings of: {", ".join(CASES)}')
  parser.add_argument('--shape', action='append', choices=SHAPES, help='may be repeated; all of them if left out')
  parser.add_argument('--json', type=pathlib.Path, help='also write the rows to this file')
  parser.add_argument('--worker', nargs=2, metavar=('CASE', 'SHAPE'), help=argparse.SUPPRESS)
  flags = parser.parse_args(argv)
  if message := missing():
    print(f'error: {message}', file=sys.stderr)
    return 2
  if flags.worker:
    print(json.dumps(compile_case(*flags.worker)))
    return 0
  chosen = [case for case in CASES if any(case.startswith(begin) for begin in flags.cases)]
  if unknown := [begin for begin in flags.cases if not any(case.startswith(begin) for case in CASES)]:
    print(f"error: no case starts with '{unknown[0]}'; the cases are {', '.join(CASES)}", file=sys.stderr)
    return 2
  rows = []
  for case in chosen:
    for shape in flags.shape or SHAPES:
      print(f'{case} at {shape} ...', file=sys.stderr, flush=True)
      rows.append(measure(case, shape, find_ptxas()))
  print(table(rows))
  if flags.json:
    flags.json.write_text(json.dumps(rows, indent=1) + '\n')
  broken = [sentence for row in rows for sentence in violations(row, BOUNDS)]
  for sentence in broken:
    print(f'error: {sentence}', file=sys.stderr)
  return 1 if broken else 0


if __name__ == '__main__':
  sys.exit(main())
