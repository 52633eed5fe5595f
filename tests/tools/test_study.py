"""The small study: a tiny one for real, and its numbers from made-up folders."""

import dataclasses
import json
import pathlib

import pytest
import study
import study_page
import study_results

from lmscale import config as config_lib

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def compiled(monkeypatch):
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.cache' / 'jax'))


def test_one_arm_of_a_few_steps(tmp_path, capsys, compiled):
  argv = ['--size=test', f'--runs={tmp_path / "runs"}', f'--page={tmp_path / "study.md"}', '--jobs=1']
  assert study.main(argv) == 0, capsys.readouterr().err
  out = capsys.readouterr().out
  assert 'hybrid-4e-3-seed0: trained' in out and 'hybrid-4e-3-seed0: scored' in out
  page = (tmp_path / 'study.md').read_text()
  assert '| hybrid | `M*-` |' in page and '`phonebook_reversed`, share of the digits' in page
  assert {path.name for path in tmp_path.glob('*.svg')} == {'study_loss.svg', 'study_phonebook.svg'}
  assert study.main(argv) == 0  # everything is there
  assert 'trained in' not in capsys.readouterr().out
  changed = tmp_path / 'runs' / 'hybrid-4e-3-seed0' / 'config.json'
  changed.write_text(changed.read_text().replace('"learning_rate": 0.004', '"learning_rate": 0.005'))
  assert study.main(argv) == 2
  assert 'was made with another recipe (optimizer.learning_rate: 0.005 -> 0.004): move it away' in capsys.readouterr().err


PLAN = study_results.Plan('test', seeds=2, architectures=('transformer', 'hybrid'), variants=('attention0', 'attention50', 'mlp0', 'rope'), rates=2)


def made_up(plan, arm, loss, right):
  """The folder of an arm that is trained and scored."""
  folder, config = arm.folder(plan), arm.config(plan)
  (folder / 'eval' / '3').mkdir(parents=True)
  (folder / 'config.json').write_text(json.dumps(config_lib.to_dict(config)))
  lines = [{'step': step, 'tokens': 256 * step, 'val_loss': loss + 3 - step, 'seconds': {'steps': 2.0 * step}} for step in (1, 3)]
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  (folder / 'loss.svg').touch()
  entry = {'by_length': {'300': {'acc': right, 'digits': right}}, 'options': {'lengths': [300], 'samples': 2, 'seed': arm.seed}}
  (folder / 'eval' / '3' / 'results.json').write_text(json.dumps({'tasks': dict.fromkeys(config.eval.tasks, entry)}))


def test_means_errors_and_the_best_rate(tmp_path, monkeypatch):
  plan = dataclasses.replace(PLAN, folder=tmp_path / 'runs')
  for arm in plan.grid():  # the second rate is the better one for the hybrid alone
    made_up(plan, arm, {'4e-3': 2.0, '2e-3': 1.5 if arm.architecture == 'hybrid' else 2.5}[arm.rate], 0.5)
  with pytest.raises(study_results.StudyError, match='transformer-4e-3-seed1 is not trained'):
    study_page.write(plan, tmp_path / 'study.md')
  chosen = plan.chosen()
  assert [arm.name for arm in chosen[:4]] == ['transformer-4e-3-seed0', 'transformer-4e-3-seed1', 'hybrid-2e-3-seed0', 'hybrid-2e-3-seed1']
  assert {arm.rate for arm in chosen[4:]} == {'2e-3'}
  for arm in chosen:
    if not arm.folder(plan).exists():
      made_up(plan, arm, 2.25, 1.0)
  files = study_page.write(plan, tmp_path / 'study.md')
  assert [file.name for file in files] == ['study.md', 'study_loss.svg', 'study_phonebook.svg', 'study_shares.svg', 'study_rope.svg']
  page = (tmp_path / 'study.md').read_text()
  hybrid = next(line for line in page.splitlines() if line.startswith('| hybrid | `M*-`'))
  assert hybrid.endswith('| 2e-3 | 1.875 ± 0.375 | 128 ± 0 |')  # of 1.5 and 2.25, which are 0.75 apart
  assert '| transformer | 2.5000 | 2.0000 |' in page and '| hybrid | 0.750 ± 0.250 |' in page
  monkeypatch.setattr(study_page, 'draw', lambda *args: [])
  before = page.replace('0.750', '0.5')
  (tmp_path / 'study.md').write_text(f'Kept.\n{before}Kept, too.\n')
  study_page.write(plan, tmp_path / 'study.md')
  assert (tmp_path / 'study.md').read_text() == f'Kept.\n{page}Kept, too.\n'
  (tmp_path / 'study.md').write_text('no places')
  with pytest.raises(study_results.StudyError, match='<!-- study: arms --> ... <!-- end --> is missing'):
    study_page.write(plan, tmp_path / 'study.md')


def test_the_arms_have_equally_many_parameters():
  plan = study.PLANS['small']
  names = (*plan.architectures, *plan.variants)
  counts = [study_results.parameter_count(study_results.Arm(name, '4e-3', 0).config(plan).model) for name in names]
  assert max(counts) <= 1.07 * min(counts)


def test_the_page_has_a_place_for_every_part():
  places = [name for _, name, _ in study_page.PLACE.findall((ROOT / 'docs' / 'study.md').read_text())]
  assert places == ['arms', 'rates', 'losses', 'books', 'shares', 'rope']
