"""A config on a mesh, ready to run: the compiled step, evaluation, sampling, and the state in its stored form.

Everything that touches devices is behind `Program`; the loop sees states, batches and numbers.
"""

import contextlib
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lmscale import processes as distributed
from lmscale.batch import ROWS
from lmscale.config import Config
from lmscale.generate.sample import make_generate
from lmscale.models import model, stack
from lmscale.parallel.layout import make_layout, map_layout
from lmscale.parallel.mesh import MANUAL, make_mesh
from lmscale.parallel.rules import make_rules
from lmscale.train.schedule import StepPlan
from lmscale.train.spikes import no_norms
from lmscale.train.state import BOOKKEEPING, TrainState
from lmscale.train.step import make_evaluate, make_step, make_step_plan


class Rows(Protocol):
  """What the program needs of a loader: samples first_sample + rows as int32 arrays [rows, seq_len]."""

  def batch(self, first_sample: int, rows: range) -> dict[str, np.ndarray]: ...


class Program:
  """A resolved config on its mesh. `devices` defaults to all."""

  def __init__(self, config: Config, devices: list[jax.Device] | None = None):
    self.config = config
    self.mesh = make_mesh(config.mesh, devices)
    self._emulated = self.mesh.size > 1 and self.mesh.devices.flat[0].platform == 'cpu'
    self._plan = make_step_plan(config, self.mesh)
    self._programs: dict[Any, Any] = {}
    self._whole = NamedSharding(self.mesh, PartitionSpec())
    self._rows = NamedSharding(self.mesh, PartitionSpec(None, 'data'))
    self._params = map_layout(lambda leaf: NamedSharding(self.mesh, leaf.stored), self._plan.layout)
    self._state = self._state_shardings()
    self._step = jax.jit(
      make_step(self._plan), donate_argnums=0, out_shardings=(self._state, self._whole)
    )
    self._evaluate = jax.jit(make_evaluate(self._plan), out_shardings=self._whole)

  @property
  def rows_per_microbatch(self) -> int:
    """Sequences of one microbatch over all data ranks."""
    return self.config.train.microbatch * self.config.mesh.data

  def init(self) -> TrainState:
    """The state before the first step, born on the mesh. Equal for every mesh."""
    return self._run(jax.jit(self._fresh, out_shardings=self._state))

  def step(self, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step; `state` is consumed. See `train.step.make_step` for the metrics."""
    return self._run(self._step, state, batch)

  def abstract_state(self) -> TrainState:
    """Shapes, dtypes and shardings of the state."""
    return self._abstract(jax.eval_shape(self._fresh), self._state)

  def lower_step(self, platform: str | None = None) -> Any:
    """The step lowered from shapes alone; `.compile()` it to read its text or its memory.

    platform: 'cuda' or 'tpu' instead of the devices at hand; its text can then be read, but not compiled here.
    """
    shape = (self.config.train.batch // self.rows_per_microbatch, self.rows_per_microbatch, self.config.train.seq_len)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._rows) for name in ROWS}
    batch['microbatches'] = jax.ShapeDtypeStruct((), jnp.int32, sharding=self._whole)
    batch['learning_rate'] = jax.ShapeDtypeStruct((), jnp.float32, sharding=self._whole)
    with jax.set_mesh(self.mesh), self._precision():
      traced = self._step.trace(self.abstract_state(), batch)
      return traced.lower(lowering_platforms=(platform,)) if platform else traced.lower()

  def batch(self, plan: StepPlan, loader: Rows) -> dict[str, jax.Array]:
    """The device batch of a step; a process reads only the rows that its devices hold."""
    arrays = self._put(loader, plan.first_sample, plan.batch, self.config.train.batch // self.rows_per_microbatch)
    arrays['learning_rate'] = self._scalar(np.float32(plan.learning_rate))
    return arrays

  def evaluate(self, state: TrainState, loader: Rows, samples: int) -> tuple[float, int]:
    """Mean loss in nats per counted token, and the count, over samples 0..samples-1 of `loader`."""
    loss, count = 0.0, 0
    for first in range(0, samples, self.rows_per_microbatch):
      rows = min(self.rows_per_microbatch, samples - first)
      part = self._run(self._evaluate, state.params, self._put(loader, first, rows, 1))
      loss, count = loss + float(part[0]), count + int(part[1])
    return loss / max(count, 1), count

  def generate(self, state: TrainState, prompt: list[int], steps: int, temperature: float, seed: int) -> list[int]:
    """`steps` tokens after `prompt`; temperature 0 is greedy."""
    generate = self._generate(len(prompt), steps, temperature)
    tokens = self._run(generate, state.params, jnp.asarray([prompt], jnp.int32), jax.random.key(seed))
    return np.asarray(tokens)[0].tolist()

  def canonical(self, state: TrainState) -> dict[str, Any]:
    """The state as it is stored: parameters and moments per layer, in canonical order."""
    return self._run(self._unstack, state)

  def abstract_canonical(self) -> dict[str, Any]:
    """Shapes, dtypes and this mesh's shardings of `canonical`, for a restore."""
    shapes = jax.eval_shape(lambda: self._to_canonical(self._fresh()))
    return self._abstract(shapes, self._canonical_shardings)

  def from_canonical(self, tree: dict[str, Any]) -> TrainState:
    """Inverse of `canonical`."""
    return self._run(self._restack, tree)

  def _run(self, function: Any, *args: Any) -> Any:
    with jax.set_mesh(self.mesh), self._precision():
      if distributed.count() > 1:
        function = self._compiled(function, *args)
      result = function(*args)
    # Emulated CPU devices share one thread pool, in which two programs in flight could each hold the threads that the
    # other's collectives wait for.
    return jax.block_until_ready(result) if self._emulated else result

  def _compiled(self, function: Any, *args: Any) -> Any:
    """`function` (jitted, always called with the same shapes) compiled, by every process.

    Gloo waits 30 seconds for the other processes to come to a collective: less than compiling may take one of them longer.
    """
    if function not in self._programs:
      self._programs[function] = function.lower(*args).compile()
      distributed.wait_for_all(f'compiled {len(self._programs)}')
    return self._programs[function]

  def _precision(self) -> contextlib.AbstractContextManager:
    """float32 means float32: accelerators would otherwise multiply it in TF32 or bfloat16."""
    return contextlib.nullcontext() if self._plan.dtype == jnp.bfloat16 else jax.default_matmul_precision('highest')

  def _fresh(self) -> TrainState:
    plan = self._plan
    params = model.init_runs(self.config.model, plan.runs, self.config.seed, plan.master_dtype)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
      params=params, opt_state=plan.tx.init(params), step=zero, skipped=zero, spikes=zero, norms=no_norms()
    )

  def _state_shardings(self) -> TrainState:
    abstract = jax.eval_shape(self._fresh)
    opt_state = optax.tree_utils.tree_map_params(
      self._plan.tx,
      lambda _, sharding: sharding,
      abstract.opt_state,
      self._params,
      transform_non_params=lambda _: self._whole,
    )
    return TrainState(params=self._params, opt_state=opt_state, **dict.fromkeys(BOOKKEEPING, self._whole))

  @functools.cached_property
  def _unstack(self) -> Any:
    return jax.jit(self._to_canonical, out_shardings=self._canonical_shardings)

  @functools.cached_property
  def _restack(self) -> Any:
    return jax.jit(self._from_canonical, out_shardings=self._state)

  @functools.cached_property
  def _canonical_shardings(self) -> dict[str, Any]:
    layout = make_layout(self.config, None, make_rules(self.config))
    params = map_layout(lambda leaf: NamedSharding(self.mesh, leaf.stored), layout)
    opt = {'mu': params, 'nu': params, 'count': self._whole}
    return {'params': params, 'opt': opt, **dict.fromkeys(BOOKKEEPING, self._whole)}

  def _to_canonical(self, state: TrainState) -> dict[str, Any]:
    def unstack(tree: Any) -> Any:
      layers = stack.to_layers(tree['layers'], self._plan.runs)
      return {**tree, 'layers': {str(i): layer for i, layer in enumerate(layers)}}

    opt = {name: unstack(optax.tree_utils.tree_get(state.opt_state, name)) for name in ('mu', 'nu')}
    opt['count'] = optax.tree_utils.tree_get(state.opt_state, 'count')
    tree = {'params': unstack(state.params), 'opt': opt, **{name: getattr(state, name) for name in BOOKKEEPING}}
    # Without the copy, jit hands leaves that it does not change through as the same buffers; the next step then waits,
    # holding them as donated, for a checkpoint that is still reading them.
    return jax.tree.map(jnp.copy, tree)

  def _from_canonical(self, tree: dict[str, Any]) -> TrainState:
    def restack(canonical: Any) -> Any:
      layers = [canonical['layers'][str(i)] for i in range(len(canonical['layers']))]
      return {**canonical, 'layers': stack.from_layers(layers, self._plan.runs)}

    params = restack(tree['params'])
    opt = {name: restack(tree['opt'][name]) for name in ('mu', 'nu')}
    opt_state = optax.tree_utils.tree_set(self._plan.tx.init(params), count=tree['opt']['count'], **opt)
    return TrainState(params=params, opt_state=opt_state, **{name: tree[name] for name in BOOKKEEPING})

  def _abstract(self, shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings)

  def _put(self, loader: Rows, first_sample: int, rows: int, microbatches: int) -> dict[str, jax.Array]:
    per = self.rows_per_microbatch
    shape = (microbatches, per, self.config.train.seq_len)
    host = {name: np.zeros((microbatches * per, shape[2]), np.int32) for name in ROWS}
    host['labels'][:] = -1
    for wanted in self._local_rows(per, rows):
      for name, values in loader.batch(first_sample, wanted).items():
        host[name][wanted.start : wanted.stop] = values
    arrays = {
      name: jax.make_array_from_callback(shape, self._rows, lambda index, name=name: host[name].reshape(shape)[index])
      for name in ROWS
    }
    used = -(-rows // per)
    arrays['microbatches'] = self._scalar(np.int32(used))
    return arrays

  def _scalar(self, value: np.generic) -> jax.Array:
    """On every device. `device_put` would compare the processes' values, in a collective."""
    return jax.make_array_from_callback((), self._whole, lambda _: np.asarray(value))

  def _local_rows(self, per: int, rows: int) -> list[range]:
    """The rows of a batch that this process's devices hold, as ranges."""
    slices = {index[1].indices(per)[:2] for index in self._rows.addressable_devices_indices_map((1, per, 1)).values()}
    start, stop = min(s for s, _ in slices), max(s for _, s in slices)
    if (start, stop) == (0, per):
      return [range(rows)]
    ranges = [range(i + s, min(i + e, rows)) for i in range(0, rows, per) for s, e in sorted(slices)]
    return [r for r in ranges if len(r)]

  @functools.cache  # noqa: B019 (a program lives as long as its run)
  def _generate(self, prompt: int, steps: int, temperature: float) -> Any:
    generate = make_generate(self.config, self._plan.runs, self._plan.dtype, prompt, steps, temperature)
    whole = PartitionSpec()
    return jax.jit(
      jax.shard_map(
        generate, mesh=self.mesh, in_specs=whole, out_specs=whole, axis_names=set(MANUAL), check_vma=False
      )
    )
