"""Tasks scored while a run trains: when it is due, whatever happens to the run, once; and as the job eval does it."""

import contextlib
import json
import os
import signal

import jax
import pytest
import tiny
from fake_program import CONFIG, FakeLoader, FakeProgram, FakeTokenizer, lines, stored, with_fields
from test_loop_program import Rows

import run as command
from lmscale.config import EvalConfig, GenerateConfig, MeshConfig
from lmscale.data.tokenizer import ByteTokenizer
from lmscale.errors import ConfigError
from lmscale.eval.requests import Likelihood
from lmscale.train import loop
from lmscale.train import stored as stored_lib
from lmscale.train.program import Program
from lmscale.train.scores import Schedule
from lmscale.train.workdir import open_workdir

EVERY = {'eval.every': 4, 'eval.tasks': ('copy', 'induction'), 'eval.lengths': (40,), 'eval.samples': 2, 'train.steps': 9,
         'loop.checkpoint_every': 3, 'loop.sample_every': 0, 'loop.eval_every': 0}  # fmt: skip


class Answers:
  """Right where the state has taken an even number of steps. act(step, request): what happens when the model is asked."""

  truncated = 0

  def __init__(self, step, act, between):
    self.step, self.act, self.between = step, act, between

  def continuations(self, requests):
    for request in requests:
      self.between()
      self.act(self.step, request)
    return [Likelihood(-1.0, self.step % 2 == 0, 1) for _ in requests]


class Asked(FakeProgram):
  @contextlib.contextmanager
  def scorer(self, state, tokenizer, context, between):
    def act(step, request):
      self.asked.append((step, request.text))
      self.act(step, request)

    yield Answers(int(state.step), act, between)

  def fingerprint(self, state):
    return stored_lib.fingerprint(stored_lib.checksums({'params': state.params}))


def run(folder, act=lambda step, request: None, program=Asked, **fields):
  """(exit code, [step, text] of all that the model was asked)."""
  config = with_fields(CONFIG, EVERY | fields)
  program = type('Acting', (program,), {'act': staticmethod(act), 'asked': []})
  with open_workdir(folder, config) as workdir:
    tokenizer = FakeTokenizer()
    schedule = Schedule(config, tokenizer) if config.eval.every else None
    code = loop.train(config, program(config), FakeLoader(), FakeLoader(), workdir, 1.0, tokenizer, evaluations=schedule)
  return code, program.asked


def results(folder):
  """{step: {task: its entry without the seconds}}."""
  paths = sorted((folder / 'eval').glob('*/results.json'))
  read = {int(path.parent.name): json.loads(path.read_text())['tasks'] for path in paths}
  return {step: {name: {**entry, 'seconds': 0} for name, entry in tasks.items()} for step, tasks in read.items()}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp('whole')
  code, asked = run(folder)
  assert code == loop.DONE and [step for step, _ in asked] == [4] * 4 + [8] * 4 + [9] * 4
  return folder


def test_what_is_kept(whole, tmp_path):
  assert {step: {name: entry['acc'] for name, entry in tasks.items()} for step, tasks in results(whole).items()} == {
    4: {'copy': 1, 'induction': 1}, 8: {'copy': 1, 'induction': 1}, 9: {'copy': 0, 'induction': 0}
  }  # fmt: skip
  assert json.loads((whole / 'eval' / '9' / 'samples' / 'copy.json').read_text())['scores'] == {'acc': [0, 0]}
  assert run(tmp_path, **{'eval.every': 0}) == (loop.DONE, []) and not (tmp_path / 'eval').exists()
  assert lines(tmp_path) == lines(whole) and stored(tmp_path)[0] == stored(whole)[0]


def told(at):
  """SIGTERM when the model is first asked after `at` steps."""

  def act(step, request):
    if step == at:
      os.kill(os.getpid(), signal.SIGTERM)

  return act


class Killed(BaseException):
  """The process is gone."""


def killed(at, times):
  """Gone when the model has been asked `times` things after `at` steps."""
  seen = []

  def act(step, request):
    if step == at:
      seen.append(step)
      if len(seen) > times:
        raise Killed

  return act


@pytest.mark.parametrize('at', [4, 9])
def test_told_to_stop_while_it_scores(tmp_path, whole, at):
  """It saves, also where no save was due, and the next start goes on with what is missing; at the end, too."""
  code, asked = run(tmp_path, told(at))
  assert code == loop.AGAIN and (tmp_path / 'checkpoints' / str(at)).is_dir()
  assert sum(step == at for step, _ in asked) == 1
  code, again = run(tmp_path)
  assert code == loop.DONE and results(tmp_path) == results(whole) and lines(tmp_path) == lines(whole)
  assert sum(step == at for step, _ in again) == 4


@pytest.mark.parametrize(('at', 'times'), [(4, 0), (4, 3), (9, 3)])
def test_killed_while_it_scores(tmp_path, whole, at, times):
  with pytest.raises(Killed):
    run(tmp_path, killed(at, times))
  assert list(results(tmp_path).get(at, {})) == ['copy'] * (times == 3)
  code, again = run(tmp_path)
  assert code == loop.DONE and results(tmp_path) == results(whole) and lines(tmp_path) == lines(whole)
  assert sum(step == at for step, _ in again) == (4 if times == 0 else 2)  # a task that was scored is not scored again
  assert run(tmp_path) == (loop.DONE, [])


class StoppedBefore(Asked):
  def step(self, state, batch):
    if int(state.step) == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    return super().step(state, batch)


def test_told_to_stop_before_it_scores(tmp_path, whole):
  assert run(tmp_path, program=StoppedBefore) == (loop.AGAIN, [])
  assert (tmp_path / 'checkpoints' / '4').is_dir() and not (tmp_path / 'eval').exists()
  code, asked = run(tmp_path)
  assert code == loop.DONE and asked[0][0] == 4 and results(tmp_path) == results(whole)


def test_scores_of_other_parameters_or_questions_are_taken_again(tmp_path, whole):
  run(tmp_path)
  path = tmp_path / 'eval' / '9' / 'results.json'
  read = json.loads(path.read_text())
  read['tasks']['copy']['parameters'] = 'other'
  path.write_text(json.dumps(read))
  assert len(run(tmp_path)[1]) == 2 and results(tmp_path) == results(whole)
  assert len(run(tmp_path, **{'eval.samples': 3})[1]) == 6
  path.write_text('{"tasks": []}')
  assert len(run(tmp_path)[1]) == 4 and results(tmp_path)[9] == results(whole)[9]
  assert path.with_name('results.json.damaged').exists()


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'eval.tasks': ('coppy',)}, "eval.tasks: 'coppy' is no task; known: winogrande"),
    ({'eval.tasks': ('piqa',)}, 'task piqa: it is read from a folder'),
    ({'eval.tasks': ('piqa',), 'eval.data': '/nowhere'}, 'eval.data: /nowhere is no folder'),
    ({'eval.lengths': (4,)}, 'task copy: 4 tokens are too few'),
  ],
)
def test_what_cannot_be_scored_is_found_before_a_step(fields, message):
  with pytest.raises(ConfigError, match=message):
    Schedule(with_fields(CONFIG, EVERY | fields), FakeTokenizer())


PIPE = MeshConfig(2, 2, 2, 2)


def train(folder, mesh, every):
  """(folder, losses) of a run of a real model."""
  model = tiny.change(tiny.MODEL, pattern='M*' if mesh == PIPE else '*-', vocab=264)
  config = tiny.change(tiny.config(mesh, model, steps=3, remat='none'), generate=GenerateConfig(batch=8, prefill_chunk=64))
  tasks = EvalConfig(every, ('text', 'phonebook') if mesh == PIPE else ('text',), str(folder), (256,), samples=2)
  config = with_fields(tiny.change(config, eval=tasks), {'loop.checkpoint_every': 3, 'loop.eval_every': 0, 'optimizer.warmup_tokens': 0})
  rows = Rows(vocab=264)
  rows.identity = {'tokenizer': ByteTokenizer.identity}
  path = folder / f'every{every}'
  with open_workdir(path, config) as workdir:
    schedule = Schedule(config, ByteTokenizer()) if every else None
    program = Program(config, jax.devices()[: mesh.size])
    assert loop.train(config, program, rows, None, workdir, 1.0, evaluations=schedule) == loop.DONE
  return path, [line['loss'] for line in lines(path)]


@pytest.mark.parametrize('mesh', [tiny.ONE, pytest.param(PIPE, marks=pytest.mark.scale)], ids=['one', 'pipe'])
def test_a_run_s_scores_are_those_of_the_job_and_change_nothing_else(tmp_path, mesh):
  (tmp_path / 'text.jsonl').write_text(''.join(json.dumps({'text': f'{i} to be or not to be. ' * 12}) + '\n' for i in range(2)))
  path, losses = train(tmp_path, mesh, 2)
  assert train(tmp_path, mesh, 0)[1] == losses
  found = results(path)
  assert list(found) == [2, 3] and found[2]['text']['loss'] != found[3]['text']['loss']
  (path / 'eval' / '3' / 'results.json').unlink()
  assert command.main(['--job=eval', f'--workdir={path}']) == 0
  job = results(path)[3]
  for name, entry in found[3].items():
    for key, value in entry.items():
      assert job[name][key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), (name, key)

