"""A pipeline gives the loss and the gradients of one device, and runs what its table says."""

import functools
import itertools
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec

from lmscale.config import MeshConfig
from lmscale.models import model
from lmscale.models.stacking import to_layers
from lmscale.parallel import zero
from lmscale.parallel.feed import batch_specs
from lmscale.parallel.gradients import make_gradients
from lmscale.parallel.layout import map_layout
from lmscale.parallel.mesh import MANUAL
from lmscale.parallel.pipeline.executor import run_pipeline
from lmscale.plan.collectives import count_runs, read_collectives, split_computations
from lmscale.train.program import Program
from lmscale.train.schedule import StepInputs

# Every stage of the hybrid has other layers: on two devices, on four, and with two stages a device.
PATTERNS = {'transformer': '*-*-*-*-', 'mamba': 'm' * 8, 'mamba2': 'M' * 8, 'hybrid': 'M-*MM*--'}
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
  config = tiny.config(mesh, _model(case, dtype), compute_dtype=dtype, **remat)
  return Program(config, jax.devices()[: mesh.size])


def _model(case, dtype):
  """Calmer in float32, in which sums in another order differ in the last digits of their largest terms."""
  return tiny.change(tiny.MODEL, pattern=PATTERNS[case['pattern']], tied=case['tied'], init_std=0.3 if dtype == 'float64' else 0.1)


class Whole(tiny.Rows):
  """One document a row, without padding."""

  def __init__(self):
    super().__init__()
    self.arrays['segment_ids'][:] = 1
    self.arrays['positions'][:] = np.arange(16)
    self.arrays['labels'][:] = np.roll(self.arrays['tokens'], -1, axis=1)


TESTS = os.pathsep.join([str(pathlib.Path(__file__).parents[1]), str(pathlib.Path(__file__).parents[2])])
ROWS = {'packed': tiny.Rows(), 'whole': Whole()}


def _batches(program):
  return {name: program.batch(StepInputs(0, 0, 16, 0, 1e-3), rows) for name, rows in ROWS.items()}


@functools.cache
def _untied_reference(pattern, dtype, tied, like):
  """{rows: (loss, count, gradients in canonical order)} of one device. tied: the head's matrix is that of the embedding, transposed."""
  program, gradients = _one_device(pattern, dtype, like)
  params = tiny.state(program).params
  if tied:
    params['head']['kernel'] = params['embed']['tokens'].T
  return {name: _host(program, *gradients(params, batch)) for name, batch in _batches(program).items()}


@functools.cache
def _one_device(pattern, dtype, like):
  config = tiny.config(model=_model({'pattern': pattern, 'tied': False}, like), compute_dtype=dtype, microbatch=16, remat='none')
  program = Program(config, jax.devices()[:1])
  return program, jax.jit(make_gradients(program.setup, _loss(program)))


def _reference(pattern, tied, dtype, like=None):
  """The same; the gradient of a matrix that is used twice is the sum of both. like: the dtype of the runs that it is for."""
  found = {}
  for rows, (loss, count, grads) in _untied_reference(pattern, dtype, tied, like or dtype).items():
    if tied:
      head = grads['head']['kernel']
      grads = {part: leaves for part, leaves in grads.items() if part != 'head'}
      grads['embed'] = {'tokens': grads['embed']['tokens'] + head.T}
    found[rows] = loss, count, grads
  return found


def _loss(program):
  return model.next_token_loss(program.config.model, program.config.train.loss_chunk)


def _host(program, grads, loss, count):
  # To the host as they lie: programs that pick rows, one beside the other on emulated devices, may wait for one another's threads.
  grads = jax.tree.map(np.asarray, grads)
  return float(loss), int(count), {**grads, 'layers': to_layers(grads['layers'], program.setup.stacking)}


def _check_float32(case, found, reference):
  """At most 1e-5 of a leaf's largest gradient, or twice what rounding alone does to it on one device."""
  exact = _exact(case['pattern'], case['tied'])
  for name, (loss, count, grads) in found.items():
    assert count == exact[name][1] and abs(loss - exact[name][0]) <= 1e-5 * abs(exact[name][0])
    rounding = tiny.errors(reference[name][2], exact[name][2])
    for leaf, error in tiny.errors(grads, exact[name][2]).items():
      assert error <= max(1e-5, 2 * rounding[leaf]), (case, leaf, error, rounding[leaf])


def _exact(pattern, tied):
  with jax.enable_x64(True):
    return _reference(pattern, tied, 'float64', 'float32')


def _check(case, found, reference, bound):
  loss, count, grads = found
  assert count == reference[1]
  assert abs(loss - reference[0]) <= bound * abs(reference[0])
  error, leaf = tiny.worst(grads, reference[2])
  assert error <= bound, (case, leaf, error)


@pytest.mark.parametrize('digits', COVER)
@pytest.mark.parametrize('dtype', ['float64', pytest.param('float32', marks=pytest.mark.scale)])
def test_pipeline_equals_one_device(digits, dtype):
  case = _case(digits)
  with jax.enable_x64(dtype == 'float64'):
    program, reference = _program(case, dtype), _reference(case['pattern'], case['tied'], dtype)
    state = tiny.state(program)
    with jax.set_mesh(program.mesh):
      gradients = jax.jit(make_gradients(program.setup, _loss(program)))
      found = {name: _host(program, *gradients(state.params, batch)) for name, batch in _batches(program).items()}
    if dtype == 'float32':
      return _check_float32(case, found, reference)
    for name, value in found.items():
      _check(case, value, reference[name], 1e-10)


SCALE = ('schedule', 'pattern', 'mesh', 'sequence', 'tied')
# A sequence is cut over `tensor`, where there is one.
POSSIBLE = [case for case in itertools.product(*(FACTORS[name] for name in SCALE)) if MESHES[case[2]][2] > 1 or not case[3]]


@pytest.mark.scale
@pytest.mark.parametrize('values', POSSIBLE, ids=lambda values: '-'.join(map(str, values)))
def test_all_pipelines_equal_one_device(values):
  """The product of everything; the four stages of ZeRO, which act before and after the loop, around one loop."""
  case = dict(zip(SCALE, values, strict=True)) | {'zero': 0, 'remat': 'full', 'vocab': False}
  with jax.enable_x64(True):
    _check_all_stages(case, _reference(case['pattern'], case['tied'], 'float64'))


def _check_all_stages(case, reference):
  programs = [_program(case | {'zero': stage}, 'float64') for stage in FACTORS['zero']]
  layouts = [program.setup.layout for program in programs]
  params = [tiny.state(program).params for program in programs]

  def local(params, batch):
    copies = [zero.gather_once(layout, p, np.float64) for layout, p in zip(layouts, params, strict=True)]
    differ = [jax.tree.map(lambda a, b: jax.numpy.any(a != b), copies[0], copy) for copy in copies[1:]]
    grads, sums = run_pipeline(programs[0].setup, _loss(programs[0]), copies[3], batch, trains=True)
    reduced = [zero.reduce_gradients(layout, grads, stage) for stage, layout in enumerate(layouts)]
    return reduced, *jax.lax.psum(sums[:2], MANUAL), jax.lax.psum(sum(jax.tree.leaves(differ)), MANUAL)

  stored = [map_layout(lambda leaf: leaf.manual, layout) for layout in layouts]
  whole = PartitionSpec()
  specs = batch_specs(programs[0].config)
  with jax.set_mesh(programs[0].mesh):
    mapped = jax.jit(jax.shard_map(
      local, in_specs=(stored, specs), out_specs=(stored, whole, whole, whole), axis_names=set(MANUAL), check_vma=False
    ))  # fmt: skip
    for name, batch in _batches(programs[0]).items():
      reduced, loss, count, differ = mapped(params, {key: batch[key] for key in specs})
      assert not differ
      for grads, program in zip(reduced, programs, strict=True):
        _check(case, _host(program, grads, loss, count), reference[name], 1e-10)


def _stage_program(schedule, microbatches, pattern='-*-*', **train):
  virtual = 2 if schedule == 'interleaved' else 1
  mesh = MeshConfig(2, 2, 1, 1, False, schedule, virtual)
  config = tiny.config(mesh, tiny.change(tiny.MODEL, pattern=pattern), batch=2 * microbatches, **train)
  return Program(config, jax.devices()[:4])


@pytest.mark.parametrize('schedule', ['1f1b', 'interleaved'])
def test_every_task_runs_once_and_one_reduction_follows(schedule):
  """Counted in the loop; and read in the program's text: no collective over `data` inside it, one round of messages."""
  program = _stage_program(schedule, 4)
  virtual = program.config.mesh.virtual

  def local(params, batch):
    grads, sums = run_pipeline(program.setup, _loss(program), zero.gather_once(program.setup.layout, params, np.float32), batch, True)
    return zero.reduce_gradients(program.setup.layout, grads, 1), sums.ran[None], jax.lax.psum(sums.loss, MANUAL)

  specs, params = batch_specs(program.config), tiny.state(program).params
  stored = map_layout(lambda leaf: leaf.manual, program.setup.layout)
  batch = program.batch(StepInputs(0, 0, 8, 0, 1e-3), tiny.Rows())
  batch = {key: batch[key] for key in specs}
  with jax.set_mesh(program.mesh):
    mapped = jax.shard_map(
      local, in_specs=(stored, specs), out_specs=(stored, PartitionSpec(MANUAL), PartitionSpec()), axis_names=set(MANUAL),
      check_vma=False,
    )  # fmt: skip
    compiled = jax.jit(mapped).lower(params, batch).compile()
    assert compiled(params, batch)[1].tolist() == [[4 * virtual, 4 * virtual]] * 4
    # A microbatch that is not finite makes the loss so, and everything ends.
    params['embed']['tokens'] = params['embed']['tokens'].at[int(batch['tokens'][1, 0, 0])].set(np.nan)
    assert np.isnan(compiled(params, batch)[2])
  found = read_collectives(compiled.as_text(), program.mesh)
  assert not [c for c in found if 'data' in c.axes and c.in_loop]
  assert [c for c in found if 'data' in c.axes]
  inside = [c for c in found if c.in_loop]
  assert {(c.kind, c.axes) for c in inside} == {('collective-permute', ('pipe',))}
  activation = 16 * 16  # of one sequence
  assert [c.elements for c in inside] == [activation, activation]
  assert set(_runs_of_the_head(compiled.as_text())) == {'sometimes'}


def _runs_of_the_head(text):
  """How the products with the head's matrix run: the compiler once did them on every device, before a loop of no turns."""
  computations = split_computations(text)
  runs = count_runs(computations, 1)
  product = re.compile(rf'\[\d+,{tiny.MODEL.vocab}\]\S* (dot|custom-call)\(')
  return ['sometimes' if runs[name].sometimes else 'always' for name, lines in computations.items() for line in lines if product.search(line)]


STRICT = pytest.param('1f1b_strict', True, marks=pytest.mark.scale)


@pytest.mark.parametrize('schedule,flat', [('1f1b', True), STRICT, ('interleaved', True), ('gpipe', False)])
def test_memory_does_not_grow_with_the_microbatches(schedule, flat):
  few, many = (
    _stage_program(schedule, m, '----', remat='selective').lower_step().compile().memory_analysis().temp_size_in_bytes for m in (8, 32)
  )
  assert (many <= 1.02 * few) is flat, (few, many)


@pytest.mark.scale
@pytest.mark.parametrize('vocab_on_pipe', [False, True])
def test_it_does_not_hang(vocab_on_pipe):
  """Stages and `tensor` together, two stages a device, in fresh processes: there emulated devices once waited for each other."""
  for _ in range(5):
    subprocess.run([sys.executable, '-c', STEPS, *['vocab'] * vocab_on_pipe], check=True, timeout=300, env=os.environ | {'PYTHONPATH': TESTS})


STEPS = """
import sys
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
import tiny
from lmscale.config import MeshConfig
from lmscale.train.program import Program
from lmscale.train.schedule import StepInputs
mesh = MeshConfig(2, 2, 2, 1, True, 'interleaved', 2, len(sys.argv) > 1)
program = Program(tiny.config(mesh, tiny.change(tiny.MODEL, pattern='M-*-')))
state, rows = tiny.state(program), tiny.Rows()
for step in range(20):
  state, metrics = program.step(state, program.batch(StepInputs(step, 0, 16, 0, 1e-3), rows))
assert metrics['ok'], metrics
"""
