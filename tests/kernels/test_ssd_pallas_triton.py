"""The Pallas Triton SSD: interpreted on the CPU against 'scan' in float64, and lowered for CUDA."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from lmscale.kernels.ssd import ssd

H200 = AbstractMesh((1,), ('device',), axis_types=(jax.sharding.AxisType.Auto,),
                    abstract_device=AbstractDevice('NVIDIA H200', 132, 'gpu'))  # fmt: skip
# One row that fills its chunks and ends a document inside one and at the end of another; one with all kinds of padding.
SEGMENTS = np.array([
  [1] * 9 + [2] * 7 + [3] * 34 + [0] * 1,
  [0] * 3 + [4] * 20 + [0] * 2 + [4] * 2 + [6] * 1 + [7] * 22 + [0] * 1,
])  # fmt: skip


def make(seed=0, b=2, l=51, h=4, p=5, g=2, n=6, dtype=np.float64):
  """A dict of all arguments but the segments; dt, A, D and the state stay in the accumulator's dtype."""
  rng = np.random.default_rng(seed)
  shapes = {'x': (b, l, h, p), 'B': (b, l, g, n), 'C': (b, l, g, n), 'D': (h,), 'initial_state': (b, h, p, n)}
  arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}
  arrays |= {'dt': np.exp(rng.normal(-1, 1, (b, l, h))), 'A': -np.exp(rng.normal(0, 1, h))}
  wide = np.float64 if dtype == np.float64 else np.float32
  return {k: jnp.asarray(v, dtype if k in ('x', 'B', 'C') else wide) for k, v in arrays.items()}


def double(arguments):
  return jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), arguments)


@functools.partial(jax.jit, static_argnames=('implementation', 'chunk'))
def run(arguments, segment_ids=None, implementation='pallas_triton', chunk=16):
  interpret = implementation == 'pallas_triton'
  return ssd(**arguments, segment_ids=segment_ids, implementation=implementation, chunk=chunk, interpret=interpret)


CASES = {
  'odd sizes, packed': ({}, SEGMENTS, np.float32, 1e-5),
  'groups = heads, chunk 64': ({'h': 2, 'l': 64}, None, np.float32, 1e-5),
  'bfloat16, one group, packed': ({'g': 1, 'p': 16, 'n': 16}, SEGMENTS, jnp.bfloat16, 5e-3),
}


@pytest.mark.parametrize('case', CASES)
def test_matches_scan(case, assert_close):
  shapes, segments, dtype, bound = CASES[case]
  arguments = make(**shapes, dtype=dtype)
  got = run(arguments, segments)
  assert got[0].dtype == dtype
  with jax.enable_x64(True):
    want = run(double(arguments), segments, 'scan')
  assert_close(got, want, bound)


def lower(function, *shapes):
  """The text of the function lowered for CUDA; JAX 0.11 needs to be told of a device."""
  arguments = [shape and jax.ShapeDtypeStruct(*shape) for shape in shapes]
  with use_abstract_mesh(H200), warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'The Pallas Triton backend is deprecated', DeprecationWarning)
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=('cuda',)).as_text()


@pytest.mark.parametrize('shape', [(1, 4096, 128, 64, 8, 128), (1, 100, 3, 36, 3, 20), (1, 64, 2, 128, 1, 256)])
def test_lowers_for_cuda(shape):
  b, l, h, p, g, n = shape
  bc, head = ((b, l, g, n), jnp.bfloat16), ((h,), jnp.float32)
  arguments = ((b, l, h, p), jnp.bfloat16), ((b, l, h), jnp.float32), head, bc, bc, head, ((b, l), jnp.int32)

  def forward(x, dt, A, B, C, D, segment_ids):
    return ssd(x, dt, A, B, C, D=D, segment_ids=segment_ids, implementation='pallas_triton')

  text = lower(forward, *arguments)
  assert '__gpu$xla.gpu.triton' in text
