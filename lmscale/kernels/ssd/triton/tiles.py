"""What the Triton SSD kernels share: the static plan of a call, the blocks a program sees, tiles, decays and dots.

A program sees the arrays of its batch row and head (or group) as blocks, and moves along the tokens by offsets. Pallas
computes offsets in 64 bits where an array has more than 2^32 bytes, and in 32 bits, signed, where it has not: at two
bytes per element or more neither overflows. Triton's tiles have power-of-two sides of at least 16, so blocks are
rounded up and loads and stores masked where a head, a state or the length does not fill them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton


@dataclasses.dataclass(frozen=True)
class Plan:
  """The static numbers of one call."""

  length: int  # tokens
  q: int  # tokens per chunk
  segments: int  # parts of the sequence that are walked in parallel
  per_segment: int  # chunks in each
  save_every: int  # chunks between the states that the forward pass keeps for the backward pass
  deterministic: bool
  interpret: bool

  @property
  def chunks(self) -> int:
    return self.segments * self.per_segment

  @property
  def padded(self) -> int:
    """Tokens of dt, the decays and document, which are padded; x, B, C and their gradients are masked instead."""
    return self.chunks * self.q


def block(size: int) -> int:
  """The side of the tile that holds `size` elements: a power of two, and at least the 16 that a dot needs."""
  return max(16, pl.next_power_of_2(size))


def call(kernel, plan: Plan, grid, inputs, outputs, specs, *, warps: int, stages: int, added=()):
  """`pl.pallas_call` of kernel(inputs, outputs), both dicts, lowered through Triton; specs has all their names.

  The outputs named in `added` start at zero, for programs to add to.
  """
  inputs = {name: value for name, value in inputs.items() if value is not None}
  zeros = {f'{name} at first': jnp.zeros(outputs[name].shape, outputs[name].dtype) for name in added}
  names = sorted(inputs | zeros), sorted(outputs)  # as JAX flattens dicts
  aliases = {names[0].index(f'{name} at first'): names[1].index(name) for name in added}
  return pl.pallas_call(
    kernel, grid=grid, in_specs=[{name: specs[name.removesuffix(' at first')] for name in inputs | zeros}],
    out_specs={name: specs[name] for name in outputs}, out_shape=outputs, interpret=plan.interpret,
    input_output_aliases=aliases, compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=stages),
  )(inputs | zeros)  # fmt: skip


def program(axis: int) -> jax.Array:
  """Where the program is on an axis of the grid: int64 where the caller enabled it, as Pallas' own indices are then."""
  return pl.program_id(axis).astype(int)


def head_specs(plan: Plan, repeat: int, n: int, p: int) -> dict[str, pl.BlockSpec]:
  """The blocks of a program of the grid (head, segment, row), by the arrays' names; `repeat` heads share a group."""
  N, P = block(n), block(p)
  tokens = pl.BlockSpec((None, plan.padded, None, P), lambda head, segment, row: (row, 0, head, 0))
  of_group = pl.BlockSpec((None, plan.padded, None, N), lambda head, segment, row: (row, 0, head // repeat, 0))
  vector = pl.BlockSpec((None, None, plan.padded), lambda head, segment, row: (row, head, 0))

  def states(count):
    return pl.BlockSpec((None, count, None, N, P), lambda head, segment, row: (row, 0, head, 0, 0))

  return {
    'x': tokens, 'y': tokens, 'dy': tokens, 'B': of_group, 'C': of_group, 'dt': vector, 'high': vector,
    'low': vector, 'start': states(plan.segments), 'end': states(plan.segments),
    'left': states(plan.chunks), 'saved': states(plan.chunks // plan.save_every),
    'D': pl.BlockSpec((None, P), lambda head, segment, row: (head, 0)),
    'document': pl.BlockSpec((None, plan.padded), lambda head, segment, row: (row, 0)),
  }  # fmt: skip


def group_specs(
  plan: Plan, g: int, heads: int, parts: int, sums: int, sides: int, n: int, p: int
) -> dict[str, pl.BlockSpec]:
  """The blocks of a program of the grid (part and side, chunk, row and group); it has `heads` heads, a part's.

  There are `sums` arrays dB and dC, one per part or one for all.
  """
  N, P = block(n), block(p)

  def spec(shape, where):
    """where(row, group, block of heads, part) gives the block's place."""
    return pl.BlockSpec(shape, lambda part, chunk, group: where(
      group // g, group % g, group % g * parts + part // sides, part // sides))  # fmt: skip

  tokens = spec((None, plan.padded, heads, P), lambda row, group, first, part: (row, 0, first, 0))
  of_group = spec((None, plan.padded, None, N), lambda row, group, first, part: (row, 0, group, 0))
  of_part = spec((None, None, plan.padded, None, N), lambda row, group, first, part: (part % sums, row, 0, group, 0))
  vector = spec((None, heads, plan.padded), lambda row, group, first, part: (row, first, 0))
  states = spec((None, plan.chunks, heads, N, P), lambda row, group, first, part: (row, 0, first, 0, 0))
  return {
    'x': tokens, 'dx': tokens, 'dy': tokens, 'B': of_group, 'C': of_group, 'dB': of_part, 'dC': of_part,
    'dt': vector, 'high': vector, 'low': vector, 'ddt': vector, 'within': vector, 'arrives': vector,
    'leaves': vector, 'states': states, 'left': states,
    'through': spec((None, heads, plan.chunks), lambda row, group, first, part: (row, first, 0)),
    'D': spec((heads, P), lambda row, group, first, part: (first, 0)),
    'dD': spec((None, plan.chunks, heads, P), lambda row, group, first, part: (row, 0, first, 0)),
    'document': spec((None, plan.padded), lambda row, group, first, part: (row, 0)),
  }  # fmt: skip


def _mask(shape, sizes):
  """True inside `sizes`, which may hold None for a side that is filled; None if both are."""
  mask = None
  for axis, size in enumerate(sizes):
    if size is not None:
      inside = lax.broadcasted_iota(jnp.int32, shape, axis) < size
      mask = inside if mask is None else mask & inside
  return mask


def _rows(ref, start, plan, width, head):
  block_width = ref.shape[-1]
  tail, narrow = plan.padded != plan.length, block_width != width
  mask = _mask((plan.q, block_width), (plan.length - start if tail else None, width if narrow else None))
  rows = pl.ds(start, plan.q)
  return ref.at[(rows, slice(None)) if head is None else (rows, head, slice(None))], mask


def load_rows(ref, start, plan: Plan, width: int, head=None) -> jax.Array:
  """[q, block(width)] from token `start` (of head `head`, where the block has several); zeros outside the array."""
  rows, mask = _rows(ref, start, plan, width, head)
  return pltriton.load(rows, mask=mask, other=None if mask is None else 0)


def store_rows(ref, value, start, plan: Plan, width: int, head=None) -> None:
  """The inverse of `load_rows`: what lies outside the array is not stored."""
  rows, mask = _rows(ref, start, plan, width, head)
  pltriton.store(rows, value.astype(ref.dtype), mask=mask)


def add_rows(ref, value, start, plan: Plan) -> None:
  """Adds to all columns of the rows, atomically and so in any order; there is no mask, the array must be padded."""
  pltriton.atomic_add(ref, (pl.ds(start, plan.q), slice(None)), value)


def _row_mask(ref, width):
  block_width = ref.shape[-1]
  return None if block_width == width else _mask((block_width,), (width,))


def load_row(ref, width: int, head=None) -> jax.Array:
  """A vector of `width` elements (that of head `head`, where the block has several), with zeros beyond them."""
  mask = _row_mask(ref, width)
  return pltriton.load(ref if head is None else ref.at[head], mask=mask, other=None if mask is None else 0)


def store_row(ref, value, index, width: int) -> None:
  """Stores a vector of `width` elements at `index`."""
  pltriton.store(ref.at[index], value, mask=_row_mask(ref, width))


def load_vector(ref, start, plan: Plan, head=None) -> jax.Array:
  """[q], a number per token from token `start` (of head `head`, where the block has several)."""
  rows = pl.ds(start, plan.q)
  return pltriton.load(ref.at[rows if head is None else (head, rows)])


def store_vector(ref, value, start, plan: Plan, head=None) -> None:
  """The inverse of `load_vector`."""
  rows = pl.ds(start, plan.q)
  pltriton.store(ref.at[rows if head is None else (head, rows)], value)


def store_scalar(ref, value, index) -> None:
  """Stores one number at `index`."""
  pltriton.store(ref.at[index], value)


def _state(ref, index, n, p):
  shape = ref.shape[-2:]
  return ref.at[index], _mask(shape, (None if shape[0] == n else n, None if shape[1] == p else p))


def load_state(ref, index, n: int, p: int) -> jax.Array:
  """The state at `index`, [block(n), block(p)], zeros beyond n and p."""
  state, mask = _state(ref, index, n, p)
  return pltriton.load(state, mask=mask, other=None if mask is None else 0)


def store_state(ref, value, index, n: int, p: int, when=None) -> None:
  """Stores the state, or nothing where the scalar `when` is False."""
  state, mask = _state(ref, index, n, p)
  if when is not None:
    mask = jnp.broadcast_to(when, value.shape) & (True if mask is None else mask)
  pltriton.store(state, value.astype(ref.dtype), mask=mask)


def dot(a, b, plan: Plan, acc, *, trans_a: bool = False, trans_b: bool = False) -> jax.Array:
  """a b in `acc`, on the tensor cores.

  float32 operands are split in two TF32 numbers each and three products are added, which leaves about the error of
  float32 (21 of its 24 bits per product); Triton's plain float32 dots use no tensor cores, and at these sizes compile
  for minutes into code that lives off spilled registers. The interpreter multiplies in float32.
  """
  contract = ((0 if trans_a else 1,), (1 if trans_b else 0,))
  precision = None
  if a.dtype.itemsize > 2:
    precision = lax.Precision.HIGHEST if plan.interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
  return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=acc)


@dataclasses.dataclass(frozen=True)
class Decay:
  """The decays of one chunk and head, masked before exp2: base-2 logarithms, as exp2 is one instruction and exp two.

  high, low [q] are from `decay.running`; high_last and low_last their last values. With documents (else None):
  doc [q], entering (the document of the token before the chunk, 0 before the first) and last (of its last token).
  """

  high: jax.Array
  low: jax.Array
  high_last: jax.Array
  low_last: jax.Array
  doc: jax.Array | None = None
  entering: jax.Array | None = None
  last: jax.Array | None = None

  def between(self, later_axis: int) -> jax.Array:
    """[q, q]: the decay from the earlier to the later token of a pair, 0 where it does not reach or they are swapped.
    The later tokens are the rows (later_axis 0) or the columns (1)."""
    q = self.high.shape[0]
    earlier_axis = 1 - later_axis
    later, earlier = (lax.broadcasted_iota(jnp.int32, (q, q), axis) for axis in (later_axis, earlier_axis))
    mask = later >= earlier
    if self.doc is not None:
      mask &= self.doc[:, None] == self.doc[None, :]
    difference = (self.high[:, None] - self.high[None, :]) + (self.low[:, None] - self.low[None, :])
    return _masked_exp2(difference if later_axis == 0 else -difference, mask)

  def from_state(self) -> jax.Array:
    """[q]: from the state that enters to each token."""
    return _masked_exp2(self.high + self.low, None if self.doc is None else self.doc == self.entering)

  def to_end(self) -> jax.Array:
    """[q]: from each token to the state that leaves."""
    exponent = (self.high_last - self.high) + (self.low_last - self.low)
    return _masked_exp2(exponent, None if self.doc is None else self.doc == self.last)

  def through(self) -> jax.Array:
    """Scalar: from the state that enters to the one that leaves."""
    return _masked_exp2(self.high_last + self.low_last, None if self.doc is None else self.entering == self.last)


def load_decay(inputs, start, plan: Plan, head=None) -> Decay:
  """The decays of the chunk at token `start`, from the blocks 'high', 'low' and, if there are documents, 'document'."""
  last = start + plan.q - 1
  refs, doc_ref = (inputs['high'], inputs['low']), inputs.get('document')
  sums = [load_vector(ref, start, plan, head) for ref in refs]
  sums += [pltriton.load(ref.at[last if head is None else (head, last)]) for ref in refs]
  if doc_ref is None:
    return Decay(*sums)
  entering = jnp.where(start == 0, 0, pltriton.load(doc_ref.at[jnp.maximum(start - 1, 0)]))
  return Decay(*sums, load_vector(doc_ref, start, plan), entering, pltriton.load(doc_ref.at[last]))


def _masked_exp2(exponent, mask):
  return jnp.exp2(exponent if mask is None else jnp.where(mask, exponent, -jnp.inf))
