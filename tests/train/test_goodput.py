"""Every second belongs to one kind, over all starts of a run."""

import json
import time

import jax
import jax.numpy as jnp
import pytest
from fake_program import FakeLoader, FakeProgram, lines, run

from lmscale.train import goodput as module
from lmscale.train import loop
from lmscale.train.goodput import KINDS, Goodput, process_start


class Time:
  """A clock that is set by hand."""

  def __init__(self, monkeypatch):
    self.now = 100.0
    monkeypatch.setattr(module.time, 'monotonic', lambda: self.now)


def test_kinds_sum_to_the_wall_time(monkeypatch):
  clock = Time(monkeypatch)
  ledger = Goodput(began=90.0)
  clock.now += 5
  with ledger.spent_on('steps'):
    clock.now += 20
    for _ in ledger.waiting(range(2)):
      clock.now += 1
    with pytest.raises(KeyError), ledger.spent_on('evaluation'):
      clock.now += 3
      raise KeyError
    clock.now += 4
  clock.now += 7
  seconds = ledger.seconds()
  assert sum(seconds.values()) == pytest.approx(clock.now - 90)
  assert {k: v for k, v in seconds.items() if v} == {'startup': 22, 'steps': 26, 'evaluation': 3}
  assert ledger.since_last('steps') == 26 and ledger.since_last('steps') == 0


def test_parts_of_a_compilation_are_counted_once(monkeypatch):
  clock = Time(monkeypatch)
  ledger = Goodput()
  listen = ledger._compiled._listen
  for now, event, seconds in (
    (103, 'jaxpr_trace_duration', 2),  # 101..103, within the next
    (105, 'jaxpr_trace_duration', 5),  # 100..105
    (109, 'backend_compile_duration', 3),  # 106..109
  ):
    clock.now = now
    listen(f'/jax/core/compile/{event}', seconds)
  listen('/jax/checkpoint/write/durations_sec', 50)
  clock.now = 110
  assert {k: v for k, v in ledger.seconds().items() if v} == {'startup': 2, 'compile': 8}


def test_real_compilations_are_seen_and_waiting_closes():
  ledger = Goodput()
  closed = []

  def items():
    try:
      time.sleep(0.05)
      yield 1
      yield 2
    finally:
      closed.append(True)

  with ledger.spent_on('steps'):
    jax.jit(lambda x: jnp.cumsum(jnp.sin(x) * 3.25))(jnp.ones(7))
    next(ledger.waiting(items()))
  seconds = ledger.seconds()
  assert closed and seconds['data_wait'] >= 0.05
  assert 0.001 < seconds['compile'] < sum(seconds.values())


def test_process_start_is_before_now():
  assert 0 < time.monotonic() - process_start() < 24 * 3600


def life(folder):
  return json.loads((folder / 'goodput.json').read_text())


class Killed(FakeProgram):
  """Ends as a process that is killed: at once, in step 9; 6 of its steps are in a checkpoint."""

  def step(self, state, batch):
    time.sleep(0.01)
    self.calls = getattr(self, 'calls', 0) + 1
    if self.calls == 9:
      raise SystemExit
    return super().step(state, batch)


def test_a_run_accounts_for_all_its_starts(tmp_path, capsys):
  with pytest.raises(SystemExit):
    run(tmp_path, program=Killed)
  first = lines(tmp_path, timings=True)
  assert all(set(line['seconds']) == set(KINDS) and line['data_wait'] >= 0 for line in first)
  before = time.monotonic()
  assert run(tmp_path, loader=FakeLoader(delay=0.05)) == loop.DONE
  wall = time.monotonic() - before
  record, told = life(tmp_path), capsys.readouterr().err
  assert record['step'] == 24 and record['starts'] == 2
  seconds = record['seconds']
  # What the second start used, and what the first had used at its last line.
  missing = wall + sum(first[-1]['seconds'].values()) - sum(seconds.values())  # around the loop, in this test
  assert 0 <= missing < 0.2 + 0.05 * wall
  repeated = first[-1]['seconds']['steps'] - first[5]['seconds']['steps']
  assert seconds['lost'] >= repeated > 0.01
  assert seconds['startup'] and seconds['compile'] and seconds['restore'] and seconds['saving'] and seconds['other']
  assert seconds['data_wait'] > 0.05
  after = lines(tmp_path, timings=True)
  assert after[-1]['seconds']['lost'] == pytest.approx(seconds['lost'], abs=0.01)
  assert sum(line['data_wait'] for line in after[7:]) == pytest.approx(
    after[-1]['seconds']['data_wait'] - after[6]['seconds']['data_wait'], abs=0.01
  )
  assert 'goodput ' in told and 'in 2 starts: ' in told and 'lost ' in told


def test_a_start_that_was_killed_before_its_first_line_is_not_forgotten(tmp_path):
  record = dict.fromkeys(KINDS, 0.0) | {'steps': 50.0, 'startup': 10.0}
  (tmp_path / 'goodput.json').write_text(json.dumps({'step': 5, 'starts': 3, 'seconds': record}))
  ledger = Goodput()
  ledger.resume(tmp_path, 5)
  assert ledger.since_last('steps') == 0  # counts this start only
  assert ledger.starts == 4 and ledger.seconds()['steps'] == 50 and ledger.seconds()['lost'] == 0
  again = Goodput()
  again.resume(tmp_path, 0)  # the checkpoint of step 5 was damaged and there is no other
  assert again.seconds()['steps'] == 0 and again.seconds()['lost'] == 50
  assert 60 <= sum(again.seconds().values()) < 61


@pytest.mark.parametrize('text', ['', '[]', '{"step": 1}', '{"step": "x", "starts": 1, "seconds": {}}', '[' * 100_000])
def test_a_record_that_cannot_be_read_is_no_reason_to_stop(tmp_path, text):
  (tmp_path / 'goodput.json').write_text(text)
  ledger = Goodput()
  ledger.resume(tmp_path, 0)
  assert ledger.starts == 1
