"""The Mosaic GPU kernels: their code run by an emulator, their lowering for CUDA, and on a Hopper GPU themselves."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from kernels import mosaic_emulator, oracle
from kernels.heads import assert_heads_close

from lmscale.kernels import choice, proof
from lmscale.kernels.ssd import api
from lmscale.kernels.ssd.mosaic import entry, outer
from lmscale.kernels.ssd.scan import ssd_scan
from lmscale.kernels.ssd.xla import ssd_xla

NAMES = ('x', 'dt', 'A', 'B', 'C', 'D', 'initial_state')


def _inputs(b, l, h, g, n, *, p=64, dtype=jnp.float32, seed=0):
  """(x, dt, A, B, C, D, state) and the cotangents of (y, state). The last tokens are padding."""
  random = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(random.normal(size=shape), jnp.float32)

  dt = (jnp.abs(normal(b, l, h)) * 0.1).at[:, l - 7 :].set(0)
  x, B, C = (m.astype(dtype) for m in (normal(b, l, h, p), normal(b, l, g, n), normal(b, l, g, n)))
  arguments = (x, dt, -jnp.abs(normal(h)), B, C, normal(h), normal(b, h, p, n))
  return arguments, (normal(b, l, h, p).astype(dtype), normal(b, h, p, n))


def _documents(b, l):
  """Boundaries within a chunk, at a chunk's end, next to each other; and a document that spans chunks."""
  cuts = [[37, 64, 130, 131], [128, l - 12]]
  rows = [np.searchsorted(cuts[i % 2], np.arange(l), side='right') for i in range(b)]
  return jnp.asarray(np.stack(rows), jnp.int32)


def _run(implementation, document, arguments, cotangents):
  """(y, state) and the gradients by name. Jitted as one, with every array an argument."""

  @jax.jit
  def run(document, arguments, cotangents):
    def forward(*arguments):
      y, state = implementation(*arguments, document, 64)
      return y.astype(cotangents[0].dtype), state

    out, vjp = jax.vjp(forward, *arguments)
    return out, dict(zip(NAMES, vjp(cotangents), strict=True))

  return jax.block_until_ready(run(document, arguments, cotangents))


@pytest.fixture
def emulated(monkeypatch):
  """The kernels run in NumPy, in float32 too."""
  mosaic_emulator.install(monkeypatch)
  monkeypatch.setattr(entry, 'unsupported', lambda *_: None)


def _check_emulated(h, g, n):
  """Head by head, in float32: the first forgets everything within a token; in the second a strong decay or none."""
  b, l = 2, 192
  document = _documents(b, l)
  (x, dt, A, *rest), cotangents = _inputs(b, l, h, g, n)
  dt = dt.at[:, :, 0].mul(40).at[:, :, 1:2].set(jnp.where(jnp.arange(l) % 50 < 25, 6, 1e-3)[:, None])
  arguments = (x, dt, A.at[:2].set(-16), *rest)
  named, ids = dict(zip(NAMES, arguments, strict=True)), np.asarray(document) + 1
  assert_heads_close(
    _run(entry.ssd_pallas_mosaic, document, arguments, cotangents), oracle.ssd(named, cotangents, ids),
    dict.fromkeys(('y', 'state', *NAMES), 2e-6), oracle.terms(named, cotangents, ids),
    _run(ssd_scan, document, arguments, cotangents),
  )  # fmt: skip


def test_the_kernels_code_is_the_recurrence_and_its_gradient(emulated):
  _check_emulated(h=4, g=2, n=64)


@pytest.mark.slow
@pytest.mark.parametrize(('h', 'g', 'n'), [(3, 1, 64), (2, 2, 128), (8, 1, 128)])
def test_one_head_per_program_and_both_state_sizes(emulated, h, g, n):
  _check_emulated(h, g, n)


def test_sixteen_bit_operands_round_no_worse_than_the_inputs(emulated, assert_close):
  """One document, no mask for it; the first head forgets everything at every token."""
  (x, dt, A, *rest), cotangents = _inputs(1, 128, 2, 1, 64, dtype=jnp.bfloat16)
  arguments = (x, dt, A.at[0].set(-1e4), *rest)
  got = _run(entry.ssd_pallas_mosaic, None, arguments, cotangents)
  exact = jax.tree.map(lambda m: m.astype(jnp.float32), (arguments, cotangents))
  assert got[0][0].dtype == jnp.bfloat16 and got[1]['B'].dtype == jnp.bfloat16 and got[0][1].dtype == jnp.float32
  assert_close(got, _run(ssd_scan, None, *exact), 1e-2)


def test_lowers_for_cuda_with_the_shapes_of_one_device():
  """Without a GPU, on a mesh: three kernels, each with half the heads and groups, and nothing gathered."""
  b, l, h, p, g, n = 1, 128, 8, 64, 4, 128
  arguments, _ = jax.eval_shape(functools.partial(_inputs, b, l, h, g, n, dtype=jnp.bfloat16))
  document = jax.ShapeDtypeStruct((b, l), jnp.int32)

  def step(document, *arguments):
    out, vjp = jax.vjp(lambda *arguments: entry.ssd_pallas_mosaic(*arguments, document, 64), *arguments)
    return vjp(out)

  heads, one = PartitionSpec(None, None, 'tensor'), PartitionSpec('tensor')
  specs = (heads, heads, one, heads, heads, one, PartitionSpec(None, 'tensor'))
  mesh = jax.make_mesh((2,), ('tensor',), axis_types=(jax.sharding.AxisType.Auto,))
  local = jax.shard_map(step, mesh=mesh, in_specs=(PartitionSpec(), *specs), out_specs=specs, check_vma=False)
  text = jax.jit(local).trace(document, *arguments).lower(lowering_platforms=('cuda',)).as_text()
  calls = [line for line in text.splitlines() if 'custom_call @mosaic_gpu' in line]
  assert len(calls) == 3
  for call in calls:
    assert f'tensor<{b}x{l}x{h * p // 2}xbf16>' in call and f'tensor<{b}x{l}x{h * p}xbf16>' not in call
  assert not re.search('all_gather|all_to_all|collective_permute', text)


@pytest.mark.parametrize(
  ('change', 'reason'),
  [
    ({'dtype': jnp.float32}, 'x is float32; wgmma takes bfloat16 and float16'),
    ({'p': 32}, 'head_dim 32 and state 64 are not the 64 and 64 or 128'),
    ({'n': 96}, 'head_dim 64 and state 96 are not'),
    ({'chunk': 128}, 'chunk 128 is not 64'),
    ({'l': 100}, r'length 100 is not a multiple of 64: 100 % 64 = 36'),
    ({}, None),
  ],
)
def test_says_what_it_cannot_do(change, reason):
  size = {'b': 1, 'l': 128, 'h': 2, 'g': 1, 'n': 64, 'dtype': jnp.bfloat16, 'p': 64, 'chunk': 64} | change
  x = jax.ShapeDtypeStruct((size['b'], size['l'], size['h'], size['p']), size['dtype'])
  B = jax.ShapeDtypeStruct((size['b'], size['l'], size['g'], size['n']), size['dtype'])
  got = entry.unsupported(x, B, size['chunk'])
  assert (got is None) if reason is None else reason in got
  if reason is not None:
    with pytest.raises(ValueError, match='ssd: pallas_mosaic cannot do this'):
      entry.ssd_pallas_mosaic(x, None, None, B, B, None, None, None, size['chunk'])


def test_is_chosen_where_it_proved_itself_and_is_faster(monkeypatch):
  inputs = functools.partial(_inputs, 1, 64, 2, 1, 64, dtype=jnp.bfloat16)
  (x, _, _, B, _, _, _), _ = jax.eval_shape(inputs)
  monkeypatch.setattr(choice, 'nvidia', lambda: True)
  for verdict, best in ((proof.Verdict('', 0.1, 0.5), 'ssd_pallas_mosaic'), (proof.Verdict('y is off', 2.0), 'ssd_pallas_triton')):
    known = {'pallas_mosaic': verdict, 'pallas_triton': proof.Verdict('', 0.1, 1.0)}
    monkeypatch.setattr(proof, 'verdict', lambda op, name, dtype, known=known: known[name])
    assert api._choose(x, B, None, None, True, False)[0].func.__name__ == best


def test_heads_are_split_evenly_until_the_gpu_is_full():
  split = outer.split_heads
  assert split(16, 512) == 1 and split(80, 32) == 5 and split(80, 256) == 1 and split(3, 10) == 3
  for heads in (1, 6, 80):
    for programs in (1, 30, 131, 132):
      assert heads % split(heads, programs) == 0


# On a GPU ---------------------------------------------------------------------------------------------------------


def _hopper():
  if jax.default_backend() != 'gpu' or jax.devices()[0].compute_capability != '9.0':
    pytest.skip('needs a GPU of compute capability 9.0 (H100, H200)')


@pytest.mark.gpu
@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize(
  ('b', 'l', 'h', 'g', 'n', 'dtype'),
  [
    (1, 64, 1, 1, 64, jnp.bfloat16),
    (2, 192, 6, 2, 128, jnp.bfloat16),
    (1, 512, 8, 4, 128, jnp.float16),
    (2, 1024, 80, 1, 128, jnp.bfloat16),
    (1, 4096, 128, 8, 128, jnp.bfloat16),
  ],
)
def test_agrees_with_float32_on_a_gpu(assert_close, packed, b, l, h, g, n, dtype):
  """Two runs agree to the bit; y, the state and every gradient agree with the chunked float32 implementation."""
  _hopper()
  document = _documents(b, l) if packed else None
  arguments, cotangents = _inputs(b, l, h, g, n, dtype=dtype)
  got, again = (_run(entry.ssd_pallas_mosaic, document, arguments, cotangents) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, got, again)
  exact = jax.tree.map(lambda m: m.astype(jnp.float32), (arguments, cotangents))
  with jax.default_matmul_precision('highest'):
    want = _run(ssd_xla, document, *exact)
  assert_close(got, want, 2e-2, absolute=np.inf)


@pytest.mark.gpu
def test_no_gradient_crosses_a_document_on_a_gpu():
  """A cotangent in the second document alone gives exactly zero in the first."""
  _hopper()
  (x, *rest), (dy, dstate) = _inputs(1, 256, 4, 1, 128, dtype=jnp.bfloat16)
  document = jnp.asarray(np.arange(256)[None] >= 100, jnp.int32)
  dy = dy.at[:, :100].set(0)
  _, gradients = _run(entry.ssd_pallas_mosaic, document, (x, *rest), (dy, dstate))
  for name in ('x', 'dt', 'B', 'C'):
    assert not np.asarray(gradients[name][:, :100], np.float32).any(), name
  assert not np.asarray(gradients['initial_state']).any()
