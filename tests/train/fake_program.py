"""A program and a loader small enough to train in milliseconds, with the methods of the real ones.

Run as a script it is a whole training run: `fake_program.py WORKDIR [section.field=value ...]`.
"""

import dataclasses
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from lmscale.config import Config, LoopConfig, OptimizerConfig, TrainConfig
from lmscale.train.checkpoint import Checkpointer
from lmscale.train.loop import train
from lmscale.train.optimizer import apply_update, global_norm, make_optimizer
from lmscale.train.spikes import is_spike, keep_norm, no_norms, usual_norm
from lmscale.train.state import BOOKKEEPING, TrainState
from lmscale.train.workdir import open_workdir

TIMINGS = ('tokens_per_second', 'data_wait', 'seconds')
SIZE = 256  # a 256 x 256 map: with its moments 0.8 MB, long enough to be killed while it is written

CONFIG = Config(
  name='fake',
  train=TrainConfig(steps=24, batch=4, seq_len=SIZE, ramp_start=2, ramp_increment=1, ramp_tokens=20 * SIZE),
  optimizer=OptimizerConfig(learning_rate=0.01, min_learning_rate=0.001, warmup_tokens=8 * SIZE, clip=1.0),
  loop=LoopConfig(eval_every=7, eval_samples=3, checkpoint_every=3, keep=2, sample_every=10, sample_tokens=4),
)


class FakeLoader:
  """Row i is noise from a generator seeded with i; `bad` is a sample that holds a NaN; `delay` seconds a batch."""

  def __init__(self, identity='fake', bad=(), delay=0.0):
    self.identity = {'name': identity, 'files': (1, 2)}
    self._bad, self._delay = bad, delay

  def batch(self, first_sample, rows):
    time.sleep(self._delay)
    out = np.stack([np.random.default_rng(first_sample + i).normal(size=SIZE) for i in rows]).astype(np.float32)
    for i in rows:
      if first_sample + i in self._bad:
        out[i - rows.start] = np.nan
    return {'x': out}

  def bytes_per_token(self, samples):
    return 2.0


class FakeTokenizer:
  end = 0
  size = 256

  def encode(self, text):
    return np.frombuffer(text.encode(), np.uint8)

  def decode(self, ids):
    return ''.join(map(str, ids))


class FakeProgram:
  """Learns to map each row to itself."""

  def __init__(self, config):
    self._tx = make_optimizer(config.optimizer, {'layers': {'0': {'kernel': True}}})
    self._step = jax.jit(self._one, static_argnums=3, donate_argnums=0)
    self._clip, self._spike_skip = config.optimizer.clip, config.train.spike_skip
    self.config = config
    self.index = {}

  @staticmethod
  def _loss(params, x):
    return jnp.mean(jnp.square(x @ params['layers']['0']['kernel'] - x))

  def init(self):
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(SIZE, SIZE)) * 0.1, jnp.float32)
    params = {'layers': {'0': {'kernel': kernel}}}
    zeros = [jnp.int32(0) for _ in range(3)]
    return TrainState(params, self._tx.init(params), *zeros, no_norms())

  def batch(self, inputs, loader):
    return jnp.asarray(loader.batch(inputs.first_sample, range(inputs.batch))['x']), inputs.learning_rate

  def step(self, state, batch):
    return self._step(state, *batch, self._clip)

  def _one(self, state, x, rate, clip):
    loss, grads = jax.value_and_grad(self._loss)(state.params, x)
    norm = global_norm(grads)
    finite, usual = jnp.isfinite(loss) & jnp.isfinite(norm), usual_norm(state.norms)
    spike = finite & is_spike(norm, usual, self._spike_skip)
    ok = finite & ~spike
    new = apply_update(self._tx, grads, state.opt_state, state.params, rate, norm, clip)
    params, opt_state = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, (state.params, state.opt_state))
    counts = {'skipped': state.skipped + ~finite, 'spikes': state.spikes + spike}
    state = TrainState(params, opt_state, state.step + 1, **counts, norms=keep_norm(state.norms, norm))
    return state, counts | {'loss': loss, 'grad_norm': norm, 'usual_norm': usual, 'tokens': jnp.int32(x.size), 'ok': ok}

  def evaluate(self, state, loader, samples):
    x = loader.batch(10**6, range(samples))['x']
    return float(self._loss(state.params, x)), x.size

  def stored(self, state):
    adam = state.opt_state[0]
    opt = {'mu': adam.mu, 'nu': adam.nu, 'count': adam.count}
    return {'params': state.params, 'opt': opt, **{name: getattr(state, name) for name in BOOKKEEPING}}

  def abstract_stored(self):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.stored(self.init())
    )

  def from_stored(self, tree):
    adam, *rest = self._tx.init(tree['params'])
    adam = adam._replace(**tree['opt'])
    return TrainState(tree['params'], (adam, *rest), **{name: tree[name] for name in BOOKKEEPING})

  def params_from_stored(self, tree):
    return tree

  def generate(self, state, prompt, steps, temperature, seed, ids=None):
    return [int(state.step), seed, len(prompt)][:steps]


def with_fields(config, fields):
  """`config` with {'section.field': value} replaced."""
  for path, value in fields.items():
    section, _, field = path.rpartition('.')
    if section:
      field, value = section, dataclasses.replace(getattr(config, section), **{field: value})
    config = dataclasses.replace(config, **{field: value})
  return config


def run(folder, fields=None, loader=None, program=FakeProgram, reference=None):
  """One process's share of a run in `folder`: opens it, trains, returns the exit code."""
  config = with_fields(CONFIG, fields or {})
  with open_workdir(folder, config) as workdir:
    loader = loader or FakeLoader()
    return train(config, program(config), loader, FakeLoader(), workdir, 6.0 * SIZE, FakeTokenizer(), reference)


def stored(folder, step=None):
  """(leaves as bytes by order, meta) of a checkpoint of a fake run."""
  with Checkpointer(pathlib.Path(folder) / 'checkpoints') as checkpoints:
    tree, meta = checkpoints.restore(FakeProgram(CONFIG).abstract_stored(), step)
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)], meta


def lines(folder, timings=False):
  """metrics.jsonl, without its timing keys unless `timings`."""
  parsed = [json.loads(text) for text in (pathlib.Path(folder) / 'metrics.jsonl').read_text().splitlines()]
  return parsed if timings else [{k: v for k, v in line.items() if k not in TIMINGS} for line in parsed]


if __name__ == '__main__':
  given = dict(argument.split('=') for argument in sys.argv[2:])
  delay = float(given.pop('delay', '0'))
  sys.exit(run(sys.argv[1], {k: json.loads(v) for k, v in given.items()}, FakeLoader(delay=delay)))
