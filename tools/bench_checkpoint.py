"""How long a checkpoint of a recipe takes to save and to restore, and how many bytes of arrays are there meanwhile.

  python tools/bench_checkpoint.py --config=configs/mamba_study.py:arch=hybrid,size=800m [--set model.vocab=32768]

One device, random parameters, nothing is trained. Prints the arrays stored and their bytes, the seconds until `save` returns and
until it is on disk, for the first save, which compiles the checksums, and the next one, the seconds of a restore with the same
stacking and with another (every layer by itself), and the most bytes of live arrays seen during each, over those of the state.
The folder (--folder) needs at most twice the room of the state.
"""

import argparse
import dataclasses
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from lmscale.config import Config, recipes, resolve_mesh
from lmscale.train.checkpoint import Checkpointer
from lmscale.train.program import Program

SECONDS = 0.02  # between two looks at what is alive


def live_bytes() -> int:
  """Bytes of all arrays that are alive; views of one buffer count once."""
  buffers = {}
  for array in jax.live_arrays():
    for shard in array.addressable_shards:
      buffers[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
  return sum(buffers.values())


def watched(work: Callable[[], Any]) -> tuple[Any, float, int]:
  """(result, seconds, the most bytes of live arrays seen from a second thread)."""
  done, seen = threading.Event(), [live_bytes()]

  def look() -> None:
    while not done.wait(SECONDS):
      seen.append(live_bytes())

  thread = threading.Thread(target=look)
  thread.start()
  start = time.monotonic()
  try:
    result = work()
  finally:
    seconds = time.monotonic() - start
    done.set()
    thread.join()
  return result, seconds, max(*seen, live_bytes())


def measure(config: Config, folder: pathlib.Path) -> list[tuple[str, str]]:
  """Rows of the table."""
  program = Program(config, jax.devices()[:1])
  unrolled = dataclasses.replace(config, train=dataclasses.replace(config.train, stack='unrolled'))
  rows, size = measure_save(program, folder)
  for name, other in (('same stacking', program), ('layer by layer', Program(unrolled, jax.devices()[:1]))):
    rows.append((f'restored, {name}', measure_restore(other, folder, size)))
  return rows


def measure_save(program: Program, folder: pathlib.Path) -> tuple[list[tuple[str, str]], int]:
  """(rows of the table, bytes of the state)."""
  state = jax.block_until_ready(program.init())
  sizes = [leaf.nbytes for leaf in jax.tree.leaves(state)]
  rows = [('state', f'{sum(sizes) / 1e9:.2f} GB in {len(sizes):,} arrays')]
  with Checkpointer(folder, keep=1) as checkpoints:
    for step, name in ((1, 'first'), (2, 'next')):
      _, seconds, most = watched(lambda step=step: checkpoints.save(step, program.stored(state), {}, index=program.index))
      _, more, _ = watched(checkpoints.wait)
      rows.append((f'{name} save returned after', f'{seconds:.2f} s, {most / sum(sizes):.3f} of the state alive'))
      rows.append(('on disk after', f'{seconds + more:.2f} s'))
  return rows, sum(sizes)


def measure_restore(program: Program, folder: pathlib.Path, size: int) -> str:
  """Seconds, and the most bytes alive over `size`."""
  with Checkpointer(folder) as checkpoints:
    _, seconds, most = watched(lambda: checkpoints.restore(program.abstract_stored(), index=program.index))
  return f'{seconds:.2f} s, {most / size:.3f} of the state alive'


def main() -> int:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', required=True)
  parser.add_argument('--set', action='append', default=[], metavar='FIELD=VALUE', help='a field of the config; may be repeated')
  parser.add_argument('--folder', help='where the checkpoint is written; a temporary folder if left out')
  flags = parser.parse_args()
  one_device = [('mesh.tensor', '1'), ('mesh.pipe', '1'), ('mesh.data', '1')]
  config = recipes.load(flags.config, one_device + [tuple(field.split('=', 1)) for field in flags.set])
  config = resolve_mesh(config, 1)
  with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
    rows = measure(config, pathlib.Path(folder) / 'checkpoints')
  for name, value in rows:
    print(f'{name:<26}{value}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
