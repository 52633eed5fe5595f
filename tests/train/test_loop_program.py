"""The loop on the real program: a sharded model, stopped, resumed on its mesh and on another."""

import os
import signal

import jax
import numpy as np
import pytest
import tiny
from fake_program import FakeTokenizer, lines, with_fields

from lmscale.config import MeshConfig
from lmscale.train import loop
from lmscale.train.checkpoint import Checkpointer
from lmscale.train.program import Program
from lmscale.train.workdir import open_workdir

FIELDS = {
  'loop.checkpoint_every': 2, 'loop.eval_every': 4, 'loop.eval_samples': 5, 'loop.sample_every': 4,
  'loop.sample_tokens': 3, 'loop.sample_prompt': '!"', 'optimizer.warmup_tokens': 256,
}  # fmt: skip

MESH = MeshConfig(1, 4, 2, 1)
PIPE = MeshConfig(2, 2, 2, 1)


class Rows(tiny.Rows):
  identity = 'random rows'

  def bytes_per_token(self, samples):
    return 1.0


class Stopped(Program):
  def step(self, state, batch):
    self.calls = getattr(self, 'calls', 0) + 1
    if self.calls == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    return super().step(state, batch)


def tiny_config(mesh, fields):
  return with_fields(tiny.config(mesh, tiny.change(tiny.MODEL, pattern='*-'), steps=4, remat='none'), FIELDS | fields)


def run(folder, mesh=MESH, program=Program, **fields):
  config = tiny_config(mesh, fields)
  with open_workdir(folder, config) as workdir:
    return loop.train(config, program(config), Rows(), Rows(seed=1), workdir, 1e6, FakeTokenizer())


def stored(folder, step=4):
  program = Program(tiny_config(MeshConfig(1, 1, 1, 0), {}), jax.devices()[:1])
  with Checkpointer(folder / 'checkpoints') as checkpoints:
    tree, _ = checkpoints.restore(program.abstract_stored(), step, program.index)
  return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope='module', params=[MESH, PIPE], ids=['data', 'pipe'])
def whole(request, tmp_path_factory):
  """(mesh, folder) of a run that was not stopped."""
  folder = tmp_path_factory.mktemp('whole')
  assert run(folder, request.param) == loop.DONE
  return request.param, folder


def test_stopped_and_resumed_is_the_same_run(tmp_path, whole):
  mesh, whole = whole
  assert run(tmp_path, mesh, Stopped) == loop.AGAIN
  assert [line['step'] for line in lines(tmp_path)] == [1, 2, 3]
  assert run(tmp_path, mesh) == loop.DONE
  for got, want in zip(stored(tmp_path), stored(whole), strict=True):
    assert got.tobytes() == want.tobytes()
  assert lines(tmp_path) == lines(whole)
  assert (tmp_path / 'samples.txt').read_text() == (whole / 'samples.txt').read_text()


def test_a_run_starts_from_the_parameters_of_one_on_another_mesh(tmp_path, whole):
  """And its first validation is the other's last."""
  mesh, whole = whole
  fields = {'train.init_from': str(whole), 'optimizer.learning_rate': 1e-12, 'optimizer.min_learning_rate': 0.0, 'optimizer.warmup_tokens': 0}
  assert run(tmp_path, {MESH: PIPE, PIPE: MESH}[mesh], **fields) == loop.DONE
  assert lines(tmp_path)[3]['val_loss'] == pytest.approx(lines(whole)[3]['val_loss'], rel=1e-4)


def test_resumed_on_another_mesh(tmp_path, whole):
  mesh, whole = whole
  assert run(tmp_path, mesh, Stopped) == loop.AGAIN
  assert run(tmp_path, {MESH: MeshConfig(1, 8, 1, 3), PIPE: MESH}[mesh]) == loop.DONE
  for got, want in zip(lines(tmp_path), lines(whole), strict=True):
    assert got['step'] == want['step'] and got['tokens'] == want['tokens']
    assert got['loss'] == pytest.approx(want['loss'], rel=1e-4)
    assert got.get('val_loss', 0) == pytest.approx(want.get('val_loss', 0), rel=1e-4)
