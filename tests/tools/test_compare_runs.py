"""Overlaid losses of several runs."""

import json

import pytest

from tools import compare_runs


def _run(folder, losses):
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps({'model': {'pattern': 'M-|*-'}}))
  lines = [
    {'step': i + 1, 'tokens': 100 * (i + 1), 'loss': loss, 'tokens_per_second': 10.0 * (i + 1)}
    for i, loss in enumerate(losses)
  ]
  lines[-1]['val_loss'] = losses[-1] + 0.25
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return str(folder)


def test_table_and_picture(tmp_path, capsys):
  out = tmp_path / 'both.svg'
  assert compare_runs.main([_run(tmp_path / 'a', [3.0, 2.0, 1.0]), _run(tmp_path / 'b', [3.0, 2.5]), f'--out={out}']) == 0
  rows = capsys.readouterr().out.splitlines()
  assert rows[2] == r'| a | `M-\|*-` | 3 | 300 | 1.000 | 1.250 | 20 |'
  picture = out.read_text()
  assert picture.startswith('<?xml') and '>a<' in picture and '>b<' in picture


@pytest.mark.parametrize('files,message', [({}, 'config.json'), ({'config.json': '{}'}, 'no losses yet')])
def test_a_folder_that_is_no_run_is_one_line(tmp_path, capsys, files, message):
  for name, text in files.items():
    (tmp_path / name).write_text(text)
  assert compare_runs.main([str(tmp_path), f'--out={tmp_path / "x.svg"}']) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and message in error and error.count('\n') == 1
  assert not (tmp_path / 'x.svg').exists()
