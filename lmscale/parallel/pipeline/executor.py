"""Runs a pipeline's table: one loop over its ticks inside the step's shard_map, the same program on every device.

A tick is a forward task, a backward task and a message to each neighbour in the ring; any may be missing. What a device does
it reads in its column of the table, an argument, so that a batch-size ramp needs one program. A task that is missing runs
layers of no kind; embedding, head and their gradients are loops of one turn or none.

Collectives over `tensor` stand inside of branches, which is sound: the devices of a `tensor` group take the same branch. But
emulated CPU devices run what does not depend on each other in any order, and deadlock when two devices choose differently
(jax 0.10). So each tick has one order, made of true dependencies: forward, backward, message up, message down (`_after`).

A stage's input waits until its backward pass. What its layers save waits, too, under train.remat `selective` and `none`;
under `full` only for train.stored_microbatches of those in flight. The others' forward pass is done again, into one more slot.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmscale.batch import ROWS
from lmscale.models import model
from lmscale.models.context import Context
from lmscale.models.layers import RESIDUAL
from lmscale.parallel.layout import map_layout
from lmscale.parallel.pipeline.layout import forward_table, step_table
from lmscale.parallel.pipeline.stage import Ring, StageLayers, put, take
from lmscale.parallel.pipeline.table import COLUMNS, NOTHING
from lmscale.parallel.setup import Setup, make_context

Batch = dict[str, jax.Array]


class Sums(NamedTuple):
  """Of a device, over its microbatches. loss, count: of the labels, in the last stage. ran: int32, forward and backward tasks."""

  loss: jax.Array
  count: jax.Array
  ran: jax.Array


class _Carry(NamedTuple):
  activation: jax.Array  # [slots + 1, b, t, d_model] each: inputs of stages; gradients of their outputs; outputs of the last
  cotangent: jax.Array
  output: jax.Array
  ring: Ring
  layers: list[Any]  # gradients
  outer: Any
  sums: Sums


def run_pipeline(setup: Setup, head_loss: model.HeadLoss, params: Any, batch: Batch, trains: bool) -> tuple[Any, Sums]:
  """(gradients of this device's layers and of embedding, final norm and head, None where it does not train; sums).

  params: the compute copy. batch: as in `parallel.gradients`, with the table's cells of this device, int32 [ticks, 1,
  COLUMNS], and how many `ticks` of them to run.
  """
  device = _Device(setup, head_loss, params, batch, trains)
  carry = jax.lax.fori_loop(0, batch['ticks'], device.tick, device.start())
  if not trains:
    return None, carry.sums
  return {**carry.outer, 'layers': tuple((stack,) for stack in carry.layers)}, carry.sums


class _Device:
  """What a device does in a tick."""

  def __init__(self, setup: Setup, head_loss: model.HeadLoss, params: Any, batch: Batch, trains: bool):
    config = setup.config
    self.setup, self.head_loss, self.batch, self.trains = setup, head_loss, batch, trains
    self.outer = {part: leaves for part, leaves in params.items() if part != 'layers'}
    self.context = make_context(setup)
    self.first, self.last = (jax.lax.axis_index('pipe') == at for at in (0, config.mesh.pipe - 1))
    table = step_table(config) if trains else forward_table(config)
    self.slots = table.slots
    self.stored = table.slots['residual'] if config.train.remat != 'full' else min(config.train.stored_microbatches, table.slots['residual'])
    self.recomputes = trains and self.stored < table.slots['residual']
    self.zero = jnp.minimum(batch['microbatches'], 0)  # which the compiler cannot know
    self.x = jnp.zeros((*batch['tokens'].shape[1:], config.model.d_model), setup.dtype)
    stacks = [run[0] for run in params['layers']]
    self.layers = StageLayers(setup, stacks, self.x, self.context(self.microbatch(0)))

  def start(self) -> _Carry:
    """Empty buffers and sums."""
    acc = jnp.promote_types(jnp.float32, self.setup.dtype)
    sums = Sums(jnp.zeros((), acc), jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.int32))
    if not self.trains:
      return _Carry(self.waiting('activation'), self.x[None], self.x[None], [], [], None, sums)
    grads = self.no_gradients()
    layers = [run[0] for run in grads.pop('layers')]
    ring = self.layers.ring(self.stored + self.recomputes)
    output = jnp.zeros((self.stored + self.recomputes + 1, *self.x.shape), self.x.dtype)
    return _Carry(self.waiting('activation'), self.waiting('cotangent'), output, ring, layers, grads, sums)

  def tick(self, t: jax.Array, carry: _Carry) -> _Carry:
    """Forward, backward, messages."""
    cell = dict(zip(COLUMNS, take(self.batch['table'], t)[0], strict=True))
    y, carry = self.forward(cell, carry)
    dx = carry.cotangent[0]
    if self.trains:
      dx, carry = self.backward(cell, y, carry)
      y = _after(_after(y, dx, self.zero), carry.outer['embed']['tokens'], self.zero)
    up = self.send(y, 1)
    activation = put(carry.activation, up, cell['receive_activation'])
    if not self.trains:
      return carry._replace(activation=activation)
    down = self.send(_after(dx, up, self.zero), -1)
    return carry._replace(activation=activation, cotangent=put(carry.cotangent, down, cell['receive_cotangent']))

  def forward(self, cell: Batch, carry: _Carry) -> tuple[jax.Array, _Carry]:
    """The forward task: (output of its stage, carry)."""
    chunk, slot = cell['forward_chunk'], cell['forward_residual']
    microbatch = self.microbatch(cell['forward_microbatch'])
    ctx, last = self.context(microbatch), self.is_last(chunk)
    x = self.input(carry, chunk, cell['forward_activation'], microbatch, ctx)
    waits = (slot != NOTHING) & (slot < self.stored)
    # The last stage's forward pass that is done again in the backward task need not be done before.
    run = jnp.where(last & ~waits, NOTHING, chunk) if self.recomputes else chunk
    slot = jnp.where(waits, slot, NOTHING)
    y, ring = self.layers.forward(x, run, ctx, carry.ring if self.trains and self.stored else None, slot)
    sums = carry.sums._replace(ran=carry.sums.ran.at[0].add(chunk != NOTHING))
    if not self.trains:
      return y, carry._replace(sums=_when(last, lambda sums: self.loss(self.outer, y, microbatch, ctx, sums), sums))
    output = put(carry.output, y, slot) if self.stored else carry.output
    return y, carry._replace(ring=ring if self.stored else carry.ring, output=output, sums=sums)

  def backward(self, cell: Batch, y: jax.Array, carry: _Carry) -> tuple[jax.Array, _Carry]:
    """The backward task: (gradient of its stage's input, carry)."""
    chunk, slot = cell['backward_chunk'] + (_bits(y) & self.zero), cell['backward_residual']
    microbatch = self.microbatch(cell['backward_microbatch'])
    ctx, first, last = self.context(microbatch), self.is_first(chunk), self.is_last(chunk)
    if self.recomputes:
      again = jnp.where(slot >= self.stored, chunk, NOTHING)
      slot = jnp.where(slot >= self.stored, self.stored, slot)
      x = self.input(carry, again, cell['backward_activation'], microbatch, ctx)
      y, ring = self.layers.forward(x, again, ctx, carry.ring, jnp.where(again != NOTHING, slot, NOTHING))
      carry = carry._replace(ring=ring, output=put(carry.output, y, jnp.where(again != NOTHING, slot, NOTHING)))
    y, ct = take(carry.output, slot), take(carry.cotangent, cell['backward_cotangent'])
    outer, sums, ct = _when(last, lambda state: self.head(y, microbatch, ctx, *state), (carry.outer, carry.sums, ct))
    dx, layers = self.layers.backward(ct, chunk, ctx, carry.ring, slot, carry.layers)
    outer = _when(first, lambda outer: self.embed_backward(dx, microbatch, ctx, outer), outer)
    sums = sums._replace(ran=sums.ran.at[1].add(chunk != NOTHING))
    return dx, carry._replace(layers=layers, outer=outer, sums=sums)

  def input(self, carry: _Carry, chunk: jax.Array, slot: jax.Array, microbatch: Batch, ctx: Context) -> jax.Array:
    """What a stage begins with: the embedding in the first, else what was received."""

    def embed() -> jax.Array:
      return ctx.constrain(model.embed(self.setup.config.model, self.outer['embed'], microbatch['tokens'], ctx), RESIDUAL)

    return jax.lax.cond(self.is_first(chunk), embed, lambda: ctx.constrain(take(carry.activation, slot), RESIDUAL))

  def head(self, y: jax.Array, microbatch: Batch, ctx: Context, outer: Any, sums: Sums, ct: jax.Array) -> tuple[Any, Sums, jax.Array]:
    """The loss of the last stage's output y: (outer gradients with its own added, sums with the loss, gradient of y)."""

    def loss(params: Any, y: jax.Array) -> tuple[jax.Array, Sums]:
      new = self.loss(params, y, microbatch, ctx, sums)
      return new.loss, new

    (_, sums), (grads, dy) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(self.outer, y)
    return self.add(outer, grads), sums, ctx.constrain(dy, RESIDUAL)

  def loss(self, params: Any, y: jax.Array, microbatch: Batch, ctx: Context, sums: Sums) -> Sums:
    """The sums with the loss of a microbatch added."""
    hidden = model.final_norm(self.setup.config.model, params['final_norm'], y)
    loss, count = self.head_loss(params, hidden, microbatch, ctx)
    return sums._replace(loss=sums.loss + loss, count=sums.count + count)

  def embed_backward(self, dx: jax.Array, microbatch: Batch, ctx: Context, outer: Any) -> Any:
    """The outer gradients with those of the embedding added. dx: gradient of its output."""
    config, tokens = self.setup.config.model, microbatch['tokens']
    _, vjp = jax.vjp(lambda params: model.embed(config, params, tokens, ctx), self.outer['embed'])
    return {**outer, 'embed': self.add(outer['embed'], vjp(dx)[0])}

  def add(self, total: Any, grads: Any) -> Any:
    return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads)

  def send(self, x: jax.Array, step: int) -> jax.Array:
    """x of the device `step` before this one in the ring."""
    pipe = self.setup.config.mesh.pipe
    return jax.lax.ppermute(x, 'pipe', [(i, (i + step) % pipe) for i in range(pipe)])

  def microbatch(self, j: jax.Array | int) -> Batch:
    return {name: take(self.batch[name], jnp.int32(j)) for name in ROWS}

  def is_first(self, chunk: jax.Array) -> jax.Array:
    return self.first & (chunk == 0)

  def is_last(self, chunk: jax.Array) -> jax.Array:
    return self.last & (chunk == self.setup.config.mesh.virtual - 1)

  def waiting(self, buffer: str) -> jax.Array:
    return jnp.zeros((self.slots[buffer] + 1, *self.x.shape), self.x.dtype)

  def no_gradients(self) -> Any:
    """Zeros like the parameters on this device, in train.grad_dtype."""
    params = {**self.outer, 'layers': tuple((stack,) for stack in self.layers.stacks)}

    def zeros(leaf: Any, param: jax.Array) -> jax.Array:
      g = jnp.zeros(param.shape, self.setup.grad_dtype)
      return g if self.setup.config.mesh.tensor == 1 else jax.lax.with_sharding_constraint(g, leaf.kept)

    return map_layout(zeros, self.setup.layout, params)


def _when(condition: jax.Array, function: Callable[[Any], Any], value: Any) -> Any:
  """function(value) where the condition holds, else the value itself, which is handed on without a copy."""
  return jax.lax.fori_loop(0, condition.astype(jnp.int32), lambda _, value: function(value), value)


def _bits(x: jax.Array) -> jax.Array:
  """int32 of one of its elements, whatever it is."""
  integer = {2: jnp.int16, 4: jnp.int32, 8: jnp.int32}[x.dtype.itemsize]
  return jax.lax.bitcast_convert_type(x[(0,) * x.ndim], integer).ravel()[0].astype(jnp.int32)


def _after(x: jax.Array, dependency: jax.Array, zero: jax.Array) -> jax.Array:
  """x, which does not exist before `dependency` does; whatever that is, NaN included. zero: 0, unknown to the compiler."""
  return jnp.where((_bits(dependency) & zero) == 0, x, jnp.zeros_like(x))
