"""`--job=eval`: a folder of a model in, scores in it."""

import json

import numpy as np
import pytest
import tiny
from eval.made import MODEL, write_docs, write_run

import run
from lmscale.config import EvalConfig
from lmscale.errors import ConfigError
from lmscale.train.scores import find_options

TEXT = ''.join(f'{i} times {i} is {i * i}. ' for i in range(40))
PIQA = {'goal': 'Open it.', 'sol1': 'Turn it.', 'sol2': 'Eat it.', 'label': 0}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('model')
  write_run(folder)
  write_docs(folder / 'text.jsonl', [{'text': TEXT}])
  write_docs(folder / 'piqa.jsonl', [PIQA] * 3)
  return folder


def results(folder, *flags):
  code = run.main(['--job=eval', f'--workdir={folder / "run"}', f'--data={folder}', '--samples=2', *flags])
  return code, json.loads((folder / 'run' / 'eval' / '3' / 'results.json').read_text())


def test_scores_are_kept_task_by_task(folder, capsys):
  code, found = results(folder, '--tasks=piqa,phonebook', '--lengths=256,320', '--context=280')
  assert code == 0 and list(found['tasks']) == ['piqa', 'phonebook']
  piqa, book = found['tasks']['piqa'], found['tasks']['phonebook']
  assert {'acc', 'acc_stderr', 'acc_norm', 'samples', 'truncated', 'seconds', 'digest', 'options'} <= set(piqa)
  assert piqa['samples'] == 2 and len(piqa['digest']) == 64 and piqa['options']['context'] == 280
  assert book['samples'] == 4 and book['truncated'] == 2  # those of 320 tokens
  assert found['config']['model']['d_model'] == 16 and 'jax' in str(found['environment'])
  assert {path.name for path in (folder / 'run' / 'eval' / '3').iterdir()} == {'results.json', 'samples', 'length.svg', 'depth.svg'}
  out = capsys.readouterr().out
  assert 'piqa ' in out and '2 samples' in out and '2 cut at their beginning' in out
  kept = json.loads((folder / 'run' / 'eval' / '3' / 'samples' / 'phonebook.json').read_text())
  assert np.mean(kept['scores']['digits']) == pytest.approx(book['digits']) and kept['questions'] == book['questions']
  path = folder / 'run' / 'eval' / '3' / 'results.json'
  stale = piqa | {'parameters': 'other'}  # of before the run was trained again
  path.write_text(json.dumps(found | {'tasks': found['tasks'] | {'stale': stale}}))
  code, again = results(folder, '--tasks=loss_by_position', '--lengths=64')
  assert code == 0 and list(again['tasks']) == ['piqa', 'phonebook', 'loss_by_position'] and again['tasks']['piqa'] == piqa
  found = again['tasks']['loss_by_position']
  sizes = [b - a + 1 for a, b in (map(int, name.split('-')) for name in found['by_position'])]
  assert sum(sizes) == 64 and found['samples'] == 2
  assert np.average([bin['loss'] for bin in found['by_position'].values()], weights=sizes) == pytest.approx(found['loss'])
  assert '45-64 tokens read   loss ' in capsys.readouterr().out
  assert 'trained: 16' in (path.parent / 'position.svg').read_text()


@pytest.mark.parametrize(
  'flags,message',
  [
    (['--tasks=arc'], "--tasks: 'arc' is no task; known: winogrande"),
    ([], '--tasks: none; give some of winogrande'),
    (['--tasks=race'], 'task race: no file '),
    (['--tasks=copy', '--lengths=1k'], "--lengths: '1k'; give numbers of tokens"),
    (['--tasks=copy', '--shots=-1'], '--shots: -1; give 0 or more'),
    (['--tasks=copy', '--haystack=/nowhere/x'], '--haystack: /nowhere/x: No such file'),
    (['--tasks=cwe', '--lengths=100'], 'task cwe: 100 tokens are too few'),
  ],
)
def test_what_cannot_be_scored_is_one_line_and_makes_nothing(folder, flags, message, capsys, tmp_path):
  for name in ('config.json', 'checkpoints'):
    (tmp_path / name).symlink_to(folder / 'run' / name)
  assert run.main(['--job=eval', f'--workdir={tmp_path}', f'--data={folder}', *flags]) == 2
  (line,) = capsys.readouterr().err.strip().splitlines()
  assert line.startswith(f'error: {message}')
  assert not (tmp_path / 'eval').exists()


def test_a_context_beyond_learned_positions_is_refused():
  config = tiny.config(model=tiny.change(MODEL, positions='learned', max_positions=64))
  config = tiny.change(config, eval=EvalConfig(lengths=(48, 80)))
  assert find_options(config, ['piqa']).context == 16  # train.seq_len
  with pytest.raises(ConfigError, match='eval.lengths: a context of 80 tokens exceeds model.max_positions 64, .* --context=64'):
    find_options(config, ['copy'])


def test_flags_of_the_job_are_refused_elsewhere(capsys):
  assert run.main(['--tasks=copy']) == 2
  assert '--tasks: only with --job=eval' in capsys.readouterr().err
