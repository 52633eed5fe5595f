"""Pipeline schedules: the papers' bubbles and counts, and a validator that sees every wrong cell."""

import ast
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.parallel.pipeline import schedule
from lmscale.parallel.pipeline.replay import in_flight, simulate, validate
from lmscale.parallel.pipeline.schedule import SCHEDULES, B, F, colour, make_table, pack
from lmscale.parallel.pipeline.table import COLUMNS, NOTHING, Table

SIZES = [(1, 1), (1, 4), (2, 1), (2, 3), (3, 7), (4, 3), (4, 8), (8, 16)]  # pipe, microbatches


def bubble(table: Table) -> float:
  """With a backward pass twice as long as the forward one."""
  return simulate(table, [1] * table.stages, [2] * table.stages).lockstep


@pytest.mark.parametrize('pipe,m', SIZES)
def test_bubbles_and_counts_of_one_stage_a_device(pipe, m):
  """arXiv 2104.04473, section 2.2, and its counts: m in flight under gpipe, at most pipe under 1F1B."""
  further = pipe - 1 - np.arange(pipe)
  gpipe, one, strict, forward = (make_table(name, pipe, m) for name in ('gpipe', '1f1b', '1f1b_strict', 'forward'))
  for table in (gpipe, one):
    assert bubble(table) == pytest.approx((pipe - 1) / m, abs=1e-12)
  assert one.ticks == m + 2 * (pipe - 1)
  assert gpipe.ticks == 2 * (m + pipe - 1) - 1
  assert forward.ticks == m + pipe - 1 and forward.slots == {'activation': int(pipe > 1), 'cotangent': 0, 'residual': 0}
  np.testing.assert_array_equal(in_flight(gpipe), m)
  np.testing.assert_array_equal(in_flight(one), np.minimum(2 * further + 1, m))
  np.testing.assert_array_equal(in_flight(strict), np.minimum(further + 1, m))
  np.testing.assert_array_equal(in_flight(forward), 0)
  assert simulate(strict, [1] * pipe, [2] * pipe).asynchronous == pytest.approx((pipe - 1) / m, abs=1e-12)
  for table in (gpipe, one, strict):
    assert table.slots['residual'] == in_flight(table).max()


@pytest.mark.parametrize('pipe,m,lockstep', [(4, 8, 0.667), (4, 16, 0.5), (4, 32, 0.417), (8, 8, 1.167), (8, 32, 0.542)])
def test_one_task_a_tick_costs_a_third_more(pipe, m, lockstep):
  """Neighbours do F and B in turns: every tick takes a B = 2, but for the first `pipe`, in which nobody has one."""
  table = make_table('1f1b_strict', pipe, m)
  assert table.ticks == 2 * (m + pipe - 1)
  assert bubble(table) == pytest.approx((4 * (m + pipe - 1) - pipe) / (3 * m) - 1, abs=1e-12)
  assert bubble(table) == pytest.approx(lockstep, abs=5e-4)


@pytest.mark.parametrize('pipe,m,virtual', [(1, 3, 2), (2, 2, 2), (2, 6, 3), (3, 6, 2), (4, 8, 2), (4, 32, 4), (8, 16, 2)])
def test_interleaved(pipe, m, virtual):
  """Bubble / virtual; in flight p (1 + (p - 1) / (p v)) microbatches' worth of activations on the first device (same section)."""
  table = make_table('interleaved', pipe, m, virtual)
  assert bubble(table) == pytest.approx((pipe - 1) / (virtual * m), abs=1e-12)
  assert table.ticks == m * virtual + virtual * pipe + pipe - 2
  held = in_flight(table, [1 / virtual] * table.stages)
  if m >= 2 * pipe:
    assert held[0] == pytest.approx(pipe * (1 + (pipe - 1) / (pipe * virtual)))
  sent = [(make.column('receive_activation') != NOTHING).sum() for make in (table, make_table('1f1b', pipe, m))]
  assert sent == [m * (pipe * virtual - 1), m * (pipe - 1)]  # messages: about virtual times as many


def test_what_no_schedule_can_do():
  with pytest.raises(ValueError, match='interleaved: 6 microbatches are not a multiple of 4 devices'):
    make_table('interleaved', 4, 6, 2)
  with pytest.raises(ValueError, match="'zb' is not one of gpipe, 1f1b, 1f1b_strict, interleaved, forward"):
    make_table('zb', 4, 8)


def test_columns_of_the_published_comparison():
  """arXiv 2401.10241, table 2 and 2104.04473: bubble in time and peak activations of one microbatch on one device, p=4, m=12."""
  p, m, v, forward, backward = 4, 12, 2, 1.0, 1.7
  work = m * (forward + backward)
  for name, virtual, peak in (('gpipe', 1, m), ('1f1b_strict', 1, p), ('1f1b', 1, 2 * p - 1), ('interleaved', v, 5.5)):
    table = make_table(name, p, m, virtual)
    timing = simulate(table, [forward / virtual] * p * virtual, [backward / virtual] * p * virtual)
    assert timing.asynchronous * work == pytest.approx((p - 1) * (forward + backward) / virtual)
    assert in_flight(table, [1 / virtual] * p * virtual).max() == peak


def test_unequal_stages_wait_for_the_slowest():
  table = make_table('1f1b', 2, 2)
  timing = simulate(table, [1, 3], [2, 6])  # ticks: F0; F0 F1 B1; F1 B1 B0; B0
  assert timing.lockstep == pytest.approx((1 + 9 + 9 + 2) / 12 - 1)
  assert timing.asynchronous == pytest.approx((1 + 9 + 9 + 2) / 12 - 1)


@given(st.sampled_from(SCHEDULES), st.integers(1, 6), st.integers(1, 12), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_every_table_is_whole(name, pipe, m, virtual):
  """Each task once, whatever the sizes; as many slots as the most that wait."""
  m = m * pipe if name == 'interleaved' else m
  virtual = virtual if name in ('interleaved', 'forward') else 1
  table = make_table(name, pipe, m, virtual)
  validate(table)
  for phase in ('forward', 'backward')[: 1 + table.trains]:
    stage = table.stage(phase)
    tasks = stage * m + table.column(f'{phase}_microbatch')
    assert sorted(tasks[stage != NOTHING]) == list(range(table.stages * m))
  assert table.cells.dtype == np.int32
  assert table.slots['residual'] == in_flight(table).max()


TABLES = [make_table(*sizes) for sizes in (
  ('gpipe', 2, 3), ('1f1b', 3, 5), ('1f1b_strict', 3, 4), ('interleaved', 2, 4, 2), ('forward', 3, 3), ('forward', 2, 3, 2)
)]  # fmt: skip


@given(st.sampled_from(TABLES), st.data())
@settings(max_examples=300, deadline=None)
def test_any_changed_cell_is_found(table, data):
  where = tuple(data.draw(st.integers(0, size - 1)) for size in table.cells.shape)
  value = data.draw(st.integers(-2, 6).filter(lambda v: v != table.cells[where]))
  cells = table.cells.copy()
  cells[where] = value
  with pytest.raises(ValueError, match='tick|never'):
    validate(table._replace(cells=cells))


@given(st.sampled_from(TABLES), st.data())
@settings(max_examples=100, deadline=None)
def test_ticks_lost_doubled_or_exchanged_are_found(table, data):
  rows = list(range(table.ticks))
  tick = data.draw(st.sampled_from(rows))
  other = data.draw(st.sampled_from([t for t in rows if t != tick]))
  kind = data.draw(st.sampled_from(['lost', 'doubled', 'exchanged']))
  rows = {
    'lost': rows[:tick] + rows[tick + 1 :],
    'doubled': rows[:tick] + [tick] + rows[tick:],
    'exchanged': [other if t == tick else tick if t == other else t for t in rows],
  }[kind]
  with pytest.raises(ValueError, match='tick|never'):
    validate(table._replace(cells=table.cells[rows]))


def changed(table: Table, tick: int, device: int, **cells: int) -> Table:
  new = table.cells.copy()
  for name, value in cells.items():
    new[tick, device, COLUMNS.index(name)] = value
  return table._replace(cells=new)


def test_what_is_wrong_is_said():
  """1f1b, pipe 2, 3 microbatches: F00 | F01 F10 B10 | F02 F11 B11 B00 | F12 B12 B01 | B02."""
  table = make_table('1f1b', 2, 3)
  cases = [
    (changed(table, 1, 0, forward_microbatch=0), 'tick 1, device 0: forward of stage 0, microbatch 0 runs twice'),
    (table._replace(cells=table.cells[:0]), '12 tasks never run'),
    (changed(table, 0, 1, receive_activation=NOTHING), 'tick 0, device 1: nobody receives the activation of stage 1, microbatch 0'),
    (changed(table, 0, 0, receive_activation=0), 'tick 0, device 0: slot 0 waits for a activation that nobody sends'),
    (changed(table, 1, 0, forward_residual=0), r'residual slot 0 is overwritten while it holds \(0, 0\)'),
    (changed(table, 1, 1, forward_activation=NOTHING), r'activation slot -1 holds None, expected is .* \(1, 0\)'),
    (table._replace(cells=table.cells[[1, 0, 2, 3, 4]]), r'tick 0, device 1: activation slot 0 holds nothing, expected .* \(1, 0\)'),
    (changed(table, 0, 0, forward_chunk=1), 'forward of chunk 1, microbatch 0: there is no such task'),
    (changed(table, 0, 1, backward_residual=0), 'no backward task, but a part of one'),
    (table._replace(slots=table.slots | {'residual': 2}), 'residual slot 2 of 2'),
    (
      changed(make_table('forward', 2, 3), 3, 0, backward_chunk=0, backward_microbatch=0),
      'tick 3, device 0: a backward task in a forward table',
    ),
    (make_table('forward', 2, 3)._replace(cells=table.cells), 'a residual is kept though nothing goes backward'),
  ]
  for wrong, message in cases:
    with pytest.raises(ValueError, match=message):
      validate(wrong)


def test_a_device_that_does_the_work_of_another_is_found():
  for table in TABLES:
    with pytest.raises(ValueError):
      validate(table._replace(cells=table.cells[:, ::-1]))


def test_orders_that_wait_for_each_other():
  order = np.array([[(F, 0, 0), (B, 0, 0), (F, 0, 1), (B, 0, 1)], [(F, 1, 0), (F, 1, 1), (B, 1, 1), (B, 1, 0)]])
  with pytest.raises(ValueError, match='the orders deadlock in tick 2: every device waits for another'):
    pack(order)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), max_size=25))
@settings(max_examples=100, deadline=None)
def test_colouring_is_right_and_least(intervals):
  first, length = np.array(intervals, int).reshape(-1, 2).T
  slot = colour(first, first + length)
  for t in range(43):
    alive = slot[(first <= t) & (t <= first + length)]
    assert len(set(alive)) == len(alive)
  most = max(((first <= t) & (t <= first + length)).sum() for t in range(43))
  assert len(set(slot)) == most and slot.max(initial=-1) == most - 1


def test_numpy_alone():
  folder = pathlib.Path(schedule.__file__).parent
  names = {
    node.module for name in ('schedule', 'stages', 'table', 'replay')
    for node in ast.walk(ast.parse((folder / f'{name}.py').read_text())) if isinstance(node, ast.ImportFrom)
  }  # fmt: skip
  assert not [name for name in names if name.split('.')[0] in ('jax', 'flax')]
