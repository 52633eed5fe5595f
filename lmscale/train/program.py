"""A config on a mesh, ready to run: the compiled step, evaluation, sampling, and the state in its stored form.

Everything that touches devices is behind `Program`; the loop sees states, batches and numbers.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from lmscale.config import Config
from lmscale.data.tokenizer import Tokenizer
from lmscale.eval.scorer import Scorer
from lmscale.generate.engine import Engine
from lmscale.generate.generator import Generator, collect
from lmscale.generate.weights import make_compute_copy
from lmscale.models import model
from lmscale.parallel.calling import Caller
from lmscale.parallel.feed import Feed, Rows
from lmscale.parallel.gradients import make_evaluate, make_gradients
from lmscale.parallel.layout import map_layout
from lmscale.parallel.mesh import make_mesh
from lmscale.parallel.setup import make_setup
from lmscale.train import stored
from lmscale.train.optimizer import decays, make_optimizer
from lmscale.train.schedule import StepInputs
from lmscale.train.spikes import no_norms
from lmscale.train.state import BOOKKEEPING, TrainState
from lmscale.train.step import make_step
from lmscale.train.stored import Index


class Program:
  """A resolved config on its mesh. `devices` defaults to all."""

  def __init__(self, config: Config, devices: list[jax.Device] | None = None):
    self.config = config
    self.mesh = make_mesh(config.mesh, devices)
    self.setup = make_setup(config, self.mesh)
    self._tx = make_optimizer(config.optimizer, map_layout(lambda leaf: decays(leaf.name, leaf.spec.shape), self.setup.layout))
    self._feed = Feed(config, self.mesh)
    self._run = Caller(self.setup)
    loss, whole = model.next_token_loss(config.model, config.train.loss_chunk), self._feed.whole
    step = make_step(config, self._tx, make_gradients(self.setup, loss))
    self._step = jax.jit(step, donate_argnums=0, out_shardings=(self._state, whole))
    self._evaluate = jax.jit(make_evaluate(self.setup, loss), out_shardings=whole)
    self._compute_copy = jax.jit(make_compute_copy(self.setup))

  @property
  def rows_per_microbatch(self) -> int:
    """Sequences of one microbatch over all data ranks."""
    return self._feed.rows_per_microbatch

  def init(self) -> TrainState:
    """The state before the first step, born on the mesh. Equal for every mesh."""
    return self._run(jax.jit(self._fresh, out_shardings=self._state))

  def step(self, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step; `state` is consumed. See `train.step.make_step` for the metrics."""
    return self._run(self._step, state, batch)

  def abstract_state(self) -> TrainState:
    """Shapes, dtypes and shardings of the state."""
    shapes = jax.eval_shape(self._fresh)
    return jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, self._state)

  def lower_step(self, platform: str | None = None) -> Any:
    """The step lowered from shapes alone; `.compile()` it to read its text or its memory.

    platform: 'cuda' or 'tpu' instead of the devices at hand; its text can then be read, but not compiled here.
    """
    batch = self._feed.abstract(self.config.train.batch // self.rows_per_microbatch)
    batch['learning_rate'] = jax.ShapeDtypeStruct((), jnp.float32, sharding=self._feed.whole)
    with self._run.context():
      traced = self._step.trace(self.abstract_state(), batch)
      return traced.lower(lowering_platforms=(platform,)) if platform else traced.lower()

  def batch(self, inputs: StepInputs, loader: Rows) -> dict[str, jax.Array]:
    """The device batch of a step."""
    batch = self._feed.put(loader, inputs.first_sample, inputs.batch, self.config.train.batch // self.rows_per_microbatch)
    return batch | {'learning_rate': self._feed.scalar(np.float32(inputs.learning_rate))}

  def evaluate(self, state: TrainState, loader: Rows, samples: int) -> tuple[float, int]:
    """Mean loss in nats per counted token, and the count, over samples 0..samples-1 of `loader`."""
    loss, count, most = 0.0, 0, self.rows_per_microbatch * self.config.mesh.pipe
    for first in range(0, samples, most):
      rows = min(most, samples - first)
      batch = self._feed.put(loader, first, rows, self.config.mesh.pipe, trains=False)
      part = self._run(self._evaluate, state.params, batch)
      loss, count = loss + float(part[0]), count + int(part[1])
    return loss / max(count, 1), count

  def generate(
    self, state: TrainState, prompt: list[int], steps: int, temperature: float, seed: int, ids: int | None = None
  ) -> list[int]:
    """`steps` tokens after `prompt`, all below `ids` (the tokenizer's size); temperature 0 is greedy."""
    options = dataclasses.replace(self.config.generate, tokens=steps, temperature=temperature)
    with self._generating(state) as engine:
      return collect(Generator(engine, ids).generate([prompt], options, seed), 1)[0].ids

  @contextlib.contextmanager
  def scorer(self, state: TrainState, tokenizer: Tokenizer, context: int, between: Callable[[], None]) -> Iterator[Scorer]:
    """`state`'s model as tasks see it, see `Scorer`. Beside the state there is a copy of the parameters as long as it is asked."""
    with self._generating(state) as engine:
      yield Scorer(engine, tokenizer, self.config.generate, context, between)

  @contextlib.contextmanager
  def _generating(self, state: TrainState) -> Iterator[Engine]:
    self._engine.params = self._run(self._compute_copy, state.params)
    try:
      yield self._engine
    finally:
      self._engine.params = None

  def fingerprint(self, state: TrainState) -> str:
    """Of the parameters, see `stored.fingerprint`: that of the checkpoint in which they are stored."""
    return stored.fingerprint(stored.checksums({'params': self.stored(state)['params']}, self.index))

  @functools.cached_property
  def index(self) -> Index:
    """Which layer lies in which row of `stored`, see `train.stored`."""
    return stored.index_of(self.setup.stacking, ('params', 'opt/mu', 'opt/nu'))

  def stored(self, state: TrainState) -> dict[str, Any]:
    """The state as it is stored: the same arrays in nested dicts."""
    opt = {name: stored.unstacked(optax.tree_utils.tree_get(state.opt_state, name)) for name in ('mu', 'nu')}
    opt['count'] = optax.tree_utils.tree_get(state.opt_state, 'count')
    return {'params': stored.unstacked(state.params), 'opt': opt, **{name: getattr(state, name) for name in BOOKKEEPING}}

  def abstract_stored(self) -> dict[str, Any]:
    """Shapes, dtypes and this mesh's shardings of `stored`, for a restore."""
    return self.stored(self.abstract_state())

  def from_stored(self, tree: dict[str, Any]) -> TrainState:
    """Inverse of `stored`. What an older format does not hold starts afresh."""
    params = self.params_from_stored(tree['params'])
    moments = {name: self.params_from_stored(tree['opt'][name]) for name in ('mu', 'nu')}
    structure = jax.eval_shape(self._fresh)
    opt_state = optax.tree_utils.tree_set(structure.opt_state, count=tree['opt']['count'], **moments)
    kept = {name: tree[name] for name in BOOKKEEPING if name in tree}
    fresh = {'spikes': np.int32(0), 'norms': np.asarray(no_norms())}
    kept |= {name: jax.device_put(value, self._feed.whole) for name, value in fresh.items() if name not in kept}
    return TrainState(params=params, opt_state=opt_state, **kept)

  def params_from_stored(self, tree: dict[str, Any]) -> Any:
    """The parameters of a state from their part of `stored`."""
    return stored.stacked(tree, self.setup.stacking)

  def _fresh(self) -> TrainState:
    params = model.init_runs(self.config.model, self.setup.stacking, self.config.seed, self.setup.master_dtype)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params, self._tx.init(params), step=zero, skipped=zero, spikes=zero, norms=no_norms())

  @functools.cached_property
  def _state(self) -> TrainState:
    """The shardings of the state."""
    whole = self._feed.whole
    params = map_layout(lambda leaf: NamedSharding(self.mesh, leaf.stored), self.setup.layout)
    opt_state = optax.tree_utils.tree_map_params(
      self._tx,
      lambda _, sharding: sharding,
      jax.eval_shape(self._fresh).opt_state,
      params,
      transform_non_params=lambda _: whole,
    )
    return TrainState(params=params, opt_state=opt_state, **dict.fromkeys(BOOKKEEPING, whole))

  @functools.cached_property
  def _engine(self) -> Engine:
    return Engine(self.setup, None, self._run)
