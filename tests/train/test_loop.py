"""The loop on a fake program: order, resume, what is logged, how it stops."""

import itertools
import math
import os
import signal
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_program import CONFIG, SIZE, FakeLoader, FakeProgram, lines, run, stored

from lmscale import config as config_lib
from lmscale.errors import ConfigError
from lmscale.train import loop
from lmscale.train.checkpoint import Checkpointer
from lmscale.train.schedule import Schedule


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """An uninterrupted run."""
  folder = tmp_path_factory.mktemp('whole')
  assert run(folder, reference=2.0) == loop.DONE
  return folder


class StopAfter(FakeProgram):
  """Sends itself a signal while step `at` (from 0) is dispatched."""

  at = 10
  number = signal.SIGTERM

  def step(self, state, batch):
    self.calls = getattr(self, 'calls', 0) + 1
    if self.calls == self.at + 1:
      os.kill(os.getpid(), self.number)
    return super().step(state, batch)


def test_a_run_leaves_everything(whole):
  names = {p.name for p in whole.iterdir()}
  assert names >= {'config.json', 'environment.json', 'metrics.jsonl', 'samples.txt', 'loss.svg', 'checkpoints'}
  assert (whole / 'tensorboard').is_dir()
  assert sorted(int(p.name) for p in (whole / 'checkpoints').iterdir()) == [21, 24]
  assert stored(whole)[1] == {
    'step': 24, 'samples': 82, 'tokens': 82 * SIZE, 'data': {'name': 'fake', 'files': [1, 2]}, 'config': config_lib.to_dict(CONFIG),
  }  # fmt: skip
  text = (whole / 'samples.txt').read_text()
  assert text == '=== step 10 ===\ndef 10104\n\n=== step 20 ===\ndef 20204\n\n=== step 24 ===\ndef 24244\n\n'


def test_lines(whole):
  schedule, found = Schedule(CONFIG), lines(whole, timings=True)
  assert [line['step'] for line in found] == list(range(1, 25))
  for line in found:
    plan = schedule.inputs(line['step'] - 1)
    assert line['tokens'] == (plan.first_sample + plan.batch) * SIZE
    assert line['learning_rate'] == plan.learning_rate
    assert line['tokens_per_second'] > 0 and line['grad_norm'] > 0
  assert [line['step'] for line in found if 'val_loss' in line] == [7, 14, 21, 24]
  last = found[-1]
  assert last['val_bits_per_byte'] == last['val_loss'] / math.log(2) / 2  # the fake's two bytes a token
  assert last['val_loss'] < found[6]['val_loss'] and last['tokens'] == schedule.total_tokens


def test_bits_per_byte_are_null_where_the_texts_are_not_known():
  said = []
  run = types.SimpleNamespace(
    config=CONFIG,
    program=types.SimpleNamespace(evaluate=lambda *_: (1.5, 3)),
    val_loader=types.SimpleNamespace(bytes_per_token=lambda samples: None),
    console=types.SimpleNamespace(say=said.append),
  )
  assert loop.Run.evaluate(run, None, 7) == {'val_loss': 1.5, 'val_bits_per_byte': None}
  assert said == ['step 7: validation loss 1.5000']


def test_a_complete_run_says_so(whole, capsys):
  before = (whole / 'metrics.jsonl').read_bytes()
  assert run(whole) == loop.DONE
  err = capsys.readouterr().err
  assert 'complete' in err and 'step 24 of 24' in err and 'files in' in err
  assert (whole / 'metrics.jsonl').read_bytes() == before


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_one_signal_saves_and_the_run_goes_on(tmp_path, whole, number, capfd):
  program = type('Stop', (StopAfter,), {'number': number})
  before = signal.getsignal(number)
  assert run(tmp_path, program=program) == loop.AGAIN == 75
  assert signal.getsignal(number) == before
  assert stored(tmp_path)[1]['step'] == 11  # between two checkpoints
  assert number.name in capfd.readouterr().err
  assert run(tmp_path) == loop.DONE
  assert stored(tmp_path, 24) == stored(whole, 24)
  assert lines(tmp_path) == lines(whole)
  assert (tmp_path / 'samples.txt').read_text() == (whole / 'samples.txt').read_text()


def test_a_signal_in_the_last_step_is_a_finished_run(tmp_path):
  assert run(tmp_path, {'train.steps': 4}, program=type('Stop', (StopAfter,), {'at': 3})) == loop.DONE


def test_without_checkpoints_a_signal_saves_nothing(tmp_path):
  assert run(tmp_path, {'loop.checkpoint_every': 0}, program=StopAfter) == loop.KILLED
  assert not list((tmp_path / 'checkpoints').iterdir())


def test_resume_from_an_earlier_checkpoint_and_longer(tmp_path):
  """With the end of the decay fixed, 12 steps and then 24 are the same run as 24 at once, but for the extra lines."""
  fixed = {'optimizer.decay_tokens': 82 * SIZE}
  assert run(tmp_path / 'once', fixed) == loop.DONE
  assert run(tmp_path / 'twice', {**fixed, 'train.steps': 12}) == loop.DONE
  assert run(tmp_path / 'twice', fixed) == loop.DONE
  assert stored(tmp_path / 'twice') == stored(tmp_path / 'once')
  with pytest.raises(ConfigError, match=r'optimizer.beta1: 0.9 -> 0.8'):
    run(tmp_path / 'twice', {**fixed, 'optimizer.beta1': 0.8})


def test_a_run_may_start_from_the_parameters_of_another(tmp_path, whole):
  path = tmp_path / 'continued'
  start = {'train.init_from': str(whole), 'train.steps': 2, 'optimizer.warmup_tokens': 0, 'loop.checkpoint_every': 1}
  assert run(path, start) == loop.DONE
  assert [line['step'] for line in lines(path)] == [1, 2]
  assert lines(path)[0]['loss'] < lines(whole)[0]['loss'] / 2
  with pytest.raises(ConfigError, match=r'train.init_from: .*nowhere: no such folder'):
    run(tmp_path / 'other', {**start, 'train.init_from': str(tmp_path / 'nowhere')})


def test_other_data_is_refused(tmp_path):
  constant = {'optimizer.schedule': 'constant', 'optimizer.warmup_tokens': 0}
  assert run(tmp_path, {**constant, 'train.steps': 3}) == loop.DONE
  with pytest.raises(ConfigError, match='name: "fake" -> "other"'):
    run(tmp_path, {**constant, 'train.steps': 6}, loader=FakeLoader('other'))


class Unlabelled(FakeProgram):
  """No label of these steps (from 0) counts: as of the real step, state and metrics are sums of nothing."""

  steps = (4, 5, 6, 7, 13, 23)

  def step(self, state, batch):
    at = int(state.step)
    if at not in self.steps:
      return super().step(state, batch)
    zero = jnp.float32(0)
    metrics = {'loss': zero, 'grad_norm': zero, 'usual_norm': zero, 'tokens': jnp.int32(0), 'ok': jnp.bool_(False)}
    return state.replace(step=state.step + 1), metrics | {'skipped': state.skipped, 'spikes': state.spikes}


def test_a_step_without_a_label_has_no_loss_and_says_so(tmp_path, capsys):
  assert run(tmp_path, {'loop.log_every': 10, 'train.nonfinite_budget': 1, 'train.spike_budget': 1}, program=Unlabelled) == loop.DONE
  found = {line['step']: line for line in lines(tmp_path)}
  for step in Unlabelled.steps:
    plan = Schedule(CONFIG).inputs(step)
    line = {key: value for key, value in found[step + 1].items() if not key.startswith('val_')}
    assert line == {
      'step': step + 1, 'tokens': plan.tokens + plan.batch * SIZE, 'loss': None, 'grad_norm': None,
      'learning_rate': plan.learning_rate, 'first_sample': plan.first_sample, 'batch': plan.batch,
    }  # fmt: skip
  said = capsys.readouterr().err
  told = [step for step in range(25) if f'step {step}: no label counts' in said]
  assert told == [5, 6, 8] and '(4 such steps so far)' in said and 'step skipped' not in said  # the fifth and sixth are no news
  assert 'training loss not finite' not in said and 'no training loss' in said


def test_validation_samples_without_a_label_have_no_loss(tmp_path, capsys):
  empty = type('Empty', (FakeProgram,), {'evaluate': lambda *_: (0.0, 0)})
  assert run(tmp_path, {'train.steps': 7}, program=empty) == loop.DONE
  assert lines(tmp_path)[-1]['val_loss'] is None and lines(tmp_path)[-1]['val_bits_per_byte'] is None
  said = capsys.readouterr().err
  assert 'step 7: no label of the validation samples counts' in said and 'validation loss 0' not in said


def counted(folder):
  with Checkpointer(folder / 'checkpoints', read_only=True) as checkpoints:
    tree, _ = checkpoints.restore(FakeProgram(CONFIG).abstract_stored())
  return {name: int(tree[name]) for name in ('step', 'skipped', 'spikes')}


def test_steps_that_are_not_finite_are_skipped_and_named(tmp_path, capsys):
  plan = Schedule(CONFIG).inputs(9)
  assert run(tmp_path, loader=FakeLoader(bad=[plan.first_sample + 1])) == loop.DONE
  bad = [line for line in lines(tmp_path) if 'skipped' in line]
  assert len(bad) == 1 and len(lines(tmp_path)) == 24
  assert bad[0] == {
    'step': 10, 'tokens': plan.tokens + plan.batch * SIZE, 'loss': None, 'grad_norm': None, 'skipped': 1,
    'learning_rate': plan.learning_rate, 'first_sample': plan.first_sample, 'batch': plan.batch,
  }  # fmt: skip
  assert all(line['loss'] is not None for line in lines(tmp_path)[10:])
  err = capsys.readouterr().err
  assert f'step 10: loss or gradient is not finite, step skipped (1 of at most 5); its samples are {plan.first_sample}..' in err
  assert counted(tmp_path) == {'step': 24, 'skipped': 1, 'spikes': 0}


@pytest.mark.parametrize(('budget', 'at'), [(3, 12), (0, 10)])
def test_the_budget_stops_the_run_and_keeps_the_last_good_state(tmp_path, capsys, budget, at):
  first = Schedule(CONFIG).inputs(9).first_sample
  loader = FakeLoader(bad=range(first, first + 400))
  assert run(tmp_path, {'train.nonfinite_budget': budget}, loader=loader) == loop.DIVERGED == 3
  assert lines(tmp_path)[-1]['step'] == at and lines(tmp_path)[-1]['skipped'] == max(1, budget)
  assert stored(tmp_path)[1]['step'] == 9
  err = capsys.readouterr().err
  assert f'nonfinite_budget {budget}' in err and 'the last checkpoint is of step 9' in err
  assert run(tmp_path, {'train.nonfinite_budget': 99}) == loop.DONE  # with the data mended, it goes on


def test_skipped_steps_count_on_over_a_resume(tmp_path):
  bad = [Schedule(CONFIG).inputs(step).first_sample for step in (4, 15)]
  assert run(tmp_path, loader=FakeLoader(bad=bad), program=StopAfter) == loop.AGAIN
  assert run(tmp_path, {'train.nonfinite_budget': 2}, loader=FakeLoader(bad=bad)) == loop.DIVERGED
  assert [(line['step'], line['skipped']) for line in lines(tmp_path) if 'skipped' in line] == [(5, 1), (16, 2)]


class Spiked(FakeLoader):
  """Batches from these samples on are noise 100 times as large, and their gradients 10,000 times."""

  def __init__(self, first_samples):
    super().__init__()
    self._first_samples = first_samples

  def batch(self, first_sample, rows):
    x = super().batch(first_sample, rows)['x']
    return {'x': x * (100 if first_sample in self._first_samples else 1)}


SPIKES = [Schedule(CONFIG).inputs(step).first_sample for step in (18, 20)]


def test_a_spike_is_announced_and_where_asked_skipped(tmp_path, capsys):
  assert run(tmp_path / 'announced', loader=Spiked(SPIKES)) == loop.DONE
  said = capsys.readouterr().err
  assert 'step 19: gradient norm ' in said and '(optimizer.clip 1 bounds it, train.spike_skip can skip such steps)' in said and 'step skipped' not in said
  assert run(tmp_path / 'skipped', {'train.spike_skip': 50.0}, loader=Spiked(SPIKES)) == loop.DONE
  said = capsys.readouterr().err
  assert f'times the median of the steps before, step skipped (2 of at most 20); its samples are {SPIKES[1]}..' in said
  named = [(line['step'], line['spikes'], line['first_sample']) for line in lines(tmp_path / 'skipped') if 'spikes' in line]
  assert named == [(19, 1, SPIKES[0]), (21, 2, SPIKES[1])]
  assert counted(tmp_path / 'skipped') == {'step': 24, 'skipped': 0, 'spikes': 2}
  announced, skipped = (lines(tmp_path / name) for name in ('announced', 'skipped'))
  assert skipped[:19] == [{**line, **{k: v for k, v in skipped[i].items() if k not in line}} for i, line in enumerate(announced[:19])]
  assert skipped[19]['loss'] != announced[19]['loss']  # an update less


def test_a_stopped_run_skips_what_it_would_have_skipped(tmp_path):
  """The norms of the steps before are in the checkpoint."""
  fields = {'train.spike_skip': 50.0}
  assert run(tmp_path / 'whole', fields, loader=Spiked(SPIKES)) == loop.DONE
  assert run(tmp_path / 'twice', fields, loader=Spiked(SPIKES), program=StopAfter) == loop.AGAIN
  assert run(tmp_path / 'twice', fields, loader=Spiked(SPIKES)) == loop.DONE
  assert stored(tmp_path / 'twice') == stored(tmp_path / 'whole')
  assert lines(tmp_path / 'twice') == lines(tmp_path / 'whole')


def test_too_many_spikes_stop_the_run_which_may_go_on_without_skipping(tmp_path, capsys):
  fields = {'train.spike_skip': 50.0, 'train.spike_budget': 2}
  assert run(tmp_path, fields, loader=Spiked(SPIKES)) == loop.DIVERGED
  said = capsys.readouterr().err
  assert 'stopped: 2 steps had a gradient norm far above the usual (train.spike_budget 2)' in said
  assert lines(tmp_path)[-1]['step'] == 21 and stored(tmp_path)[1]['step'] == 18
  assert run(tmp_path, {'train.spike_skip': 0.0}, loader=Spiked(SPIKES)) == loop.DONE
  assert counted(tmp_path)['spikes'] == 0


def test_an_evaluation_does_not_count_as_training_time(tmp_path):
  class Slow(FakeProgram):
    def evaluate(self, state, loader, samples):
      time.sleep(1.0)
      return super().evaluate(state, loader, samples)

  assert run(tmp_path, {'train.steps': 8, 'loop.checkpoint_every': 0, 'loop.sample_every': 0}, program=Slow) == loop.DONE
  after = lines(tmp_path, timings=True)[7]  # the step after the evaluation at step 7
  assert after['tokens_per_second'] > (after['tokens'] - lines(tmp_path)[6]['tokens']) / 1.0


def test_every_line_has_its_own_time(tmp_path):
  class Blocking(FakeProgram):
    def step(self, state, batch):
      time.sleep(0.05)
      return jax.block_until_ready(super().step(state, batch))

  assert run(tmp_path, program=Blocking) == loop.DONE
  assert max(line['tokens_per_second'] for line in lines(tmp_path, timings=True)) < 4 * SIZE / 0.05


def test_log_every_keeps_what_matters(tmp_path):
  bad = Schedule(CONFIG).inputs(7).first_sample
  assert run(tmp_path, {'loop.log_every': 10}, loader=FakeLoader(bad=[bad])) == loop.DONE
  assert [line['step'] for line in lines(tmp_path)] == [7, 8, 10, 14, 20, 21, 24]


def test_metrics_are_read_after_the_next_step_is_dispatched(tmp_path, monkeypatch):
  order, ready = [], False

  class Loss(np.float32):
    def is_ready(self):
      return ready

  class Watched(FakeProgram):
    def step(self, state, batch):
      order.append('step')
      state, metrics = super().step(state, batch)
      return state, metrics | {'loss': Loss(metrics['loss'])}

  def log(self, plan, *rest):
    order.append(plan.step)
    return original(self, plan, *rest)

  original = loop.Run.log
  monkeypatch.setattr(loop.Run, 'log', log)
  fields = {'train.steps': 4, 'loop.checkpoint_every': 100}
  assert run(tmp_path / 'late', fields, program=Watched) == loop.DONE
  assert order == ['step', 'step', 0, 'step', 1, 'step', 2, 3]
  order.clear()
  never = fields | {'loop.checkpoint_every': 0, 'loop.eval_every': 0, 'loop.sample_every': 0}
  assert run(tmp_path / 'nothing but steps', never, program=Watched) == loop.DONE
  assert order == ['step', 'step', 0, 'step', 1, 'step', 2, 3]
  order, ready = [], True
  assert run(tmp_path / 'at once', fields, program=Watched) == loop.DONE
  assert order == ['step', 0, 'step', 1, 'step', 2, 'step', 3]


@pytest.mark.parametrize(('fields', 'dispatched'), [({}, 13), ({'loop.eval_every': 4}, 12), ({'loop.checkpoint_every': 12}, 12)])
def test_every_process_stops_after_the_same_step_whenever_its_metrics_are_there(tmp_path, monkeypatch, fields, dispatched):
  """The budget runs out in step 12. A step is a collective: who dispatches one more than the others waits for ever."""

  class Loss(np.float32):
    def is_ready(self):
      return next(ready)

  class Watched(FakeProgram):
    def step(self, state, batch):
      steps.append(len(steps) + 1)
      state, metrics = super().step(state, batch)
      return state, metrics | {'loss': Loss(metrics['loss'])}

  first = Schedule(CONFIG).inputs(9).first_sample
  fields = {'train.nonfinite_budget': 3, 'loop.eval_every': 0, 'loop.sample_every': 0, 'loop.checkpoint_every': 0} | fields
  random = np.random.default_rng(0)
  for i, answers in enumerate([itertools.repeat(True), itertools.repeat(False), iter(lambda: bool(random.integers(2)), None)]):
    steps, ready = [], answers
    assert run(tmp_path / str(i), fields, FakeLoader(bad=range(first, first + 400)), Watched) == loop.DIVERGED
    assert steps[-1] == dispatched
    assert lines(tmp_path / str(i)) == lines(tmp_path / '0') and lines(tmp_path / '0')[-1]['step'] == 12


def test_the_log_is_on_disk_before_a_checkpoint(tmp_path, monkeypatch):
  seen = []
  original = loop.Checkpointer.save

  def save(self, step, *rest):
    seen.append((step, [line['step'] for line in lines(tmp_path)]))
    return original(self, step, *rest)

  monkeypatch.setattr(loop.Checkpointer, 'save', save)
  assert run(tmp_path) == loop.DONE
  assert seen == [(step, list(range(1, step + 1))) for step in (3, 6, 9, 12, 15, 18, 21, 24)]


def test_a_damaged_checkpoint_costs_only_its_steps(tmp_path, whole, caplog):
  run(tmp_path, program=StopAfter)
  (tmp_path / 'checkpoints' / '11' / 'meta' / 'metadata').write_text('')
  assert run(tmp_path) == loop.DONE
  assert '11 IS DAMAGED' in caplog.text
  assert (tmp_path / 'checkpoints' / '11.damaged').exists()
  assert stored(tmp_path) == stored(whole)
  assert lines(tmp_path) == lines(whole)


def test_an_error_in_the_batch_thread_reaches_the_caller(tmp_path):
  class Broken(FakeLoader):
    def batch(self, first_sample, rows):
      raise OSError('no such shard')

  with pytest.raises(OSError, match='no such shard'):
    run(tmp_path, loader=Broken())


def test_clock_leaves_out_the_first_step_and_pauses(monkeypatch):
  now = itertools.chain([0.0, 10.0, 11.0, 100.0, 102.0]).__next__
  monkeypatch.setattr(loop.time, 'monotonic', now)
  clock = loop.Clock()  # 0
  clock.add(10)  # at 10: compiling took 10 s
  assert (clock.rate, clock.interval()) == (None, 1.0)
  clock.add(10)  # at 11
  clock.restart()  # at 100, after an evaluation
  clock.add(10)  # at 102
  assert (clock.rate, clock.interval()) == (20 / 3, 20 / 3)


def test_the_fake_program_round_trips():
  program = FakeProgram(CONFIG)
  state = program.init()
  state, _ = program.step(state, (jnp.asarray(np.ones((2, SIZE), np.float32)), 0.1))
  again = program.from_stored(program.stored(state))
  assert jax.tree.structure(again) == jax.tree.structure(state)
