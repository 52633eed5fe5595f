"""The single-token SSD update against a NumPy recurrence in float64, both implementations: output and state, pools."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from lmscale.kernels.ssd import ssd
from lmscale.kernels.ssd_update import ssd_update

SLOTS = np.array([5, 0, 3], np.int32)
TOLERANCES = {'float32': (3e-4, 1e-3), 'bfloat16': (1e-2, 5e-2)}  # relative, absolute


def make(b=3, h=4, p=8, g=2, n=16, rows=None, dtype=np.float32, channels=False):
  rng = np.random.default_rng(0)
  shapes = {'state': (rows or b, h, p, n), 'x': (b, h, p), 'B': (b, g, n), 'C': (b, g, n), 'z': (b, h, p),
            'D': (h, p) if channels else (h,)}  # fmt: skip
  arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}
  arrays['C'] /= np.sqrt(n)  # outputs of order 1, as the absolute tolerances suppose
  arrays = {name: jnp.asarray(array, dtype) for name, array in arrays.items()}
  arrays['dt'] = jnp.asarray(np.exp(rng.normal(-1, 1, (b, h))), jnp.float32)
  arrays['A'] = jnp.asarray(-np.exp(rng.normal(0, 1, h)), jnp.float32)
  return arrays


def recurrence(state, x, dt, A, B, C, D, z, slots=None):
  """The definition in NumPy, float64, one row and head at a time."""
  state, y = np.array(state, np.float64), np.zeros(x.shape)
  for row in range(x.shape[0]):
    place = row if slots is None else slots[row]
    for i in range(x.shape[1]):
      group = i // (x.shape[1] // B.shape[1])
      new = np.exp(dt[row, i] * A[i]) * state[place, i] + dt[row, i] * np.outer(x[row, i], B[row, group])
      state[place, i] = new
      y[row, i] = (new @ C[row, group] + D[i] * x[row, i]) * z[row, i] / (1 + np.exp(-z[row, i]))
  return y, state


@functools.partial(jax.jit, static_argnames='implementation')
def run(arguments, slots=None, implementation='xla'):
  interpret = implementation == 'pallas_triton'
  return ssd_update(**arguments, slots=slots, implementation=implementation, interpret=interpret)


SHAPES = {
  'slots': {'rows': 7},
  'ragged, D per channel': {'p': 5, 'n': 12, 'g': 4, 'channels': True},
  'parts': {'b': 1, 'h': 2, 'p': 80, 'n': 128, 'g': 1},
}


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('dtype', TOLERANCES)
@pytest.mark.parametrize('implementation', ['xla', 'pallas_triton'])
def test_matches_recurrence(implementation, dtype, shape, assert_close):
  arguments = make(**SHAPES[shape], dtype=dtype)
  slots = SLOTS if shape == 'slots' else None
  y, state = run(arguments, slots, implementation)
  assert (y.dtype, state.dtype) == (np.dtype(dtype), np.dtype(dtype))
  want = recurrence(**{name: np.asarray(a, np.float64) for name, a in arguments.items()}, slots=slots)
  assert_close((y, state), want, *TOLERANCES[dtype])


@pytest.mark.parametrize('implementation', ['xla', 'pallas_triton'])
def test_other_slots_are_untouched_and_idle_rows_store_nothing(implementation):
  arguments = make(b=4, rows=7)
  slots = np.array([5, -1, 7, 0], np.int32)  # -1 and 7 are outside the pool
  _, state = run(arguments, slots, implementation)
  before, after = np.asarray(arguments['state']), np.asarray(state)
  changed = np.any(before != after, axis=(1, 2, 3))
  assert list(np.flatnonzero(changed)) == [0, 5]
  fresh = arguments | {'state': jnp.zeros_like(arguments['state'])}
  np.testing.assert_array_equal(
    run(arguments, slots, implementation)[0][1:3], run(fresh, slots, implementation)[0][1:3]
  )


@pytest.mark.parametrize('implementation', ['xla', 'pallas_triton'])
def test_float32_state_with_bfloat16_inputs_stays_float32(implementation, assert_close):
  arguments = make(rows=7, dtype=jnp.bfloat16) | {'state': make(rows=7)['state']}
  y, state = run(arguments, SLOTS, implementation)
  assert (y.dtype, state.dtype) == (jnp.bfloat16, np.float32)
  want = recurrence(**{name: np.asarray(a, np.float64) for name, a in arguments.items()}, slots=SLOTS)
  assert_close(state, want[1], 1e-6)
  assert_close(y, want[0], *TOLERANCES['bfloat16'])


def test_pallas_gradient_is_that_of_the_scan(assert_close):
  """Through `ssd` with one token, which takes the update; 'scan' does not."""
  arguments = make()
  one = {name: arguments[name][:, None] for name in ('x', 'dt', 'B', 'C', 'z')}
  one |= {'A': arguments['A'], 'D': arguments['D'], 'initial_state': arguments['state']}

  @functools.partial(jax.jit, static_argnames='implementation')
  def gradient(one, implementation):
    def loss(one):
      y, state = ssd(**one, implementation=implementation, interpret=implementation == 'pallas_triton')
      return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(state))

    return jax.value_and_grad(loss)(one)

  want = gradient(one, 'scan')
  for implementation in ('xla', 'pallas_triton'):
    assert_close(gradient(one, implementation), want, 1e-5)


def lowered(**shapes):
  """The kernel's CUDA program for shapes that exist nowhere."""
  arguments = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in jax.eval_shape(lambda: make(b=2)).items()}
  arguments |= {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
  arguments['slots'] = jax.ShapeDtypeStruct(arguments['x'].shape[:1], np.int32)
  function = jax.jit(functools.partial(ssd_update, implementation='pallas_triton'), donate_argnames='state')
  device = AbstractDevice('NVIDIA H200', 132, 'gpu')
  with use_abstract_mesh(AbstractMesh((1,), ('x',), abstract_device=device)):
    return function.trace(**arguments).lower(lowering_platforms=('cuda',)).as_text()


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_lowers_for_cuda_in_place_and_beyond_2_to_31_elements():
  h, p, n, pool = 128, 64, 128, 4096  # 2^32 elements
  text = lowered(
    state=(pool, h, p, n), x=(2, h, p), dt=(2, h), A=(h,), B=(2, 8, n), C=(2, 8, n), D=(h,), z=(2, h, p)
  )
  assert text.count('custom_call @__gpu$xla.gpu.triton') == 1
  assert 'output_operand_alias' in text


def test_errors_are_one_clear_line():
  arguments = make()
  with pytest.raises(ValueError, match="implementation 'cuda' is unknown; choose one of xla, pallas_triton"):
    ssd_update(**arguments, implementation='cuda')
  with pytest.raises(ValueError, match="interpret=True is for implementation 'pallas_triton', not 'xla'"):
    ssd_update(**arguments, implementation='xla', interpret=True)
  with pytest.raises(ValueError, match='4 heads .* do not divide into 3 groups'):
    ssd_update(**make(g=3))
  with pytest.raises(ValueError, match=r'slots has shape \(2,\)'):
    ssd_update(**arguments, slots=SLOTS[:2])
  with pytest.raises(ValueError, match='state has shape'):
    ssd_update(**arguments | {'state': arguments['state'][:2]})
  with jax.enable_x64(True), pytest.raises(ValueError, match='state is float64; the kernel has float32'):
    ssd_update(**make(dtype=np.float64), implementation='pallas_triton')
