"""Runs a pipeline's table: one loop over its ticks inside the step's shard_map, the same program on every device.

A tick is a forward task, a backward task and a message to each neighbour in the ring; any may be missing. What a device does
it reads in its column of the table, an argument, so that a batch-size ramp needs one program. A task that is missing runs
layers of no kind; embedding, head and their gradients are loops of one turn or none.

Collectives over `tensor` stand inside of branches, which is sound: the devices of a `tensor` group take the same branch. But
emulated CPU devices run what does not depend on each other in any order, and deadlock when two devices choose differently
(jax 0.10). So each tick has one order, made of true dependencies: forward, backward, message up, message down (`_after`).

With mesh.vocab_on_pipe embedding and head are cut over the stages, and all work on what the first stage takes in and the last
one has put out in this tick: the table tells each device what the others do.

A stage's input waits until its backward pass. What its layers save waits, too, under train.remat `selective` and `none`;
under `full` only for train.stored_microbatches of those in flight. The others' forward pass is done again, into one more slot.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmscale.batch import ROWS
from lmscale.models import model
from lmscale.models.layers import RESIDUAL
from lmscale.parallel.layout import map_layout
from lmscale.parallel.pipeline.layout import forward_table, kept_slots, step_table
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

  params: the compute copy. batch: as in `parallel.gradients`, with the table's cells, int32 [ticks, pipe, COLUMNS], and how
  many `ticks` of them to run.
  """
  device = _Device(setup, head_loss, params, batch, trains)
  carry = jax.lax.fori_loop(0, batch['ticks'], device.tick, device.start())
  if not trains:
    return None, carry.sums
  return {**carry.outer, 'layers': tuple((stack,) for stack in carry.layers)}, carry.sums


class _Task(NamedTuple):
  """One phase of a tick. row: what each device does, [pipe] per column. cell: what this one does."""

  phase: str
  row: Batch
  cell: Batch

  def of(self, column: str, device: int | None = None) -> jax.Array:
    """A column of this phase for this device, or another."""
    values = self.cell if device is None else self.row
    return values[f'{self.phase}_{column}'] if device is None else values[f'{self.phase}_{column}'][device]


class _Device:
  """What a device does in a tick."""

  def __init__(self, setup: Setup, head_loss: model.HeadLoss, params: Any, batch: Batch, trains: bool):
    self.setup, self.head_loss, self.batch, self.trains = setup, head_loss, batch, trains
    self.config, mesh = setup.config.model, setup.config.mesh
    self.outer = {part: leaves for part, leaves in params.items() if part != 'layers'}
    self.context = make_context(setup)
    self.pipe, self.virtual, self.vocab_on_pipe = mesh.pipe, mesh.virtual, mesh.vocab_on_pipe
    self.device = jax.lax.axis_index('pipe')
    table = (step_table if trains else forward_table)(setup.config)
    self.slots, (self.stored, self.recomputes) = table.slots, kept_slots(setup.config, table)
    self.zero = jnp.minimum(batch['microbatches'], 0)  # which the compiler cannot know
    self.x = jnp.zeros((*batch['tokens'].shape[1:], self.config.d_model), setup.dtype)
    stacks = [run[0] for run in params['layers']]
    self.layers = StageLayers(setup, stacks, self.x, self.context(self.microbatch(0)))

  def start(self) -> _Carry:
    """Empty buffers and sums."""
    acc = jnp.promote_types(jnp.float32, self.setup.dtype)
    sums = Sums(jnp.zeros((), acc), jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.int32))
    activation, cotangent = (self.buffer(self.slots[name]) for name in ('activation', 'cotangent'))
    if not self.trains:
      return _Carry(activation, cotangent, self.buffer(0), [], [], None, sums)
    grads = self.no_gradients()
    layers, slots = [run[0] for run in grads.pop('layers')], self.stored + self.recomputes
    return _Carry(activation, cotangent, self.buffer(slots), self.layers.ring(slots), layers, grads, sums)

  def tick(self, t: jax.Array, carry: _Carry) -> _Carry:
    """Forward, backward, messages."""
    table = take(self.batch['table'], t)
    y, carry = self.forward(self.task('forward', table), carry)
    if not self.trains:
      dx = y
    else:
      dx, carry = self.backward(self.task('backward', table + (_bits(y) & self.zero)), carry)
      y = _after(_after(y, dx, self.zero), carry.outer['embed']['tokens'], self.zero)
    up = self.send(y, 1)
    cell = self.task('receive', table).cell
    carry = carry._replace(activation=put(carry.activation, up, cell['receive_activation']))
    if not self.trains:
      return carry
    down = self.send(_after(dx, up, self.zero), -1)
    return carry._replace(cotangent=put(carry.cotangent, down, cell['receive_cotangent']))

  def forward(self, task: _Task, carry: _Carry) -> tuple[jax.Array, _Carry]:
    """A forward task: (output of its stage, carry)."""
    chunk, slot = task.of('chunk'), task.of('residual')
    ctx = self.context(self.microbatch(task.of('microbatch')))
    x = self.input(task, chunk, carry)
    waits = (slot != NOTHING) & (slot < self.stored)
    slot = jnp.where(waits, slot, NOTHING)
    # The last stage's forward pass that is done again in the backward task need not be done before.
    run = jnp.where(self.is_last(chunk) & ~waits, NOTHING, chunk) if self.recomputes else chunk
    y, ring = self.layers.forward(x, run, ctx, carry.ring if self.stored else None, slot)
    carry = carry._replace(sums=carry.sums._replace(ran=carry.sums.ran.at[0].add(chunk != NOTHING)))
    if not self.trains:
      return y, carry._replace(sums=self.at_last(task, y, self.add_loss, carry.sums))
    return y, carry._replace(ring=ring, output=put(carry.output, y, slot)) if self.stored else carry

  def backward(self, task: _Task, carry: _Carry) -> tuple[jax.Array, _Carry]:
    """A backward task: (gradient of its stage's input, carry)."""
    chunk, slot = task.of('chunk'), task.of('residual')
    ctx = self.context(self.microbatch(task.of('microbatch')))
    if self.recomputes:
      again = slot >= self.stored
      slot = jnp.where(again, self.stored, slot)
      into, run = jnp.where(again, slot, NOTHING), jnp.where(again, chunk, NOTHING)
      y, ring = self.layers.forward(self.input(task, run, carry), run, ctx, carry.ring, into)
      carry = carry._replace(ring=ring, output=put(carry.output, y, into))
    y, ct = take(carry.output, slot), take(carry.cotangent, task.of('cotangent'))
    outer, sums, ct = self.at_last(task, y, self.add_head, (carry.outer, carry.sums, ct))
    dx, layers = self.layers.backward(ct, chunk, ctx, carry.ring, slot, carry.layers)
    outer = self.at_first(task, dx, self.add_embedding, outer)
    sums = sums._replace(ran=sums.ran.at[1].add(chunk != NOTHING))
    return dx, carry._replace(layers=layers, outer=outer, sums=sums)

  def input(self, task: _Task, chunk: jax.Array, carry: _Carry) -> jax.Array:
    """What the stage `chunk` begins with: the embedding in the first, else what was received."""
    received = take(carry.activation, task.of('activation'))
    microbatch = self.microbatch(task.of('microbatch', 0))

    def embed(_: jax.Array, tokens: jax.Array) -> jax.Array:
      ctx = self.context(microbatch)
      return ctx.constrain(model.embed(self.config, self.outer['embed'], tokens, ctx), RESIDUAL)

    first = (self.device == 0) & (chunk == 0)
    active = task.of('chunk', 0) == 0 if self.vocab_on_pipe else first
    x = self.when(active, embed, received, microbatch['tokens'])
    return jnp.where(first, x, received) if self.vocab_on_pipe else x

  def at_last(self, task: _Task, y: jax.Array, function: Callable, value: Any) -> Any:
    """function(value, output of the last stage, its microbatch, whether it is here) where the last stage has a task, else value."""
    return self.at(task, self.pipe - 1, self.virtual - 1, y, function, value)

  def at_first(self, task: _Task, dx: jax.Array, function: Callable, value: Any) -> Any:
    """The same for the first stage and the gradient of its input."""
    return self.at(task, 0, 0, dx, function, value)

  def at(self, task: _Task, device: int, chunk: int, x: jax.Array, function: Callable, value: Any) -> Any:
    """On that device alone; with the vocabulary on `pipe` on all, which are sent its x."""
    here = self.device == device
    active = task.of('chunk', device) == chunk

    def run(value: Any, x: jax.Array) -> Any:
      sent = jax.lax.psum(jnp.where(here, x, 0), 'pipe') if self.vocab_on_pipe else x
      return function(value, sent, self.microbatch(task.of('microbatch', device)), here)

    return self.when(active if self.vocab_on_pipe else active & here, run, value, x)

  def when(self, condition: jax.Array, function: Callable[[Any, jax.Array], Any], value: Any, x: jax.Array) -> Any:
    """function(value, x) where the condition holds, else the value itself, which is handed on without a copy.

    x depends on the turn of the loop, or the compiler would do before the loop what follows from x alone: on every device.
    """

    def turn(i: jax.Array, value: Any) -> Any:
      return function(value, jnp.where((i & self.zero) == 0, x, jnp.zeros_like(x)))

    return jax.lax.fori_loop(0, condition.astype(jnp.int32), turn, value)

  def add_loss(self, sums: Sums, y: jax.Array, microbatch: Batch, here: jax.Array) -> Sums:
    """The sums with the loss of the last stage's output y."""
    loss, count = self.loss(self.outer, y, microbatch)
    return sums._replace(loss=sums.loss + jnp.where(here, loss, 0), count=sums.count + jnp.where(here, count, 0))

  def add_head(self, value: tuple, y: jax.Array, microbatch: Batch, here: jax.Array) -> tuple:
    """(outer gradients, sums, ct) with those of the loss of the last stage's output y; there, ct is the gradient of y."""
    outer, sums, ct = value
    (loss, count), (grads, dy) = jax.value_and_grad(self.loss, argnums=(0, 1), has_aux=True)(self.outer, y, microbatch)
    sums = sums._replace(loss=sums.loss + jnp.where(here, loss, 0), count=sums.count + jnp.where(here, count, 0))
    return self.add(outer, grads, here), sums, jnp.where(here, dy, ct)

  def loss(self, params: Any, y: jax.Array, microbatch: Batch) -> tuple[jax.Array, jax.Array]:
    """(summed loss, how many were counted) of the last stage's output."""
    hidden = model.final_norm(self.config, params['final_norm'], y)
    return self.head_loss(params, hidden, microbatch, self.context(microbatch))

  def add_embedding(self, outer: Any, dx: jax.Array, microbatch: Batch, here: jax.Array) -> Any:
    """The outer gradients with those of the embedding, whose output has the gradient dx."""
    ctx = self.context(microbatch)
    _, vjp = jax.vjp(lambda params: model.embed(self.config, params, microbatch['tokens'], ctx), self.outer['embed'])
    return self.add(outer, {'embed': vjp(dx)[0]}, here)

  def add(self, outer: Any, grads: Any, here: jax.Array) -> Any:
    """Adds gradients of some parts; those that all devices know alike on one of them only."""

    def add(leaf: Any, total: jax.Array, g: jax.Array) -> jax.Array:
      return total + (g if leaf.on_pipe or not self.vocab_on_pipe else jnp.where(here, g, 0)).astype(total.dtype)

    return {**outer, **{part: map_layout(add, self.setup.layout[part], outer[part], g) for part, g in grads.items()}}

  def task(self, phase: str, table: jax.Array) -> _Task:
    row = dict(zip(COLUMNS, table.T, strict=True))
    return _Task(phase, row, {name: take(column, self.device) for name, column in row.items()})

  def send(self, x: jax.Array, step: int) -> jax.Array:
    """To the device `step` behind this one in the ring."""
    return jax.lax.ppermute(x, 'pipe', [(i, (i + step) % self.pipe) for i in range(self.pipe)])

  def microbatch(self, j: jax.Array | int) -> Batch:
    return {name: take(self.batch[name], jnp.int32(j)) for name in ROWS}

  def is_last(self, chunk: jax.Array) -> jax.Array:
    return (self.device == self.pipe - 1) & (chunk == self.virtual - 1)

  def buffer(self, slots: int) -> jax.Array:
    return jnp.zeros((slots + 1, *self.x.shape), self.x.dtype)

  def no_gradients(self) -> Any:
    """Zeros like the parameters on this device, in train.grad_dtype."""
    params = {**self.outer, 'layers': tuple((stack,) for stack in self.layers.stacks)}

    def zeros(leaf: Any, param: jax.Array) -> jax.Array:
      g = jnp.zeros(param.shape, self.setup.grad_dtype)
      return g if self.setup.config.mesh.tensor == 1 else jax.lax.with_sharding_constraint(g, leaf.kept)

    return map_layout(zeros, self.setup.layout, params)


def _bits(x: jax.Array) -> jax.Array:
  """int32 of one of its elements, whatever it is."""
  integer = {2: jnp.int16, 4: jnp.int32, 8: jnp.int32}[x.dtype.itemsize]
  return jax.lax.bitcast_convert_type(x[(0,) * x.ndim], integer).ravel()[0].astype(jnp.int32)


def _after(x: jax.Array, dependency: jax.Array, zero: jax.Array) -> jax.Array:
  """x, which does not exist before `dependency` does; whatever that is, NaN included. zero: 0, unknown to the compiler."""
  return jnp.where((_bits(dependency) & zero) == 0, x, jnp.zeros_like(x))
