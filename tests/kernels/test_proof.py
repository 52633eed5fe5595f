"""A kernel is chosen by itself only where it has shown that it computes the right thing; kernels made wrong on purpose are not."""

import json
import os
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmscale.config import ConfigError, fill_data, from_dict
from lmscale.jobs import kernels
from lmscale.kernels import choice, proof
from lmscale.kernels.proof import __main__ as trial
from lmscale.kernels.proof import verdicts
from lmscale.kernels.proof.cases import cases
from lmscale.kernels.selective_scan import pallas_triton
from lmscale.kernels.ssd.triton import entry
from lmscale.plan.report import format_report, make_report

TINY = {'b': 2, 'l': 40, 'h': 2, 'g': 1, 'p': 16, 'n': 16}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path):
  monkeypatch.setattr(verdicts, '_known', {})
  monkeypatch.setenv('LMSCALE_CACHE', str(tmp_path))


def prove(op, dtype='float32'):
  return trial.prove(op, 'pallas_triton', dtype, TINY, interpret=True)


@pytest.mark.parametrize('op', ['ssd', 'selective_scan', 'ssd_update'])
def test_a_kernel_proves_itself(op):
  verdict = prove(op)
  assert verdict.why_not == '' and 0 <= verdict.worst < 1


@pytest.mark.parametrize('op', ['ssd', 'selective_scan', 'ssd_update', 'attention'])
def test_every_case_agrees_with_itself(op):
  for case in cases(op, TINY):
    assert all(error == 0 for _, _, error, _ in trial._errors(case, 'xla', 'float32'))


def wrong(real, spoil):
  """The kernel with one of its results or gradients spoiled: spoil(name, array)."""

  @jax.custom_vjp
  def marked(m):
    return m

  marked.defvjp(lambda m: (m, None), lambda _, g: (spoil('dx', g),))

  def run(x, *rest, **options):
    y, state = real(marked(x), *rest, **options)
    return spoil('y', y), spoil('state', state)

  return run


@pytest.mark.parametrize(
  ('what', 'message'),
  [('y', 'whole rows: y of head 1 is off by 0.05'), ('state', 'whole rows: state of head'), ('dx', 'whole rows: the gradient of x of head 1')],
)
def test_a_wrong_kernel_is_found_with_its_head(what, message, monkeypatch):
  def spoil(name, m):
    if name != what:
      return m
    return m.at[:, 1].multiply(1.05) if name == 'state' else m.at[:, :, 1].multiply(1.05)

  monkeypatch.setattr(entry, 'ssd_pallas_triton', wrong(entry.ssd_pallas_triton, spoil))
  verdict = prove('ssd')
  assert verdict.why_not.startswith(message) and 'are allowed' in verdict.why_not and verdict.worst > 1


def test_a_kernel_that_leaks_between_documents_is_found(monkeypatch):
  real = pallas_triton.selective_scan_pallas_triton
  monkeypatch.setattr(pallas_triton, 'selective_scan_pallas_triton', lambda *args, **options: real(*args[:-1], None, **options))
  assert prove('selective_scan').why_not.startswith('packed rows: state of head 0')


def test_nan_is_no_proof(monkeypatch):
  monkeypatch.setattr(entry, 'ssd_pallas_triton', wrong(entry.ssd_pallas_triton, lambda name, m: m * jnp.nan if name == 'y' else m))
  assert 'y of head 0 is off by nan' in prove('ssd').why_not


# The other process -------------------------------------------------------------------------------------------------

CHILD = """
from lmscale.kernels.proof import __main__ as trial
trial.SMALL, real = {sizes}, trial.prove
trial.prove = lambda op, name, dtype: real(op, name, dtype, trial.SMALL, interpret=True)
trial.main({arguments})
"""


def child(monkeypatch, program):
  """What stands in for the other process; counts how often it was started."""
  started = []

  def command(*arguments):
    started.append(arguments)
    return [sys.executable, '-c', program.format(sizes=TINY, arguments=list(arguments))]

  monkeypatch.setattr(verdicts, 'command', command)
  return started


def test_a_verdict_is_kept(monkeypatch, tmp_path):
  started = child(monkeypatch, CHILD)
  first = proof.verdict('ssd_update', 'pallas_triton', 'float32')
  assert first.why_not == '' and 0 <= first.worst < 1
  monkeypatch.setattr(verdicts, '_known', {})
  assert proof.verdict('ssd_update', 'pallas_triton', 'float32') == first
  assert started == [('ssd_update', 'pallas_triton', 'float32')]
  (path,) = (tmp_path / 'kernels').iterdir()
  path.write_text('{"why_')  # a damaged one is tried again
  monkeypatch.setattr(verdicts, '_known', {})
  child(monkeypatch, 'print(\'{{"why_not": "no"}}\')')
  assert proof.verdict('ssd_update', 'pallas_triton', 'float32').why_not == 'no'
  assert json.loads(path.read_text())['why_not'] == 'no'


def test_the_source_of_the_kernels_is_part_of_a_verdict(monkeypatch):
  here = verdicts._here()
  verdicts._here.cache_clear()
  monkeypatch.setattr(verdicts, 'PACKAGE', verdicts.PACKAGE / 'kernels')  # another folder, with other files
  assert verdicts._here() != here
  verdicts._here.cache_clear()


@pytest.mark.parametrize(
  ('program', 'why_not', 'kept'),
  [
    ('import os; os.kill(os.getpid(), 11)', 'it crashed with SIGSEGV', True),
    ('raise ValueError("no such instruction")', 'its trial failed: ValueError: no such instruction', True),
    ('raise RuntimeError("RESOURCE_EXHAUSTED: 3 GB")', 'its trial failed: RuntimeError: RESOURCE_EXHAUSTED', False),
    ('import time; time.sleep(60)', 'its trial took more than 0.5 s', False),
  ],
)
def test_a_process_that_fails_is_no_proof(program, why_not, kept, monkeypatch, tmp_path):
  monkeypatch.setattr(verdicts, 'SECONDS', 0.5 if 'sleep' in program else 60)
  child(monkeypatch, program)
  assert proof.verdict('ssd', 'pallas_triton', 'bfloat16').why_not.startswith(why_not)
  assert (tmp_path / 'kernels').exists() == kept


def test_a_kernel_that_raises_says_why_in_a_line(capsys, monkeypatch):
  def refused(*args, **options):
    raise RuntimeError('ptxas: no such instruction\nand much more')

  monkeypatch.setattr(entry, 'ssd_pallas_triton', refused)
  trial.main(['ssd', 'pallas_triton', 'bfloat16'])
  assert json.loads(capsys.readouterr().out)['why_not'] == 'it failed: RuntimeError: ptxas: no such instruction'
  with pytest.raises(SystemExit, match='2'):
    trial.main(['sdd', 'pallas_triton', 'bfloat16'])


# The choice --------------------------------------------------------------------------------------------------------


@pytest.fixture
def verdicts_of(monkeypatch):
  """verdicts_of({name: Verdict}): what is known of the kernels."""
  return lambda known: monkeypatch.setattr(proof, 'verdict', lambda op, name, dtype: known[name])


def choose(name=None):
  with choice.recording() as found:
    names = ('a', 'b', 'xla')
    choice.choose('op', name, names, names, lambda name: None, jnp.bfloat16)
  return found


def test_what_is_not_proved_is_passed_over_and_said(verdicts_of):
  verdicts_of({'a': proof.Verdict('y is off'), 'b': proof.Verdict('')})
  assert choose() == [choice.Choice('op', 'b', 'bfloat16', False, (('a', 'y is off'),), 'cpu')]
  verdicts_of({'a': proof.Verdict('y is off'), 'b': proof.Verdict('it crashed')})
  assert choose()[0].name == 'xla'
  assert choose('a') == [choice.Choice('op', 'a', 'bfloat16', True, (), 'cpu')]


@pytest.mark.parametrize(('seconds', 'best'), [((1.0, 0.85), 'b'), ((1.0, 0.95), 'a'), ((1.0, 0.0), 'a'), ((0.5, 1.0), 'a')])
def test_of_two_the_much_faster_one_is_chosen(seconds, best, verdicts_of):
  verdicts_of({name: proof.Verdict('', 0.1, s) for name, s in zip('ab', seconds, strict=True)})
  assert choose()[0].name == best


def test_devices_that_are_not_here_are_not_asked(monkeypatch):
  monkeypatch.setattr(proof, 'verdict', None)
  with choice.tracing_for(types.SimpleNamespace(platform='cuda', device_kind='NVIDIA H100')):
    assert choose()[0].name == 'a'


def test_processes_choose_alike():
  proof.adopt({'ssd pallas_triton bfloat16': {'why_not': 'no', 'worst': 2.0, 'seconds': 0.0}})
  assert proof.verdict('ssd', 'pallas_triton', 'bfloat16') == proof.Verdict('no', 2.0)
  assert proof.known() == {'ssd pallas_triton bfloat16': {'why_not': 'no', 'worst': 2.0, 'seconds': 0.0}}


def test_a_named_kernel_that_is_wrong_here_is_refused_by_its_field(verdicts_of, monkeypatch):
  config = from_dict({'model': {'pattern': 'M*', 'mamba2': {'implementation': 'pallas_triton'}}})
  chosen = [choice.Choice('attention', 'xla', 'bfloat16', False), choice.Choice('ssd', 'pallas_triton', 'bfloat16', True)]
  monkeypatch.setattr(kernels, 'check_kernels', lambda config, backend: chosen)
  verdicts_of({'pallas_triton': proof.Verdict('')})
  assert kernels.settle_kernels(config) == chosen
  verdicts_of({'pallas_triton': proof.Verdict('y of head 3 is off')})
  with pytest.raises(ConfigError, match=r'^model.mamba2.implementation: pallas_triton is not to be trusted on this \w+: y of head 3 is off; set auto$'):
    kernels.settle_kernels(config)


def test_the_plan_says_what_runs_and_why():
  chosen = [choice.Choice('ssd', 'xla', 'bfloat16', False, (('pallas_triton', 'y is off'),), 'gpu'), choice.Choice('selective_scan', 'scan', 'bfloat16', True, on='gpu')]
  text = format_report(make_report(fill_data(from_dict({}), 1), kernels=chosen))
  assert re.search(r'kernels +xla +ssd on a GPU\n +scan +selective scan on a GPU, as named\n +not pallas_triton: y is off\n', text)


@pytest.mark.gpu
@pytest.mark.parametrize('key', [('ssd', 'pallas_triton'), ('ssd', 'pallas_mosaic'), ('selective_scan', 'pallas_triton'), ('ssd_update', 'pallas_triton'), ('attention', 'cudnn')])
def test_kernels_prove_themselves_on_a_gpu(key):
  environ = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
  done = subprocess.run(verdicts.command(*key, 'bfloat16'), check=False, capture_output=True, text=True, env=environ)
  verdict = json.loads(done.stdout.splitlines()[-1])
  print(key, verdict)
  assert not verdict['why_not'] and np.isfinite(verdict['worst'])
