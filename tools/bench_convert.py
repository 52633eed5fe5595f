"""Measures what an import and an export of a model take beside the interpreter: most resident memory, and seconds.

  python tools/bench_convert.py --folder=/tmp/convert

A Llama of random bfloat16 numbers is written in several shards, imported and exported, each in a process of its own. Memory is
the most that was resident during the conversion less what was resident before it (Linux counts it; pages of mapped files are in it).
The bound is 1.5 times the largest shard and the largest tensor.
"""

import argparse
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax.numpy as jnp
import numpy as np

from lmscale.config import AttentionConfig, MLPConfig, ModelConfig
from lmscale.interop import mapping
from lmscale.interop.exporting import export_model
from lmscale.interop.huggingface_write import write_config
from lmscale.interop.importing import import_model
from lmscale.interop.shards import ToWrite, write_json, write_shards

CONVERTERS = {'import': import_model, 'export': export_model}


def make_model(flags: argparse.Namespace) -> ModelConfig:
  heads = flags.width // 128
  return ModelConfig(
    pattern='*-' * flags.layers, d_model=flags.width, vocab=flags.vocab, positions='rope', norm_eps=1e-5,
    attention=AttentionConfig(heads, max(heads // 4, 1), 128), mlp=MLPConfig(flags.width * 11 // 4, 'swiglu'),
  )  # fmt: skip


def write_source(folder: pathlib.Path, model: ModelConfig, shard_size: int) -> list[int]:
  """Writes the model; returns the bytes of its tensors."""
  folder.mkdir(parents=True)
  dtype = np.dtype(jnp.bfloat16)

  def random(tensor: mapping.Tensor) -> np.ndarray:
    return np.random.default_rng(len(tensor.name)).standard_normal(tensor.shape, np.float32).astype(dtype)

  tensors = [ToWrite(t.shape, dtype, lambda t=t: random(t), t.name) for t in mapping.tensors('llama', model)]
  write_shards(folder, tensors, shard_size)
  write_json(folder / 'config.json', write_config(model, 4096))
  return [tensor.nbytes for tensor in tensors]


def resident(name: str) -> int:
  """Bytes of this process: VmRSS now, VmHWM at most since it was set back."""
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def convert(what: str, source: str, target: str) -> None:
  """In a process of its own: prints JSON."""
  logging.getLogger('absl').setLevel(logging.CRITICAL)
  before = resident('VmRSS')
  pathlib.Path('/proc/self/clear_refs').write_text('5')
  start = time.perf_counter()
  options = {'tokenizer': False} | ({'shard_size': int(os.environ['SHARD'])} if what == 'export' else {})
  CONVERTERS[what](source, target, **options)
  print(json.dumps({'memory': resident('VmHWM') - before, 'seconds': time.perf_counter() - start}))


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--folder', type=pathlib.Path, required=True, help='where the model is made; must not exist, is removed')
  parser.add_argument('--layers', type=int, default=12)
  parser.add_argument('--width', type=int, default=2048)
  parser.add_argument('--vocab', type=int, default=32000)
  parser.add_argument('--shard', type=int, default=300_000_000, help='bytes')
  parser.add_argument('--convert', nargs=3, help=argparse.SUPPRESS)
  flags = parser.parse_args(argv)
  if flags.convert:
    convert(*flags.convert)
    return 0
  try:
    sizes = write_source(flags.folder / 'hf', make_model(flags), flags.shard)
    shards = [path.stat().st_size for path in (flags.folder / 'hf').glob('*.safetensors')]
    bound = 1.5 * max(shards) + max(sizes)
    print(f'{sum(sizes) / 1e9:.2f} GB in {len(shards)} shards, the largest {max(shards) / 1e6:.0f} MB, the largest tensor '
          f'{max(sizes) / 1e6:.0f} MB: at most {bound / 1e6:.0f} MB')  # fmt: skip
    for what, source, target in (('import', 'hf', 'run'), ('export', 'run', 'out')):
      command = [sys.executable, __file__, f'--folder={flags.folder}', '--convert', what, str(flags.folder / source), str(flags.folder / target)]
      done = subprocess.run(command, env=os.environ | {'SHARD': str(flags.shard)}, stdout=subprocess.PIPE, text=True, check=True)
      found = json.loads(done.stdout.splitlines()[-1])
      print(f'{what}: {found["memory"] / 1e6:.0f} MB, {found["memory"] / bound:.2f} of the bound, {found["seconds"]:.1f} s')
  finally:
    shutil.rmtree(flags.folder, ignore_errors=True)
  return 0


if __name__ == '__main__':
  sys.exit(main())
