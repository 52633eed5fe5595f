"""The two kernels of the Triton selective scan. A program: one row, one block of channels, all tokens in order.

Its state is a tile [N, block] with N the state's size rounded up to a power of two. Triton spreads the lanes of a warp
over the last dim, so a thread owns channels: sums over the state (y, du, ddt) stay within a thread, and only the
gradients of B and C, sums over channels, cross threads. A tile cannot be cut along time once it is in registers, so
every token's rows are loaded on their own, a few tokens ahead of their use.

The forward kernel keeps the state at the start of every chunk. The backward kernel walks the chunks from the last to
the first. In a chunk it makes the states again and puts every UNROLLth into a scratch array of its own, which stays in
the L2 cache; from there it goes back, UNROLL tokens at a time with their states and decays in registers. The formulas
are those of `xla`.

Pallas computes offsets in 64 bits where an array has more than 2^32 bytes, and in 32 bits, signed, where it has not: at
two bytes per element or more neither overflows. Loads and stores are masked where the state, the channels or the
tokens do not fill a tile; zeros there (dt = 0, dy = 0) change nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

UNROLL = 2  # tokens at a time: their rows are loaded ahead, their states stay in registers; four spill
LOG2E = 1.4426950408889634  # decays are powers of two: exp2 is one instruction, exp two


@dataclasses.dataclass(frozen=True)
class Plan:
  """The static numbers of one call."""

  length: int
  d: int
  n: int
  groups: int
  block: int  # channels of a program
  chunk: int  # tokens between kept states, a multiple of UNROLL
  deterministic: bool
  interpret: bool

  @property
  def chunks(self) -> int:
    return -(-self.length // self.chunk)

  @property
  def N(self) -> int:
    return pl.next_power_of_2(self.n)

  @property
  def width(self) -> int:
    """Columns of the arrays of states: d made odd, so that no two rows are aligned alike. Triton would otherwise load
    four channels per thread, and have too few channels to keep a state within a thread."""  # fmt: skip
    return self.d | 1

  @property
  def programs(self) -> int:
    return -(-self.d // self.block)

  @property
  def warps(self) -> int:
    """So many that a thread has 16 elements of the state, but 8 at most."""
    return min(8, max(1, self.N * self.block // (32 * 16)))


def forward(plan: Plan, x, dt, A, B, C, D, z, first, start, *, save: bool) -> dict[str, jax.Array]:
  """'y' [b, l, d] in x.dtype, 'last' [b, n, d] and, with save, 'saved' [b, chunks, n, width]: the states before chunks."""
  inputs = {'x': x, 'dt': dt, 'A': A * LOG2E, 'B': B, 'C': C, 'D': D, 'z': z, 'first': first, 'start': start}
  outputs = {'y': jax.ShapeDtypeStruct(x.shape, x.dtype), 'last': jax.ShapeDtypeStruct(first.shape, dt.dtype)}
  if save:
    outputs['saved'] = jax.ShapeDtypeStruct((x.shape[0], plan.chunks, plan.n, plan.width), dt.dtype)

  def selective_scan_forward(inputs, outputs):
    _forward(_Tiles(plan), inputs, outputs)

  return _call(selective_scan_forward, plan, inputs, outputs, {})


def backward(plan: Plan, x, dt, A, B, C, D, z, start, saved, dy, dlast) -> dict[str, jax.Array]:
  """The gradients 'dx', 'ddt', 'dz', 'dfirst', per row 'dA' [b, n, d] and 'dD' [b, d], 'dB' and 'dC': [b, l, g, N],
  or [programs, b, l, N] in the deterministic mode."""
  b = x.shape[0]
  acc = dt.dtype
  inputs = {'x': x, 'dt': dt, 'A': A * LOG2E, 'B': B, 'C': C, 'D': D, 'z': z, 'start': start, 'saved': saved,
            'dy': dy, 'dlast': dlast}  # fmt: skip
  shared = (b, plan.length, plan.groups, plan.N)
  if plan.deterministic:
    shared = (plan.programs, b, plan.length, plan.N)
  shapes = {'dx': (x.shape, x.dtype), 'ddt': (dt.shape, acc), 'dB': (shared, acc), 'dC': (shared, acc),
            'dA': (dlast.shape, acc), 'dfirst': (dlast.shape, acc),
            'scratch': ((b, plan.chunk // UNROLL, plan.n, plan.width), acc)}  # fmt: skip
  if z is not None:
    shapes['dz'] = (z.shape, z.dtype)
  if D is not None:
    shapes['dD'] = ((b, plan.d), acc)
  outputs = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
  zeroed = {} if plan.deterministic else {name: jnp.zeros(shared, acc) for name in ('dB', 'dC')}

  def selective_scan_backward(inputs, outputs):
    _backward(_Tiles(plan), inputs, outputs)

  return _call(selective_scan_backward, plan, inputs, outputs, zeroed)


def _call(kernel, plan, inputs, outputs, zeroed):
  """`pl.pallas_call` of kernel(inputs, outputs), both dicts, lowered through Triton; the outputs in `zeroed` start from
  the arrays there."""  # fmt: skip
  block, N, per_group = plan.block, plan.N, plan.d // plan.groups
  tokens = pl.BlockSpec((None, plan.length, block), lambda c, row: (row, 0, c))
  shared = pl.BlockSpec((None, plan.length, None, N), lambda c, row: (row, 0, c * block // per_group, 0))
  part = pl.BlockSpec((None, None, plan.length, N), lambda c, row: (c, row, 0, 0))
  state = pl.BlockSpec((None, N, block), lambda c, row: (row, 0, c))
  specs = dict.fromkeys(('x', 'dt', 'z', 'y', 'dy', 'dx', 'ddt', 'dz'), tokens)
  specs |= dict.fromkeys(('B', 'C'), shared)
  specs |= dict.fromkeys(('dB', 'dC'), part if plan.deterministic else shared)
  specs |= dict.fromkeys(('first', 'last', 'dlast', 'dfirst', 'dA'), state)
  for name, count in (('saved', plan.chunks), ('scratch', plan.chunk // UNROLL)):
    specs[name] = pl.BlockSpec((None, count, N, block), lambda c, row: (row, 0, 0, c))
  specs['A'] = pl.BlockSpec((N, block), lambda c, row: (0, c))
  specs['D'] = pl.BlockSpec((block,), lambda c, row: (c,))
  specs['dD'] = pl.BlockSpec((None, block), lambda c, row: (row, c))
  specs['start'] = pl.BlockSpec((None, plan.length), lambda c, row: (row, 0))
  return pl.pallas_call(
    lambda zeroed, inputs, outputs: kernel(inputs, outputs),
    grid=(plan.programs, next(iter(inputs.values())).shape[0]),
    in_specs=[{name: specs[name] for name in zeroed},
              {name: None if value is None else specs[name] for name, value in inputs.items()}],
    out_specs={name: specs[name] for name in outputs}, out_shape=outputs, interpret=plan.interpret,
    input_output_aliases={i: sorted(outputs).index(name) for i, name in enumerate(sorted(zeroed))},
    compiler_params=pltriton.CompilerParams(num_warps=plan.warps, num_stages=1), name=kernel.__name__,
  )(zeroed, inputs)  # fmt: skip


class _Tiles:
  """Masked loads and stores of one program: rows of a token, and states."""

  def __init__(self, plan: Plan):
    self.plan = plan
    # int64 where the caller enabled it, as Pallas' own indices are then.
    channel = pl.program_id(0).astype(int) * plan.block + lax.broadcasted_iota(int, (plan.block,), 0)
    self.channels = None if plan.d % plan.block == 0 else channel < plan.d
    self.states = None if plan.n == plan.N else lax.broadcasted_iota(jnp.int32, (plan.N,), 0) < plan.n

  def rows(self, refs, t):
    """The rows of token t by name: of B and C [N], of the others [block], in the accumulator; zeros past the end."""
    acc = refs['dt'].dtype
    rows = {}
    for name in ('x', 'dt', 'z', 'dy', 'B', 'C'):
      if refs.get(name) is not None:
        of_state = name in ('B', 'C')
        size, mask = (self.plan.N, self.states) if of_state else (self.plan.block, self.channels)
        mask = self._in_sequence(t, size, mask)
        rows[name] = pltriton.load(refs[name].at[t, slice(None)], mask=mask, other=0).astype(acc)
    if refs['start'] is not None:
      rows['start'] = pltriton.load(refs['start'].at[t], mask=t < self.plan.length, other=0) != 0
    return rows

  def store_row(self, ref, t, value):
    pltriton.store(ref.at[t, slice(None)], value.astype(ref.dtype), mask=self._in_sequence(t, self.plan.block, self.channels))

  def add_row(self, ref, t, value):
    """Writes a token's part of the sum over channels; its gradients have N columns, so that no mask is needed."""
    if self.plan.deterministic:
      pltriton.store(ref.at[t, slice(None)], value, mask=self._in_sequence(t, self.plan.N, None))
    else:  # past the end, a zero to the last token
      pltriton.atomic_add(ref, (jnp.minimum(t, self.plan.length - 1), slice(None)), value)

  def vector(self, ref):
    return pltriton.load(ref, mask=self.channels, other=None if self.channels is None else 0)

  def store_vector(self, ref, value):
    pltriton.store(ref, value, mask=self.channels)

  def state(self, ref):
    mask = self._in_state()
    return pltriton.load(ref, mask=mask, other=None if mask is None else 0)

  def store_state(self, ref, value):
    pltriton.store(ref, value, mask=self._in_state())

  def barrier(self):
    """What one thread stored in the scratch array another may load."""
    if not self.plan.interpret:
      pltriton.debug_barrier()

  def _in_sequence(self, t, size, mask):
    inside = t < self.plan.length
    return jnp.broadcast_to(inside, (size,)) if mask is None else mask & inside

  def _in_state(self):
    if self.channels is None and self.states is None:
      return None
    mask = jnp.ones((self.plan.N, self.plan.block), bool)
    mask = mask if self.channels is None else mask & self.channels[None, :]
    return mask if self.states is None else mask & self.states[:, None]


def _decay(A, row):
  """exp(dt A) [N, block], zero at the start of a document; A in base 2."""
  decay = jnp.exp2(row['dt'][None, :] * A)
  return jnp.where(row['start'], 0.0, decay) if 'start' in row else decay


def _step(A, state, row):
  """(the decay before a token, the state after it)."""
  decay = _decay(A, row)
  return decay, decay * state + (row['dt'] * row['x'])[None, :] * row['B'][:, None]


def _output(D, state, row):
  """h C + D x of one token."""
  y = jnp.sum(state * row['C'][:, None], axis=0)
  return y if D is None else y + D * row['x']


def _walk(tiles, refs, first, size, body, state):
  """Calls body(i, rows, state) -> state for a chunk's groups of `size` tokens, the first of them token `first`; the
  rows of the next group are loaded before the current one is worked on."""  # fmt: skip

  def load(i):
    return [tiles.rows(refs, first + i * size + u) for u in range(size)]

  def group(i, carry):
    state, rows = carry
    following = load(i + 1)
    return body(i, rows, state), following

  return lax.fori_loop(0, tiles.plan.chunk // size, group, (state, load(0)))[0]


def _forward(tiles, refs, outputs):
  plan = tiles.plan
  A = tiles.state(refs['A'])
  D = None if refs['D'] is None else tiles.vector(refs['D'])

  def chunk(i, state):
    if 'saved' in outputs:
      tiles.store_state(outputs['saved'].at[i], state)

    def group(j, rows, state):
      for u, row in enumerate(rows):
        _, state = _step(A, state, row)
        y = _output(D, state, row)
        if 'z' in row:
          y *= row['z'] * jax.nn.sigmoid(row['z'])
        tiles.store_row(outputs['y'], i * plan.chunk + j * UNROLL + u, y)
      return state

    return _walk(tiles, refs, i * plan.chunk, UNROLL, group, state)

  state = lax.fori_loop(0, plan.chunks, chunk, tiles.state(refs['first']))
  tiles.store_state(outputs['last'], state)


def _backward(tiles, refs, outputs):
  plan = tiles.plan
  groups = plan.chunk // UNROLL
  A = tiles.state(refs['A'])
  D = None if refs['D'] is None else tiles.vector(refs['D'])
  only_states = {name: refs[name] for name in ('x', 'dt', 'B', 'start')}

  def keep(j, rows, state):
    tiles.store_state(outputs['scratch'].at[j], state)
    for row in rows:
      _, state = _step(A, state, row)
    return state

  def chunk(i, carry):
    i = plan.chunks - 1 - i
    _walk(tiles, only_states, i * plan.chunk, UNROLL, keep, tiles.state(refs['saved'].at[i]))
    tiles.barrier()

    def group(j, carry):
      j = groups - 1 - j
      first = i * plan.chunk + j * UNROLL
      rows = [tiles.rows(refs, first + u) for u in range(UNROLL)]
      states, decays = [tiles.state(outputs['scratch'].at[j])], []
      for row in rows:
        decay, state = _step(A, states[-1], row)
        states.append(state)
        decays.append(decay)
      for u in reversed(range(UNROLL)):
        carry = _token(tiles, outputs, first + u, rows[u], A, D, states[u : u + 2], decays[u], carry)
      return carry

    carry = lax.fori_loop(0, groups, group, carry)
    tiles.barrier()
    return carry

  zero = jnp.zeros((plan.N, plan.block), A.dtype)
  start = (tiles.state(refs['dlast']), zero, jnp.zeros((plan.block,), A.dtype))
  dstate, dA, dD = lax.fori_loop(0, plan.chunks, chunk, start)
  tiles.store_state(outputs['dfirst'], dstate)
  tiles.store_state(outputs['dA'], dA)
  if D is not None:
    tiles.store_vector(outputs['dD'], dD)


def _token(tiles, outputs, t, row, A, D, states, decay, carry):
  """The gradients of one token; carry: a_(t+1) g_(t+1), and the sums over tokens of the gradients of A and D."""
  dnext, dA, dD = carry
  before, after = states
  x, dt, dy = row['x'], row['dt'], row['dy']
  if 'z' in row:
    gate = jax.nn.sigmoid(row['z'])
    dz = dy * _output(D, after, row) * gate * (1 + row['z'] * (1 - gate))
    tiles.store_row(outputs['dz'], t, dz)
    dy = dy * row['z'] * gate
  g = dnext + dy[None, :] * row['C'][:, None]
  dnext = decay * g
  du = jnp.sum(g * row['B'][:, None], axis=0)
  w = dnext * before
  tiles.store_row(outputs['ddt'], t, x * du + jnp.sum(w * A, axis=0) * (1 / LOG2E))
  tiles.store_row(outputs['dx'], t, dt * du if D is None else dt * du + D * dy)
  tiles.add_row(outputs['dB'], t, jnp.sum(g * (dt * x)[None, :], axis=1))
  tiles.add_row(outputs['dC'], t, jnp.sum(after * dy[None, :], axis=1))
  return dnext, dA + dt[None, :] * w, dD + dy * x
