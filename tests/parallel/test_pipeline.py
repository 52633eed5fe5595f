"""A pipeline gives the loss and the gradients of one device, and runs what its table says."""

import functools
import itertools

import jax
import numpy as np
import pytest
import tiny

from lmscale.config import MeshConfig
from lmscale.models import model
from lmscale.models.stacking import to_layers
from lmscale.parallel.gradients import make_gradients
from lmscale.train.program import Program
from lmscale.train.schedule import StepInputs

# Every stage of the hybrid has other layers: on two devices, on four, and with two stages a device.
PATTERNS = {'transformer': '*-*-*-*-', 'mamba': 'm' * 8, 'mamba2': 'M-M-M-M-', 'hybrid': 'M-*MM*--'}
MESHES = {'pipe': (4, 1, 1), 'pipe data': (2, 4, 1), 'pipe tensor': (4, 1, 2), 'all': (2, 2, 2)}
FACTORS = {
  'schedule': ('gpipe', '1f1b', '1f1b_strict', 'interleaved'),
  'pattern': tuple(PATTERNS),
  'mesh': tuple(MESHES),
  'zero': (0, 1, 2, 3),
  'remat': ('full', 'selective', 'none', 'part'),  # part: one microbatch of those in flight is stored
  'sequence': (False, True),
  'tied': (False, True),
  'vocab': (False, True),
}
# Any two values of any two factors meet, the sequence cut over `tensor` where there is one.
COVER = ['00000000', '01123000', '02231101', '03312111', '10111010', '11032010', '12320001', '13203111', '20222100', '21301110', '22013001', '23130001', '30333001', '31210111', '32102010', '33021010', '30200010']


def _case(digits):
  return {name: values[int(digit)] for (name, values), digit in zip(FACTORS.items(), digits, strict=True)}


def test_the_cases_cover_all_pairs():
  cases = [_case(digits) for digits in COVER]
  for a, b in itertools.combinations(FACTORS, 2):
    wanted = {(x, y) for x in FACTORS[a] for y in FACTORS[b]}
    if (a, b) == ('mesh', 'sequence'):
      wanted -= {('pipe', True), ('pipe data', True)}
    assert wanted <= {(case[a], case[b]) for case in cases}, (a, b)


def _program(case, dtype):
  pipe, data, tensor = MESHES[case['mesh']]
  virtual = 2 if case['schedule'] == 'interleaved' else 1
  mesh = MeshConfig(pipe, data, tensor, case['zero'], case['sequence'], case['schedule'], virtual, case['vocab'])
  part = case['remat'] == 'part'
  remat = {'remat': 'full' if part else case['remat'], 'stored_microbatches': int(part)}
  config = tiny.config(mesh, _model(case), compute_dtype=dtype, **remat)
  return Program(config, jax.devices()[: mesh.size])


def _model(case):
  return tiny.change(tiny.MODEL, pattern=PATTERNS[case['pattern']], tied=case['tied'])


class Whole(tiny.Rows):
  """One document a row, without padding."""

  def __init__(self):
    super().__init__()
    self.arrays['segment_ids'][:] = 1
    self.arrays['positions'][:] = np.arange(16)
    self.arrays['labels'][:] = np.roll(self.arrays['tokens'], -1, axis=1)


ROWS = {'packed': tiny.Rows(), 'whole': Whole()}


def _batches(program):
  return {name: program.batch(StepInputs(0, 0, 16, 0, 1e-3), rows) for name, rows in ROWS.items()}


@functools.cache
def _reference(pattern, tied, dtype):
  """{rows: (loss, count, gradients in canonical order)} of one device, and the parameters in canonical order."""
  config = tiny.config(model=_model({'pattern': pattern, 'tied': tied}), compute_dtype=dtype, microbatch=16)
  program = Program(config, jax.devices()[:1])
  gradients = jax.jit(make_gradients(program.setup, _loss(program)))
  params = program.init().params
  return {name: _host(program, *gradients(params, batch)) for name, batch in _batches(program).items()}


def _loss(program):
  return model.next_token_loss(program.config.model, program.config.train.loss_chunk)


def _host(program, grads, loss, count):
  grads = {**grads, 'layers': to_layers(grads['layers'], program.setup.stacking)}
  return float(loss), int(count), jax.tree.map(np.asarray, grads)


def _check(case, found, reference, bound):
  loss, count, grads = found
  assert count == reference[1]
  assert abs(loss - reference[0]) <= bound * abs(reference[0])
  error, leaf = tiny.worst(grads, reference[2])
  assert error <= bound, (case, leaf, error)


@pytest.mark.parametrize('digits', COVER)
def test_pipeline_equals_one_device(digits):
  case = _case(digits)
  with jax.enable_x64(True):
    program, reference = _program(case, 'float64'), _reference(case['pattern'], case['tied'], 'float64')
    state = program.init()
    with jax.set_mesh(program.mesh):
      gradients = jax.jit(make_gradients(program.setup, _loss(program)))
      for name, batch in _batches(program).items():
        _check(case, _host(program, *gradients(state.params, batch)), reference[name], 1e-10)
