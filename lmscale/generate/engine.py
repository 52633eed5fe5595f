"""The compiled programs of generation, over a pytree of caches that they update in place.

A cache has `rows`, each with room for `length` tokens of attention, while Mamba layers keep a window and a state whatever
the length. A row holds one prompt and what follows it; rows are cut over `pipe` and `data`, each device having whole layers but
for its `tensor` share.

  caches = engine.empty(rows, length)
  hidden, caches = engine.prefill(caches, tokens, positions, segments, slots)     # a chunk of each row's tokens, ragged
  chosen, state, caches = engine.step(caches, state, live, seed, sampling, ids)   # the next token of every row
  many = engine.repeat(caches, sources)                                           # a prefix for many rows
  logps, greedy = engine.likelihoods(hidden, labels, ids)                         # of given tokens, from a chunk's hidden states

`prefill` and `step` take the caches away from their caller (they are donated) and hand back the new ones. What is in a row
depends on that row's tokens alone.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lmscale.generate.choose import Choose, Sampling, make_choose, row_keys
from lmscale.generate.likelihoods import make_likelihoods
from lmscale.models import model
from lmscale.models.context import Context
from lmscale.models.layers import LAYERS
from lmscale.models.stacking import Stack, make_stacking, map_stacks
from lmscale.parallel.calling import Caller
from lmscale.parallel.mesh import MANUAL
from lmscale.parallel.rules import make_constrain, make_local, make_rules, partition
from lmscale.parallel.setup import Setup

ROWS = PartitionSpec(MANUAL)
IDLE = -1  # the slot of a row in which nothing is generated
# Of each row, int32 [rows]: the token to read next, its position in its document, how many tokens the cache holds before it, the
# index of the row's prompt, and the number of the token that is drawn next.
STATE = ('tokens', 'positions', 'slots', 'prompts', 'numbers')


class Engine:
  """Runs one model. params: its parameters in the compute dtype, unrolled, see `weights`."""

  def __init__(self, setup: Setup, params: Any, call: Caller | None = None):
    self.setup, self.params = setup, params
    self.call = call or Caller(setup)
    config, mesh = setup.config, setup.mesh
    self._stacking = make_stacking(config.model.layers, 'unrolled')
    # A chunk need not divide by `tensor`, and one token cannot be cut.
    self._rules = make_rules(dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, sequence_parallel=False)))
    self._hooks = {'constrain': make_constrain(config, self._rules), 'local': make_local(config, self._rules),
                   'tensor': config.mesh.tensor}  # fmt: skip
    self._by_row, self._whole = NamedSharding(mesh, ROWS), NamedSharding(mesh, PartitionSpec())
    self.ranks = mesh.shape['pipe'] * mesh.shape['data']
    self._prefill = jax.jit(
      self._over_mesh(self._prefill_rows, (PartitionSpec(), ROWS, *[ROWS] * 4), (ROWS, ROWS)),
      donate_argnums=1, out_shardings=(self._by_row, self._placed()),
    )  # fmt: skip
    self._repeat = jax.jit(
      lambda caches, sources: jax.tree.map(lambda leaf: jnp.take(leaf, sources, axis=0), caches), out_shardings=self._placed()
    )

  def empty(self, rows: int, length: int) -> Any:
    """Caches without a token. rows: a multiple of `ranks`."""
    return self.call(self._empty(rows, length))

  def prefill(
    self, caches: Any, tokens: np.ndarray, positions: np.ndarray, segments: np.ndarray, slots: np.ndarray
  ) -> tuple[jax.Array, Any]:
    """Reads a chunk of tokens into each row's cache, behind the slots[i] tokens that the cache of row i holds.

    tokens, positions, segments: int32 [rows, t], t at most the caches' length. positions restart at 0 where a document begins,
    segments number the documents of a row from 1; 0 is padding, anywhere, as much of it as there is. slots: int32 [rows].
    Returns the hidden states [rows, t, d_model] that the head reads (`models.model.logits`), for scores of given tokens, and
    the new caches.
    """
    return self.call(self._prefill, self.params, caches, *map(self.put, (tokens, positions, segments, slots)))

  def repeat(self, caches: Any, sources: np.ndarray) -> Any:
    """Caches whose row i is row sources[i] (int32 [rows]) of `caches`, which stay: one prefix, read once, for many rows."""
    return self.call(self._repeat, caches, self.put(sources, whole=True))

  def likelihoods(self, hidden: jax.Array, labels: np.ndarray, ids: int) -> tuple[jax.Array, jax.Array]:
    """Of the tokens `labels` (int32 [rows, t]) that follow those whose hidden states `prefill` gave: (log-probability float32, whether
    none of the tokenizer's `ids` is likelier), [rows, t], whole on every device."""
    return self.call(self._likelihoods(ids), self.params, hidden, self.put(labels))

  def step(
    self, caches: Any, state: dict[str, jax.Array], live: jax.Array, seed: jax.Array, sampling: Sampling, ids: int
  ) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """Reads every row's next token and picks the one after it.

    state: see `STATE`, by `put`. live: bool [rows], by `put`; the other rows are idle from now on: nothing is written for them
    and what is picked for them means nothing. seed: uint32, by `put`. ids: the tokenizer's size.
    Returns (the picked tokens, int32 [rows], whole on every device; the state for the next step; the caches).
    """
    return self.call(self.step_program(sampling, ids), self.params, caches, state, live, seed)

  @functools.cache  # noqa: B019 (an engine lives as long as its model)
  def step_program(self, sampling: Sampling, ids: int) -> Any:
    """The jitted step: of (params, caches, state, live, seed)."""
    step = functools.partial(self._step_rows, make_choose(sampling, ids))
    specs = PartitionSpec(), ROWS, ROWS, ROWS, PartitionSpec()
    return jax.jit(
      self._over_mesh(step, specs, (ROWS, ROWS, ROWS)),
      donate_argnums=(1, 2), out_shardings=(self._whole, self._by_row, self._placed()),
    )  # fmt: skip

  @functools.cache  # noqa: B019
  def _likelihoods(self, ids: int) -> Any:
    likelihoods = make_likelihoods(self.setup.config, ids, self._hooks['constrain'])
    return jax.jit(self._over_mesh(likelihoods, (PartitionSpec(), ROWS, ROWS), (ROWS, ROWS)), out_shardings=self._whole)

  def put(self, values: np.ndarray, whole: bool = False) -> jax.Array:
    """On the mesh, cut by rows or (`whole`) not at all. A copy: a CPU's array would share the memory of `values`."""
    at, own = self._whole if whole else self._by_row, np.array(values)
    return jax.make_array_from_callback(own.shape, at, lambda index: own[index])

  def cache_bytes(self, rows: int, length: int) -> int:
    """Of the caches, over all devices that hold different parts."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.abstract(rows, length)))

  def abstract(self, rows: int, length: int) -> Any:
    """Shapes, dtypes and shardings of the caches."""
    shapes = jax.eval_shape(self._empty(rows, length))
    return jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, self._placed())

  @functools.cache  # noqa: B019
  def _empty(self, rows: int, length: int) -> Any:
    config, dtype = self.setup.config.model, self.setup.dtype
    return jax.jit(lambda: _alone(model.empty_caches(config, self._stacking, rows, length, dtype)), out_shardings=self._placed())

  def _placed(self) -> tuple:
    """How each leaf of the caches is cut."""
    config, rules = self.setup.config.model, {**self._rules, 'batch': MANUAL}

    def stack(stack: Stack) -> dict[str, NamedSharding]:
      specs = LAYERS[stack.kind].cache_specs(config, 1, 1, self.setup.dtype)
      return {name: NamedSharding(self.setup.mesh, partition(spec.axes, rules)) for name, spec in specs.items()}

    return map_stacks(stack, self._stacking)

  def _prefill_rows(
    self, params: Any, caches: Any, tokens: jax.Array, positions: jax.Array, segments: jax.Array, slots: jax.Array
  ) -> tuple[jax.Array, Any]:
    ctx = Context(positions, segments, slots, **self._hooks)
    return self._forward(params, tokens, ctx, caches)

  def _step_rows(
    self, choose: Choose, params: Any, caches: Any, state: dict[str, jax.Array], live: jax.Array, seed: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    slots = jnp.where(live, state['slots'], IDLE)
    ctx = Context(state['positions'][:, None], slots=slots, **self._hooks)
    config = self.setup.config.model
    hidden, caches = self._forward(params, state['tokens'][:, None], ctx, caches)
    logits = self._hooks['constrain'](model.logits(config, params, hidden[:, 0]), ('batch', None))
    chosen = choose(logits, row_keys(seed, state['prompts'], state['numbers']))
    further = {name: state[name] + 1 for name in ('positions', 'numbers')}
    return chosen, {**state, **further, 'tokens': chosen, 'slots': jnp.where(live, slots + 1, IDLE)}, caches

  def _forward(self, params: Any, tokens: jax.Array, ctx: Context, caches: Any) -> tuple[jax.Array, Any]:
    stacked = jax.tree.map(lambda leaf: leaf[None], caches)
    hidden, stacked = model.forward(self.setup.config.model, params, tokens, ctx, stacked, self._stacking)
    return hidden, _alone(stacked)

  def _over_mesh(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
    return jax.shard_map(
      function, mesh=self.setup.mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(MANUAL), check_vma=False
    )


def _alone(stacked: Any) -> Any:
  """Caches of stacks of one layer without the leading dim: of another shape than the layer's they would not be updated in place."""
  return jax.tree.map(lambda leaf: leaf[0], stacked)
