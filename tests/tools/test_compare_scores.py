"""Scores of several runs side by side: which differences are larger than their errors, and which cannot be taken."""

import json
import math

import numpy as np
import pytest
from compare_scores import differ, read_scores
from tools.test_compare_runs import SMALL, _cells, _run

from lmscale import config as config_lib
from lmscale.eval.metrics import standard_error
from tools import compare_runs

NOISE = np.random.default_rng(0).normal(size=(3, 50))


def scored(folder, tasks, step=8, samples=True):
  """A run with scores. tasks: {name: ({metric: of each sample}, {more of its entry})}."""
  if not folder.exists():
    _run(folder, [2.0, 1.0])
  out = folder / 'eval' / str(step)
  (out / 'samples').mkdir(parents=True)
  entries = {}
  for name, (columns, more) in tasks.items():
    about = {'digest': 'd', 'questions': 'q', 'parameters': 'p', 'options': {'context': 9}}
    entry = about | {'samples': len(next(iter(columns.values()))), 'truncated': 0}
    for metric, values in columns.items():
      entry |= {metric: float(np.mean(values)), f'{metric}_stderr': standard_error(list(values))}
    entries[name] = entry | more
    if samples:
      kept = {key: entries[name][key] for key in ('questions', 'parameters')} | {'scores': {m: list(v) for m, v in columns.items()}}
      (out / 'samples' / f'{name}.json').write_text(json.dumps(kept))
  (out / 'results.json').write_text(json.dumps({'tasks': entries, 'config': config_lib.to_dict(SMALL)}))
  return read_scores(folder, folder.name)


def test_the_same_questions_are_compared_sample_by_sample(tmp_path):
  a, b = NOISE[0], NOISE[0] + 0.1 + 0.05 * NOISE[1]  # far apart but for what both have in common
  one, other = (scored(tmp_path / name, {'copy': ({'acc': list(values)}, {})}) for name, values in (('a', a), ('b', b)))
  found = differ('copy', other, one)
  assert (found.value, found.error) == pytest.approx((np.mean(b - a), np.std(b - a, ddof=1) / math.sqrt(50)))
  assert found.paired and found.large and str(found).endswith(f'({found.value / found.error:.1f} errors, paired) *')
  third = scored(tmp_path / 'c', {'copy': ({'acc': list(b)}, {})}, samples=False)
  found = differ('copy', third, one)
  assert found.error == pytest.approx(math.hypot(standard_error(list(a)), standard_error(list(b))))
  assert not found.paired and not found.large and '*' not in str(found)
  for changed in ({'questions': 'other'}, {'questions': 'other', 'options': {'context': 9}}):
    fourth = scored(tmp_path / f'd{len(changed)}', {'copy': ({'acc': list(b)}, changed)})
    assert differ('copy', fourth, one).error == pytest.approx(found.error)  # other texts of the same task


def test_bits_per_byte_are_a_ratio(tmp_path):
  sizes = np.arange(10, 60)
  nats = [sizes * 2 + NOISE[0], sizes * 2.1 + NOISE[0] + 0.1 * NOISE[1]]
  ratio = [float(n.sum() / sizes.sum() / math.log(2)) for n in nats]
  one, other = (
    scored(tmp_path / f'{i}', {'text': ({'nats': list(n), 'bytes': sizes.tolist()}, {'bits_per_byte': ratio[i], 'bits_per_byte_stderr': 0.1})})
    for i, n in enumerate(nats)
  )
  found, change = differ('text', other, one), (nats[1] - nats[0]) / math.log(2)
  assert found.value == pytest.approx(ratio[1] - ratio[0])
  assert found.error == pytest.approx(np.std(change - found.value * sizes, ddof=1) * math.sqrt(50) / sizes.sum())


@pytest.mark.parametrize(
  ('changed', 'why'),
  [
    ({'digest': 'e'}, 'data'),
    ({'options': {'context': 5}, 'questions': 'r'}, 'options'),
    ({'options': {'context': 5}, 'truncated': 1}, 'options'),
    ({'options': {'context': 5}}, ''),  # nothing was cut, and the questions are the same
  ],
)
def test_other_data_is_told_apart(tmp_path, capsys, changed, why):
  for name, more in (('a', {}), ('b', changed)):
    scored(tmp_path / name, {'copy': ({'acc': [0.0, 1.0]}, more)})
  assert compare_runs.main([str(tmp_path / 'a'), str(tmp_path / 'b'), f'--out={tmp_path / "x.svg"}']) == 0
  out, err = capsys.readouterr()
  assert (f'not comparable: other {why}' in out) == bool(why)
  assert err == (f'warning: task copy: b was scored on other {why} than a; the two are not compared\n' if why else '')


def test_tables_and_pictures(tmp_path, capsys):
  parts = {'by_length': {n: {'acc': 0.5, 'acc_stderr': 0.1, 'samples': 4} for n in ('64', '256')}}
  places = {'by_position': {n: {'loss': 2.0, 'loss_stderr': None} for n in ('1-1', '2-40')}}
  for name, value in (('a', 0.25), ('b', 0.75)):
    tasks = {'copy': ({'acc': [0.0, value]}, parts), 'loss_by_position': ({'loss': [2.0, value]}, places)}
    scored(tmp_path / name, tasks | ({'piqa': ({'acc_norm': [1.0]}, {'acc_norm_stderr': None})} if name == 'b' else {}))
  scored(tmp_path / 'a', {'copy': ({'acc': [1.0]}, {})}, step=4)  # an earlier one
  _run(tmp_path / 'none', [1.0])
  assert compare_runs.main([str(tmp_path / name) for name in ('none', 'a', 'b')] + [f'--out={tmp_path / "x"}']) == 0
  out, err = capsys.readouterr()
  rows = [_cells(line) for line in out.splitlines() if line.startswith('| ')]
  at = next(i for i, row in enumerate(rows) if row[0] == 'task')
  assert rows[at : at + 5][0] == ['task', 'metric', 'samples', 'none', 'a (step 8)', 'b (step 8)']
  assert rows[at + 2] == ['copy', 'acc', '2', '-', '0.1250 ± 0.1250', '0.3750 ± 0.3750']
  assert rows[at + 4] == ['piqa', 'acc_norm', '1', '-', '-', '1.0000']
  assert rows[at + 5] == ['task, less a', 'b'] and rows[at + 7] == ['copy', '+0.2500 ± 0.2500 (1.0 errors, paired)'] and rows[at + 9] == ['piqa', '-']
  assert 'larger than 2 standard errors' in out and not err
  picture = (tmp_path / 'x_scores.svg').read_text()
  for text in ('>copy (acc)<', '>tokens<', 'position in the context', 'trained: 16', '>a<', '>b<'):
    assert text in picture
  assert (tmp_path / 'x_scores.png').exists() and f'and {tmp_path / "x_scores.png"}' in out


@pytest.mark.parametrize(('text', 'message'), [('{', 'is damaged'), ('{"tasks": {"copy": {"acc": null}}}', 'task copy has no acc')])
def test_damaged_scores_are_one_line(tmp_path, capsys, text, message):
  folder = _run(tmp_path / 'a', [1.0])
  (tmp_path / 'a' / 'eval' / '3').mkdir(parents=True)
  (tmp_path / 'a' / 'eval' / '3' / 'results.json').write_text(text)
  assert compare_runs.main([folder, f'--out={tmp_path / "x"}']) == 2
  out, err = capsys.readouterr()
  assert err.startswith('error: ') and message in err and err.count('\n') == 1 and not out
