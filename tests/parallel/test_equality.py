"""Every layout gives the loss and the gradients of one device."""

import functools

import jax
import numpy as np
import pytest
import tiny

from lmscale.config import MeshConfig
from lmscale.models import model
from lmscale.models.stacking import to_layers
from lmscale.parallel.gradients import make_evaluate, make_gradients
from lmscale.train.program import Program
from lmscale.train.schedule import StepInputs

# Two and three groups, two KV heads: divided by tensor = 2, or not, or only in part.
MODELS = {
  'even': tiny.MODEL,
  'three groups': tiny.change(
    tiny.MODEL,
    pattern='M-',
    positions='none',
    tied=True,
    norm='layernorm1p',
    mamba2=tiny.change(tiny.MODEL.mamba2, heads=12, groups=3),
    attention=tiny.change(tiny.MODEL.attention, heads=4, kv_heads=4),
  ),
}
# (data, tensor, zero, sequence parallel, model)
LAYOUTS = [
  (8, 1, 0, False, 'even'),
  (8, 1, 1, False, 'even'),
  (8, 1, 2, False, 'even'),
  (8, 1, 3, False, 'even'),
  (1, 8, 0, False, 'even'),
  (1, 8, 0, True, 'even'),
  (4, 2, 0, False, 'even'),
  (4, 2, 1, True, 'even'),
  (2, 4, 2, False, 'even'),
  (2, 4, 2, True, 'even'),
  (4, 2, 3, False, 'even'),
  (2, 4, 3, True, 'even'),
  (4, 2, 1, False, 'three groups'),
  (2, 4, 3, True, 'three groups'),
]


@functools.cache
def _start(name, dtype):
  """The initial state of a model on one device, stacked, on the host."""
  config = tiny.config(model=MODELS[name], compute_dtype=dtype)
  with jax.enable_x64(dtype == 'float64'):
    program = Program(config, jax.devices()[:1])
    return jax.tree.map(np.asarray, tiny.state(program).params)


@functools.cache
def _result(data, tensor, zero, sequence_parallel, name, dtype, remat='full'):
  """(loss, gradients in canonical order) of one batch of 16 packed sequences."""
  mesh = MeshConfig(1, data, tensor, zero, sequence_parallel)
  # One device takes the batch whole; eight data ranks take two microbatches.
  config = tiny.config(mesh, MODELS[name], compute_dtype=dtype, remat=remat, microbatch=16 if data == 1 else 1)
  with jax.enable_x64(dtype == 'float64'):
    program = Program(config, jax.devices()[: mesh.size])
    head_loss = model.next_token_loss(config.model, config.train.loss_chunk)
    batch = program.batch(StepInputs(0, 0, 16, 0, 1e-3), tiny.Rows())
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state().params)
    params = jax.device_put(_start(name, dtype), shardings)
    with jax.set_mesh(program.mesh):
      grads, loss, count = jax.jit(make_gradients(program.setup, head_loss))(params, batch)
      if dtype == 'float32':
        np.testing.assert_allclose(jax.jit(make_evaluate(program.setup, head_loss))(params, batch)[0], loss, rtol=1e-5)
    assert int(count) == (tiny.Rows().batch(0, range(16))['labels'] >= 0).sum()
    grads = jax.tree.map(np.asarray, grads)  # to the host as they lie, see test_pipeline
    return float(loss), {**grads, 'layers': to_layers(grads['layers'], program.setup.stacking)}


# Every stage, `tensor` with and without the sequence, and groups that do not divide, at least once; the rest is a proof of scale.
QUICK = [LAYOUTS[i] for i in (3, 5, 7, 11, 12)]
CASES = [(layout, 'float64', 1e-10) for layout in QUICK]
CASES += [
  pytest.param(layout, dtype, bound, marks=pytest.mark.scale)
  for dtype, bound in (('float64', 1e-10), ('float32', 1e-5))
  for layout in LAYOUTS
  if dtype == 'float32' or layout not in QUICK
]


@pytest.mark.parametrize(
  'layout,dtype,bound', CASES, ids=lambda part: '-'.join(map(str, part)) if isinstance(part, tuple) else str(part)
)
def test_layout_equals_one_device(layout, dtype, bound):
  loss, grads = _result(*layout, dtype)
  reference_loss, reference = _result(1, 1, 0, False, layout[-1], dtype)
  assert abs(loss - reference_loss) <= bound * abs(reference_loss)
  error, leaf = tiny.worst(grads, reference)
  assert error <= bound, (leaf, error)


@pytest.mark.parametrize('remat', [pytest.param('none', marks=pytest.mark.scale), 'selective'])
def test_remat_changes_nothing_on_a_mesh(remat):
  loss, grads = _result(4, 2, 3, False, 'even', 'float64', remat)
  reference_loss, reference = _result(1, 1, 0, False, 'even', 'float64')
  assert abs(loss - reference_loss) <= 1e-10 * abs(reference_loss)
  error, leaf = tiny.worst(grads, reference)
  assert error <= 1e-10, (leaf, error)
