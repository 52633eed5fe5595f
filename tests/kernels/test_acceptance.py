"""The acceptance suite of the SSD and its neighbours, from outside and against the float64 recurrence of `oracle`.

Every implementation runs the same cases: on a CPU at small sizes ('pallas_triton' interpreted), with `make test-slow`
'xla' at full size, and with `make test-gpu` all of them at full size, compiled. The cases are

  A1 outputs and states          A6  packed documents, forward and gradients    A11 sharded = unsharded
  A2 gradients                   A7  extreme and unequal decays                 A13 Mamba-1's selective scan
  A3 awkward lengths             A8  one pass = two with the state carried      A14 the gated norm
  A4 the chunk changes nothing   A9  prefill and decoding = one pass            A15 no error that grows with length
  A5 groups, D, z, dt's bias     A10 five runs are equal to the bit

A12, checkpoints across meshes, is in tests/train. Errors are judged head by head. Bounds: see TOLERANCES and each test.
"""

import contextlib
import dataclasses
import functools
import importlib
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from kernels import oracle
from kernels.heads import assert_heads_close

from lmscale.config import AttentionConfig, Mamba2Config, MambaConfig, MLPConfig, ModelConfig
from lmscale.kernels.gated_norm import gated_norm
from lmscale.kernels.selective_scan import selective_scan
from lmscale.kernels.ssd import api, ssd
from lmscale.kernels.ssd_update import ssd_update
from lmscale.models import model
from lmscale.models.context import Context
from lmscale.models.stacking import from_layers, make_stacking

PER_TOKEN = ('x', 'dt', 'B', 'C', 'z')
# Relative RMSE of a head's (outputs and states, gradients, gradients of dt and A, which are long sums that cancel: of A's
# in bfloat16, one head of A7's weak decays keeps 1.3e-2 in 'pallas_triton', from states in bfloat16 between chunks).
TOLERANCES = {'float32': (1e-5, 1e-4, 1e-4), 'bfloat16': (5e-3, 5e-3, 2e-2), 'float16': (5e-3, 5e-3, 2e-2)}


class Case(NamedTuple):
  """Sizes as in `ssd`, and the chunk."""

  b: int
  l: int
  h: int
  p: int
  n: int
  g: int
  q: int


class Run(NamedTuple):
  implementation: str
  full: bool

  @property
  def interpret(self) -> bool:
    return self.implementation == 'pallas_triton' and not self.full

  @property
  def dtype(self) -> str:
    """Of the cases that are not about a dtype."""
    return 'bfloat16' if self.implementation == 'pallas_mosaic' else 'float32'

  def chunk(self, q: int) -> int | None:
    """The chunk to ask for: a Pallas kernel takes few sizes, and has its own best."""
    return q if self.implementation == 'xla' or self.interpret else None


def runs(*implementations, small=(None,), full=(None,), name=None, interpreted=True):
  """Parametrises a test over `run` and `name`: the small cases here, the full ones where a marker asks for them.

  interpreted False leaves 'pallas_triton' to the GPU, where interpreting it would show no more for its time.
  """

  def params(implementation, cases, *marks):
    for i, case in enumerate(cases):
      label = [implementation, marks[0].name if marks else 'small']
      if name:
        label.append(str(case) if isinstance(case, int | str) else str(i))
      yield pytest.param(*(Run(implementation, bool(marks)), case)[: 2 if name else 1], id='-'.join(label), marks=marks)

  here = [i for i in implementations if i in ('scan', 'xla') or (i == 'pallas_triton' and interpreted)]
  everything = [param for i in here for param in params(i, small)]
  everything += params('xla', full, pytest.mark.slow)
  everything += [param for i in implementations if i != 'scan' for param in params(i, full, pytest.mark.gpu)]
  return pytest.mark.parametrize(('run', name) if name else ('run',), everything)


CHUNKED = ('xla', 'pallas_triton', 'pallas_mosaic')
EVERY = ('scan', *CHUNKED)


def make(case, dtype='float32', seed=0, D='head', z=False, state=True):
  """Random arguments: dt log-uniform in 0.005..0.5, A in -8..-1; x, B, C, z in `dtype`, the rest in float32."""
  rng = np.random.default_rng(seed)
  b, l, h, p, n, g, _ = case
  arrays = {'x': rng.normal(size=(b, l, h, p)), 'B': rng.normal(size=(b, l, g, n)), 'C': rng.normal(size=(b, l, g, n))}
  if z:
    arrays['z'] = rng.normal(size=(b, l, h, p))
  arguments = {name: jnp.asarray(a, dtype) for name, a in arrays.items()}
  exact = {'dt': np.exp(rng.uniform(np.log(0.005), np.log(0.5), (b, l, h))), 'A': -np.exp(rng.uniform(0, np.log(8), h))}
  if D:
    exact['D'] = rng.normal(size=(h,) if D == 'head' else (h, p))
  if state:
    exact['initial_state'] = rng.normal(size=(b, h, p, n))
  arguments |= {name: jnp.asarray(a, jnp.float32) for name, a in exact.items()}
  # y's cotangent has y's dtype, so values that are not rounded by it.
  weights = np.asarray(jnp.asarray(rng.normal(size=(b, l, h, p)), dtype), np.float32)
  return arguments, (weights, np.float32(rng.normal(size=(b, h, p, n))))


@functools.partial(jax.jit, static_argnames=('implementation', 'chunk', 'interpret'))
def _differentiate(arguments, weights, segment_ids, implementation, chunk, interpret):
  def loss(arguments):
    y, state = ssd(**arguments, segment_ids=segment_ids, implementation=implementation, chunk=chunk, interpret=interpret)
    return jnp.sum(weights[0] * y) + jnp.sum(weights[1] * state), (y, state)

  gradients, results = jax.grad(loss, has_aux=True)(arguments)
  return results, gradients


def differentiate(run, q, arguments, weights, segment_ids=None):
  """((y, state), gradients of a weighted sum of both) on the device."""
  supported(run, arguments['x'], arguments['B'])
  with full_precision(arguments['x'].dtype):
    return _differentiate(arguments, weights, segment_ids, run.implementation, run.chunk(q), run.interpret)


def supported(run, x, B):
  """Skips, with its own words, what 'pallas_mosaic' does not do; the others do everything."""
  if run.implementation == 'pallas_mosaic':
    reason = importlib.import_module('lmscale.kernels.ssd.mosaic.entry').unsupported(x, B, api.PALLAS_CHUNK)
    if reason:
      pytest.skip(reason)


def full_precision(dtype):
  """float32 means float32: a GPU would multiply it in TF32."""
  return jax.default_matmul_precision('highest') if dtype == jnp.float32 else contextlib.nullcontext()


def check(got, want, dtype, scales=None):
  """Of ((y, state), gradients), every head by TOLERANCES; `scales` from `oracle.terms`."""
  forward, gradients, sums = TOLERANCES[dtype]
  bounds = {name: sums if name in ('dt', 'A') else gradients for name in want[1]} | {'y': forward, 'state': forward}
  assert_heads_close(got, want, bounds, scales)


def check_oracle(got, arguments, weights, dtype, segment_ids=None):
  """`got` against the recurrence in float64."""
  want, scales = oracle.ssd(arguments, weights, segment_ids), oracle.terms(arguments, weights, segment_ids)
  check(got, want, dtype, scales)


SMALL = (Case(2, 64, 4, 16, 16, 1, 32), Case(1, 80, 8, 32, 16, 2, 16), Case(2, 75, 3, 24, 20, 1, 16))
FULL = (
  Case(2, 256, 4, 64, 64, 1, 64), Case(1, 2048, 32, 64, 64, 1, 64), Case(2, 512, 8, 64, 128, 2, 128),
  Case(1, 1024, 16, 64, 128, 8, 256), Case(2, 300, 3, 60, 36, 1, 64),
)  # fmt: skip


DTYPES = ('float32', 'bfloat16', 'float16')


@runs(*EVERY, name='case', small=[(SMALL[0], d) for d in DTYPES] + [(case, 'float32') for case in SMALL[1:]],
      full=[(case, d) for case in FULL for d in DTYPES])  # fmt: skip
def test_a1_a2_outputs_states_and_gradients(run, case):
  case, dtype = case
  arguments, weights = make(case, dtype)
  got = differentiate(run, case.q, arguments, weights)
  assert got[0][0].dtype == dtype and got[0][1].dtype == jnp.float32
  check_oracle(got, arguments, weights, dtype)


@pytest.mark.parametrize('dtype', DTYPES[1:])
def test_a2_sums_of_the_kernel_are_no_coarser_than_its_inputs(dtype):
  """What becomes of 16-bit inputs in float32 is not rounded to 16 bits again on the way to the gradients of dt and A."""
  case = SMALL[0]  # compiled by the test above
  arguments, weights = make(case, dtype)
  reference = differentiate(Run('xla', False), case.q, arguments, weights)
  got = differentiate(Run('pallas_triton', False), case.q, arguments, weights)
  bounds = dict.fromkeys(('y', 'state', *arguments), 1e-4)
  assert_heads_close(got, oracle.ssd(arguments, weights), bounds, oracle.terms(arguments, weights), reference)


@runs(*EVERY, name='length', small=(1, 33), full=(1, 15, 63, 64, 65, 1000, 4095))
def test_a3_awkward_lengths(run, length):
  case = Case(1, length, 4, 64, 64, 1, 64) if run.full else Case(1, length, 4, 16, 16, 1, 16)
  arguments, weights = make(case, run.dtype)
  check_oracle(differentiate(run, case.q, arguments, weights), arguments, weights, run.dtype)


def unequal_decays(case):
  """Arguments whose heads, taken in turn, have: dt about 4 and A = -16, so that nothing outlives a token; strong decays in
  one half of every 128 tokens and weak ones in the other, in this order and in the opposite; and decays of every size."""
  arguments, weights = make(case, state=False)
  rng, strong = np.random.default_rng(4), (np.arange(case.l) // 64 % 2 == 0)[None, :, None]
  shape = (case.b, case.l, -(-case.h // 4))
  kinds = (
    4 * np.exp(0.1 * rng.normal(size=shape)), np.where(strong, 6, 1e-3) * np.ones(shape),
    np.where(strong, 1e-3, 6) * np.ones(shape), 10 ** rng.uniform(-3, 1, shape),
  )  # fmt: skip
  dt = np.stack(kinds, axis=-1).reshape(case.b, case.l, -1)[..., : case.h]
  return arguments | {'dt': jnp.float32(dt), 'A': jnp.asarray(np.resize([-16.0, -16, -4, -1], case.h), jnp.float32)}, weights


@runs('xla', 'pallas_triton', name='chunk', small=(32, 128), full=(16, 32, 64, 128))
def test_a4_the_chunk_changes_nothing(run, chunk):
  """Every head as exact as `scan` in float32 is, to a few times: also where strong and weak decays meet in a chunk, and
  in the gradient of A of heads that forget at once, which is small against all that it is not made of."""
  case = Case(1, 512, 8, 64, 64, 8, chunk) if run.full else Case(1, 128, 4, 16, 16, 4, chunk)
  arguments, weights = unequal_decays(case)
  reference = differentiate(Run('scan', run.full), 0, arguments, weights)
  with full_precision(jnp.float32):
    got = _differentiate(arguments, weights, None, run.implementation, chunk, run.interpret)
  # A decay of e^-64 has, from the rounding of its exponent, an error of 4e-6, which depends on a CPU's exponential.
  bounds = dict.fromkeys(('y', 'state', *arguments), 1e-6) | {'A': 2e-5}
  assert_heads_close(got, oracle.ssd(arguments, weights), bounds, oracle.terms(arguments, weights), reference)


OPTIONS = {
  'two groups': (2, {'D': 'channel', 'z': True}), 'groups = heads': (4, {'D': None, 'state': False}),
  'one group': (1, {'z': True}),
}  # fmt: skip


@runs(*EVERY, name='options', small=tuple(OPTIONS)[:2], full=tuple(OPTIONS))
def test_a5_groups_skip_and_gate(run, options):
  groups, options = OPTIONS[options]
  case = Case(2, 256, 4, 64, 64, groups, 64) if run.full else Case(1, 32, 4, 16, 16, groups, 16)
  arguments, weights = make(case, run.dtype, **options)
  check_oracle(differentiate(run, case.q, arguments, weights), arguments, weights, run.dtype)


@runs('xla', 'pallas_triton', interpreted=False)
def test_a5_bias_softplus_and_clamp_of_dt(run, assert_close):
  case = Case(2, 256, 4, 64, 64, 1, 64) if run.full else Case(1, 32, 4, 16, 16, 1, 16)
  arguments, weights = make(case)
  raw, bias = np.float32(np.random.default_rng(2).normal(-2, 1, arguments['dt'].shape)), np.linspace(-1, 1, 4, dtype='f4')
  low, high = 0.05, 0.3

  @jax.jit
  def gradients(raw, bias):
    def loss(raw, bias):
      dt = jnp.clip(jax.nn.softplus(raw + bias), low, high)
      options = {'implementation': run.implementation, 'chunk': run.chunk(case.q), 'interpret': run.interpret}
      y, state = ssd(**arguments | {'dt': dt}, **options)
      return jnp.sum(weights[0] * y) + jnp.sum(weights[1] * state)

    return jax.grad(loss, (0, 1))(raw, bias)

  soft = np.logaddexp(0, np.float64(raw) + bias)
  inside = (soft > low) & (soft < high)
  assert inside.any() and not inside.all()
  _, want = oracle.ssd(arguments | {'dt': np.clip(soft, low, high)}, weights)
  d_raw = want['dt'] * inside / (1 + np.exp(-np.float64(raw) - bias))
  with full_precision(jnp.float32):
    assert_close(gradients(raw, bias), (d_raw, d_raw.sum((0, 1))), 1e-4)


def spans_of(run):
  """Documents as (first, last + 1), and the length of the row with some padding at its end."""
  if not run.full:
    return [[(0, 1), (1, 5), (5, 16), (16, 33), (33, 60), (60, 67), (67, 72)]], 75
  many = np.random.default_rng(0).integers(1, 200, 300).cumsum().tolist()
  rows = (0, 15, 100, 300, 1200, 2000), (0, 1, 100, 300, 1200, 2048), (0, *many)
  return [list(itertools.pairwise(ends)) for ends in rows], None


def packed(run, dtype):
  """Rows of packed documents, one after another: (case, spans, segment ids)."""
  rows, length = spans_of(run)
  for spans in rows:
    l = length or -(-(spans[-1][1] + 7) // 64) * 64
    segments = np.zeros((1, l), np.int32)
    for number, (first, last) in enumerate(spans):
      segments[0, first:last] = number + 1
    case = Case(1, l, 4, 64, 64, 2, 64) if run.full else Case(1, l, 4, 16, 16, 2, 16)
    yield case, spans, segments, make(case, dtype, z=True)


@runs(*EVERY)
def test_a6_packed_documents_equal_each_alone(run):
  dtype = run.dtype
  for case, spans, segments, (arguments, weights) in packed(run, dtype):
    got = differentiate(run, case.q, arguments, weights, segments)
    want = {name: np.zeros(a.shape) for name, a in arguments.items()}
    y = np.zeros(arguments['x'].shape)
    for first, last in spans:
      one = {name: a[:, first:last] if name in PER_TOKEN else a for name, a in arguments.items()}
      if first > 0:
        del one['initial_state']
      final = last == spans[-1][1]
      (y[:, first:last], state), gradients = oracle.ssd(one, (weights[0][:, first:last], weights[1] * final))
      for name, gradient in gradients.items():
        if name in PER_TOKEN:
          want[name][:, first:last] = gradient
        else:
          want[name] += gradient
    check(got, ((y, state), want), dtype)


@runs(*EVERY)
def test_a6_no_gradient_crosses_a_boundary(run):
  for case, spans, segments, (arguments, weights) in packed(run, run.dtype):
    last = segments == len(spans)
    weights = (weights[0] * last[..., None, None], weights[1])
    _, gradients = differentiate(run, case.q, arguments, weights, segments)
    for name in PER_TOKEN:
      assert np.all(np.asarray(gradients[name])[~last] == 0), name
      assert np.any(np.asarray(gradients[name])[last] != 0), name
    assert np.all(np.asarray(gradients['initial_state']) == 0)


@runs(*EVERY)
def test_a6_what_stands_at_padding_does_not_matter(run):
  """NaN and infinity in every argument and in y's cotangent: results and gradients stay equal to the bit."""

  def poison(m, segments, value):
    return jnp.where(segments.reshape(*segments.shape, *[1] * (m.ndim - 2)) == 0, jnp.asarray(value, m.dtype), m)

  for case, _, segments, (arguments, weights) in packed(run, run.dtype):
    want = differentiate(run, case.q, arguments, weights, segments)
    for value in (np.nan, np.inf):
      bad = {name: poison(a, segments, value) if name in PER_TOKEN else a for name, a in arguments.items()}
      got = differentiate(run, case.q, bad, (poison(weights[0], segments, value), weights[1]), segments)
      jax.tree.map(np.testing.assert_array_equal, got, want)


GATES = ('weak', 'strong', 'extreme')


@runs(*EVERY, name='gates', small=GATES, full=GATES)
def test_a7_extreme_decays(run, gates):
  case = FULL[2] if run.full else SMALL[0]
  arguments, weights = make(case, 'bfloat16')
  if gates == 'extreme':  # the decays of a chunk multiply to exp(-2560 and less), far below the smallest number
    arguments['A'] = jnp.full_like(arguments['A'], -16)
    arguments['dt'] = jnp.asarray(np.random.default_rng(3).uniform(0, 10, arguments['dt'].shape), jnp.float32)
  else:
    arguments['dt'] *= {'weak': 0.1, 'strong': 10}[gates]
  got = differentiate(run, case.q, arguments, weights)
  for leaf in jax.tree.leaves(got):
    assert np.isfinite(np.asarray(leaf, np.float32)).all()
  check_oracle(got, arguments, weights, 'bfloat16')


@runs(*CHUNKED, name='cut', small=(1, 20), full=(1, 100, 256))
def test_a8_one_pass_equals_two(run, cut, assert_close):
  case = Case(1, 512, 4, 64, 64, 1, 64) if run.full else Case(1, 33, 4, 16, 16, 1, 16)
  arguments, weights = make(case, run.dtype)
  for part in (slice(None, cut), slice(cut, None)):
    supported(run, arguments['x'][:, part], arguments['B'][:, part])
  options = {'implementation': run.implementation, 'chunk': run.chunk(case.q), 'interpret': run.interpret}

  @jax.jit
  def split(arguments):
    def loss(arguments):
      first, second = ({k: a[:, part] if k in PER_TOKEN else a for k, a in arguments.items()}
                       for part in (slice(None, cut), slice(cut, None)))  # fmt: skip
      y0, state = ssd(**first, **options)
      y1, state = ssd(**second | {'initial_state': state}, **options)
      y = jnp.concatenate([y0, y1], axis=1)
      return jnp.sum(weights[0] * y) + jnp.sum(weights[1] * state), (y, state)

    gradients, results = jax.grad(loss, has_aux=True)(arguments)
    return results, gradients

  with full_precision(jnp.float32):
    whole = differentiate(run, case.q, arguments, weights)
    assert_close(split(arguments), whole, {'float32': 1e-5, 'bfloat16': 1e-2}[run.dtype])


@runs(*EVERY, name='p', small=(16,), full=(64, 128))
def test_a10_five_runs_are_equal_to_the_bit(run, p):
  case = Case(2, 2048, 8, p, 64, 1, 256) if run.full else SMALL[0]
  arguments, weights = make(case, 'bfloat16')
  first, *others = [jax.tree.map(np.asarray, differentiate(run, case.q, arguments, weights)) for _ in range(5)]
  for other in others:
    jax.tree.map(np.testing.assert_array_equal, other, first)


MODEL = ModelConfig(
  d_model=32, vocab=48, positions='rope',
  attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8), mlp=MLPConfig(d_ff=32),
  mamba2=Mamba2Config(heads=4, head_dim=16, groups=2, state=16, chunk=16), mamba=MambaConfig(d_inner=64, state=8, dt_rank=4),
)  # fmt: skip
DECODE_DTYPES = ('float32', 'bfloat16')


def _decode_runs():
  for dtype, pattern in (('float32', 'M*m-'), ('bfloat16', 'M')):
    yield pytest.param(dtype, pattern, (17, 6, 10), 24, 4, id=f'{dtype}-small')
    yield pytest.param(dtype, 'M*m-M', (170, 65, 100), 512, 20, id=f'{dtype}-full', marks=pytest.mark.gpu)


@pytest.mark.parametrize(('dtype', 'pattern', 'lengths', 'padded', 'steps'), _decode_runs())
def test_a9_prefill_and_decoding_equal_one_pass(dtype, pattern, lengths, padded, steps, assert_close):
  """A padded batch of prompts, then one token at a time, against each sequence alone: KV, windows and states cached."""
  config = dataclasses.replace(MODEL, pattern=pattern)
  plan = make_stacking(config.layers, 'unrolled')
  params = jax.jit(lambda: jax.tree.map(lambda leaf: leaf.astype(dtype), model.init_layers(config, 0)))()
  rows, total = len(lengths), padded + steps
  tokens = np.random.default_rng(0).integers(0, config.vocab, (rows, total)).astype(np.int32)
  start = np.asarray(lengths, np.int32)[:, None]

  @jax.jit
  def forward(params, tokens, positions, segment_ids, slots, caches):
    context = Context(positions, segment_ids, slots)
    stacked = {**params, 'layers': from_layers(params['layers'], plan)}
    hidden, caches = model.forward(config, stacked, tokens, context, caches, plan)
    return model.logits(config, params, hidden), caches

  with full_precision(jnp.dtype(dtype)):
    positions = np.broadcast_to(np.arange(total, dtype=np.int32), (rows, total))
    whole, _ = forward(params, tokens, positions, None, None, None)
    caches = jax.tree.map(np.asarray, jax.jit(lambda: model.empty_caches(config, plan, rows, total, dtype))())
    real = np.int32(positions[:, :padded] < start)
    logits, caches = forward(params, np.where(real, tokens[:, :padded], 0), positions[:, :padded], real, 0 * start[:, 0], caches)
    got, want = [np.asarray(logits)[real > 0]], [np.asarray(whole)[:, :padded][real > 0]]
    for k in range(steps):
      at = start + k
      logits, caches = forward(params, np.take_along_axis(tokens, at, 1), at, None, at[:, 0], caches)
      got.append(np.asarray(logits)[:, 0])
      want.append(np.take_along_axis(np.asarray(whole), at[..., None], 1)[:, 0])
  relative, absolute = {'float32': (1e-5, 1e-3), 'bfloat16': (1e-2, 5e-2)}[dtype]
  assert_close(got, want, relative, absolute)


@runs(*CHUNKED[:2], name='dtype', small=DECODE_DTYPES, full=DECODE_DTYPES)
def test_a9_one_step_in_slots_of_a_pool(run, dtype, assert_close):
  """16 sequences in a pool of 160 states: the step is the recurrence's, and the other states stay equal to the bit."""
  p, n = (64, 128) if run.full else (16, 16)
  arguments, _ = make(Case(16, 1, 4, p, n, 2, 1), dtype, z=True)
  pool = np.random.default_rng(1).normal(size=(160, 4, p, n)).astype(np.float32)
  slots = np.random.default_rng(2).permutation(160)[:16].astype(np.int32)
  arguments['initial_state'] = jnp.asarray(pool[slots])
  (y, state), _ = oracle.ssd(arguments, (np.zeros(arguments['x'].shape), np.zeros(state_shape := (16, 4, p, n))))
  del arguments['initial_state']
  one = {name: a[:, 0] if name in PER_TOKEN else a for name, a in arguments.items()}
  step = jax.jit(functools.partial(ssd_update, implementation=run.implementation, interpret=run.interpret))
  got_y, got_pool = step(jnp.asarray(pool), **one, slots=slots)
  got_pool = np.asarray(got_pool)
  assert state.shape == state_shape and got_y.dtype == dtype
  bounds = {'float32': (3e-4, 1e-3), 'bfloat16': (1e-2, None)}[dtype]  # y reaches 73, where bfloat16 rounds by up to 0.25
  assert_close((got_y, got_pool[slots]), (y[:, 0], state), *bounds)
  others = np.setdiff1d(np.arange(160), slots)
  np.testing.assert_array_equal(got_pool[others], pool[others])


ALONG_HEADS = {name: P(None, None, 'tensor') for name in PER_TOKEN} | {
  'A': P('tensor'), 'D': P('tensor'), 'initial_state': P(None, 'tensor')
}  # fmt: skip


def _local(tensor, case, arguments, **options):
  """`ssd` on each device's heads, to be called where `data` is manual, as the layers do in a training step. B and C are
  cut by group where `tensor` divides the groups, and else repeated until it does."""
  repeats = math.lcm(case.g, tensor) // case.g
  arguments = arguments | {name: jnp.repeat(arguments[name], repeats, axis=2) for name in 'BC'}
  inner = jax.shard_map(
    lambda arguments: ssd(**arguments, **options), axis_names={'tensor'}, check_vma=False,
    in_specs=({name: ALONG_HEADS[name] for name in arguments},),
    out_specs=(ALONG_HEADS['x'], ALONG_HEADS['initial_state']),
  )  # fmt: skip
  return inner(arguments)


def _sharded(mesh, case, arguments, **options):
  """(arguments, weights) -> ((y, state), gradients), heads over `tensor`, rows over `data`, jitted."""
  tensor = mesh.shape['tensor']
  rows = {name: P() if name in ('A', 'D') else P('data') for name in arguments}

  def step(arguments, weights):
    def loss(arguments):
      y, state = _local(tensor, case, arguments, **options)
      return jnp.sum(weights[0] * y) + jnp.sum(weights[1] * state), (y, state)

    gradients, results = jax.grad(loss, has_aux=True)(arguments)
    if mesh.shape['data'] > 1:  # with a single data rank the partitioner takes the sum for one over `tensor`, and fails
      gradients |= {name: jax.lax.psum(gradients[name], 'data') for name in ('A', 'D')}
    return results, gradients

  function = jax.shard_map(step, mesh=mesh, axis_names={'data'}, in_specs=(rows, P('data')), check_vma=False,
                           out_specs=((P('data'), P('data')), rows))  # fmt: skip
  return jax.jit(function)


@pytest.mark.parametrize(
  ('implementation', 'tensor'), [('xla', 2), ('xla', 4), ('xla', 8), ('pallas_triton', 2), ('pallas_triton', 8)]
)
def test_a11_sharded_equals_unsharded(implementation, tensor):
  """Heads over `tensor` 2, 4 and 8, rows over `data` 4, 2 and 1; two groups, which 4 and 8 do not divide."""
  run, case = Run(implementation, False), Case(4, 32, 8, 16, 16, 2, 16)
  arguments, weights = make(case)
  options = {'implementation': implementation, 'chunk': case.q, 'interpret': run.interpret}
  mesh = jax.make_mesh((8 // tensor, tensor), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)
  with jax.set_mesh(mesh):
    compiled = _sharded(mesh, case, arguments, **options).lower(arguments, weights).compile()
    got = jax.tree.map(np.asarray, compiled(arguments, weights))
  shared = f' = f32[{4 * tensor // 8},32,2,16]'  # the gradients of B and C where no device has a group to itself
  for line in compiled.as_text().splitlines():
    assert ' all-to-all(' not in line and ' collective-permute(' not in line, line
    assert ' all-gather(' not in line or (tensor > 2 and shared in line), line
  check(got, differentiate(run, case.q, arguments, weights), 'float32')


@pytest.mark.parametrize('tensor', [2, 8])
def test_a11_the_gpu_kernels_see_local_shapes(tensor):
  """Lowered for CUDA, forward and backward: a kernel's operands are one device's rows and heads, and nothing is gathered."""
  case = Case(8 // tensor, 128, 8, 64, 64, 2, 64)
  arguments, weights = make(case, 'bfloat16')
  device = AbstractDevice('NVIDIA H200', 132, 'gpu')
  mesh = AbstractMesh((8 // tensor, tensor), ('data', 'tensor'), (AxisType.Auto,) * 2, abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    traced = _sharded(mesh, case, arguments, implementation='pallas_triton').trace(arguments, weights)
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
  kernels = [line.rpartition(' : ')[2] for line in text.splitlines() if 'triton' in line and 'custom_call' in line]
  heads, groups = 8 // tensor, math.lcm(2, tensor) // tensor
  assert len(kernels) >= 2
  for types in kernels:
    assert f'tensor<1x128x{heads}x64xbf16>' in types, types  # x or y
    assert f'tensor<1x128x{groups}x64xbf16>' in types, types  # B or C
    assert 'x128x8x64x' not in types, types
  for collective in ('all_gather', 'all_to_all', 'collective_permute'):
    assert collective not in text, collective


def _selective_scan_arguments(b, l, d, n, g, dtype):
  arguments, _ = make(Case(b, l, d, 1, n, g, 0), dtype, z=True)
  rng = np.random.default_rng(5)
  for name in ('x', 'z'):
    arguments[name] = arguments[name][..., 0]
  arguments['initial_state'] = arguments['initial_state'][:, :, 0]
  arguments['A'] = jnp.asarray(-np.exp(rng.uniform(0, np.log(8), (d, n))), jnp.float32)
  weights = np.asarray(jnp.asarray(rng.normal(size=(b, l, d)), dtype), np.float32), np.float32(rng.normal(size=(b, d, n)))
  return arguments, weights


MAMBA1 = [((2, 40, 24, 8, 2), 'float32'), ((1, 33, 4, 16, 1), 'bfloat16')]
MAMBA1_FULL = [((2, l, d, n, g), dtype) for l, d, n, g in ((128, 4, 8, 1), (1000, 768, 16, 2), (4096, 4, 16, 2), (4096, 768, 16, 1))
               for dtype in ('float32', 'bfloat16')]  # fmt: skip


@runs('scan', 'xla', 'pallas_triton', name='case', small=MAMBA1, full=MAMBA1_FULL)
def test_a13_the_selective_scan(run, case):
  """(batch, length, channels, state, groups), with D, the gate and both states."""
  sizes, dtype = case
  arguments, weights = _selective_scan_arguments(*sizes, dtype)

  @jax.jit
  def gradients(arguments):
    def loss(arguments):
      y, state = selective_scan(**arguments, implementation=run.implementation, interpret=run.interpret)
      return jnp.sum(weights[0] * y) + jnp.sum(weights[1] * state), (y, state)

    gradients, results = jax.grad(loss, has_aux=True)(arguments)
    return results, gradients

  check(gradients(arguments), oracle.selective_scan(arguments, weights), dtype)


def _norm_cases():
  for dtype in ('float32', 'float16'):
    for gate_first in (True, False):
      label = f'{dtype}-gate {"first" if gate_first else "last"}'
      yield pytest.param((2, 24, 4, 16), 2, dtype, gate_first, id=f'{label}-small')
      for heads in (32, 64):
        shape = (16, 1024, heads, 64)
        yield pytest.param(shape, heads, dtype, gate_first, id=f'{label}-{64 * heads}-full', marks=pytest.mark.gpu)


@pytest.mark.parametrize(('shape', 'groups', 'dtype', 'gate_first'), _norm_cases())
def test_a14_the_gated_norm(shape, groups, dtype, gate_first, assert_close):
  rng = np.random.default_rng(0)
  y, z, weights = (jnp.asarray(a, dtype) for a in rng.normal(size=(3, *shape)))
  scale = jnp.asarray(rng.normal(1, 0.3, shape[2:]), jnp.float32)

  @jax.jit
  def gradients(y, z, scale):
    out, pull = jax.vjp(lambda *a: gated_norm(*a, groups, 1e-5, gate_first=gate_first), y, z, scale)
    return out, pull(weights)

  want = oracle.gated_norm(y, z, scale, groups, 1e-5, gate_first, weights)
  assert_close(gradients(y, z, scale), want, *{'float32': (1e-5, None), 'float16': (1e-2, None)}[dtype])


@runs(*CHUNKED, name='length', small=(2048,), full=(32768,), interpreted=False)
def test_a15_no_error_that_grows_with_length(run, length):
  """bfloat16 activations, a state that remembers thousands of tokens: the error of y and of dx (which runs backwards)
  in each eighth of the sequence."""
  case = Case(1, length, 2, 64, 64, 1, 64) if run.full else Case(1, length, 2, 16, 16, 1, 64)
  arguments, weights = make(case, 'bfloat16', state=False)
  arguments |= {'A': jnp.asarray([-0.05, -0.01]), 'dt': 0.1 * arguments['dt']}
  got = differentiate(run, case.q, arguments, weights)
  want = oracle.ssd(arguments, weights)
  for name, a, b in (('y', got[0][0], want[0][0]), ('dx', got[1]['x'], want[1]['x'])):
    error = np.square(np.asarray(a, np.float64) - b).reshape(8, -1).mean(1)
    relative = np.sqrt(error / np.square(b).reshape(8, -1).mean(1))
    print(name, 'relative RMSE by eighths:', ' '.join(f'{e:.2e}' for e in relative))
    assert relative.max() < TOLERANCES['bfloat16'][0], name
    assert relative.max() < 1.5 * np.median(relative), name
