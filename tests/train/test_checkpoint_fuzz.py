"""Whatever happens to the files of a checkpoint folder: the state as it was saved, an older one and a loud line, or an error.

Never a crash, a hang, or a state that nobody saved. Damage is drawn from a seed; a failure names it.
"""

import collections
import logging
import pathlib
import random
import re
import shutil
import signal

import jax
import numpy as np
import pytest

from lmscale.errors import ConfigError
from lmscale.train.checkpoint import Checkpointer

STEPS = (1, 2, 3)
SECONDS = 30  # for one restore, which takes milliseconds


def tree_of(step: int) -> dict:
  rng = np.random.default_rng(step)
  layer = {'kernel': rng.normal(size=(8, 8)).astype(np.float32), 'bias': rng.normal(size=8).astype(np.float32)}
  return jax.device_put({'params': {'layers': {'0': layer, '1': {'kernel': -layer['kernel']}}}, 'step': np.int32(step)})


def flat(tree: dict) -> list[bytes]:
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


SAVED = {step: flat(tree_of(step)) for step in STEPS}
ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree_of(1))


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp('whole') / 'checkpoints'
  with Checkpointer(folder) as checkpoints:
    for step in STEPS:
      checkpoints.save(step, tree_of(step), {'at': step}, wait=True)
  return folder


# Each damages one file or folder.


def truncate(path: pathlib.Path, rng: random.Random) -> None:
  data = path.read_bytes()
  path.write_bytes(data[: rng.randrange(len(data) + 1)])


def flip(path: pathlib.Path, rng: random.Random) -> None:
  data = bytearray(path.read_bytes())
  for _ in range(rng.choice((1, 1, 8))):
    if data:
      data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  path.write_bytes(data)


def garbage(path: pathlib.Path, rng: random.Random) -> None:
  path.write_bytes(rng.choice((rng.randbytes(rng.randrange(200)), b'{}', b'null', b'[' * 10_000, b'\x80\x04.', b'{"a": 1e999}')))


def grow(path: pathlib.Path, rng: random.Random) -> None:
  path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 100)))


def delete(path: pathlib.Path, rng: random.Random) -> None:
  path.unlink()


def rename(path: pathlib.Path, rng: random.Random) -> None:
  path.rename(path.with_name(rng.choice((path.name + 'x', 'a', 'process_9', '..txt'))))


def delete_folder(path: pathlib.Path, rng: random.Random) -> None:
  shutil.rmtree(path.parent)


def folder_instead(path: pathlib.Path, rng: random.Random) -> None:
  path.unlink()
  path.mkdir()


def link_to_nothing(path: pathlib.Path, rng: random.Random) -> None:
  path.unlink()
  path.symlink_to('nowhere')


def stray(path: pathlib.Path, rng: random.Random) -> None:
  name = rng.choice(('notes.txt', '7', '9.orbax-checkpoint-tmp', '-1', '03', '3.5', '1e3', 'caf\u00e9 \n'))
  root = next(parent for parent in path.parents if parent.name in {str(step) for step in STEPS}).parent
  place = rng.choice((path.parent, root, root))
  target = place / name
  if target.exists():
    return
  target.mkdir() if rng.random() < 0.5 else target.write_bytes(rng.randbytes(20))


def swap(path: pathlib.Path, rng: random.Random) -> None:
  other = rng.choice(sorted(p for p in path.parent.iterdir() if p.is_file()))
  ours, theirs = path.read_bytes(), other.read_bytes()
  path.write_bytes(theirs)
  other.write_bytes(ours)


DAMAGE = (truncate, flip, flip, flip, garbage, grow, delete, rename, delete_folder, folder_instead, link_to_nothing, stray, swap)


def one_trial(whole: pathlib.Path, folder: pathlib.Path, seed: int, caplog: pytest.LogCaptureFixture) -> str:
  """Damages a copy and restores it; returns what came of it."""
  rng, done = random.Random(seed), []
  shutil.copytree(whole, folder)
  for _ in range(rng.choice((1, 1, 1, 2, 5))):
    step = rng.choice((3, 3, 3, 2, 1))
    paths = sorted(p for p in (folder / str(step)).rglob('*') if p.is_file() and not p.is_symlink())
    if paths:
      path, damage = rng.choice(paths), rng.choice(DAMAGE)
      done.append(f'{damage.__name__} {path.relative_to(folder)}')
      damage(path, rng)
  told = f'seed {seed}: {done}'
  before = {int(p.name) for p in folder.iterdir() if p.name in ('1', '2', '3')}
  caplog.clear()
  signal.alarm(SECONDS)
  try:
    with caplog.at_level(logging.WARNING), Checkpointer(folder, keep=9) as checkpoints:
      tree, meta = checkpoints.restore(ABSTRACT)
      loud = [record for record in caplog.records if 'IS DAMAGED' in record.getMessage()]
      outcome = 'whole' if not loud else 'older'
      assert meta['at'] in STEPS and flat(tree) == SAVED[meta['at']], f'{told}: a state that nobody saved'
      passed = {step for step in before if step > meta['at']}
      assert len(loud) >= len(passed), f'{told}: {passed} passed over in silence'
      checkpoints.save(4, tree_of(4), {'at': 4}, wait=True)
      again, meta = checkpoints.restore(ABSTRACT)
      assert meta == {'at': 4} and flat(again) == flat(tree_of(4)), f'{told}: cannot go on'
  except ConfigError as error:
    outcome = 'error'
    assert '\n' not in str(error), told
  except Exception as error:
    raise AssertionError(f'{told}: {type(error).__name__}: {error}') from error
  finally:
    signal.alarm(0)
  kept = {int(p.name[0]) for p in folder.iterdir() if re.fullmatch(r'[123](\.damaged.*)?', p.name)}
  assert before <= kept, f'{told}: {before - kept} is gone'
  return outcome


def _alarm(number: int, frame: object) -> None:
  raise TimeoutError(f'no answer within {SECONDS} s')


def trials(whole, tmp_path, caplog, seeds) -> collections.Counter:
  before = signal.signal(signal.SIGALRM, _alarm)
  try:
    found = collections.Counter()
    for seed in seeds:
      found[one_trial(whole, tmp_path / str(seed), seed, caplog)] += 1
      shutil.rmtree(tmp_path / str(seed))
    return found
  finally:
    signal.signal(signal.SIGALRM, before)


def test_damaged_folders(whole, tmp_path, caplog):
  found = trials(whole, tmp_path, caplog, range(40))
  assert found['older'] > 5 and found['whole'] > 1


@pytest.mark.slow
def test_many_damaged_folders(whole, tmp_path, caplog):
  found = trials(whole, tmp_path, caplog, range(1000, 1500))
  assert min(found[outcome] for outcome in ('older', 'whole', 'error')) > 1
