"""Several runs side by side: the table, the difference of their configs, the picture, and folders that are no runs."""

import dataclasses
import json
import math

import pytest

from lmscale import config as config_lib
from lmscale.models.flops import flops_per_token
from tools import compare_runs

SMALL = config_lib.Config(model=config_lib.ModelConfig(pattern='M-|*-'), train=config_lib.TrainConfig(seq_len=16))


def _run(folder, losses, config=SMALL, validation=True, **extra):
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(json.dumps(config_lib.to_dict(config)))
  lines = [
    {'step': i + 1, 'tokens': 100 * (i + 1), 'loss': loss, 'tokens_per_second': 10.0 * (i + 1), **extra}
    for i, loss in enumerate(losses)
  ]
  if validation:
    lines[-1] |= {'val_loss': losses[-1] + 0.25, 'val_bits_per_byte': (losses[-1] + 0.25) / math.log(2)}
    lines[0] |= {'val_loss': losses[-1] + 0.125, 'val_bits_per_byte': (losses[-1] + 0.125) / math.log(2)}
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return str(folder)


def _cells(row):
  return [cell.strip() for cell in row.replace(r'\|', '!').strip('|').split('|')]


def test_table_difference_and_pictures(tmp_path, capsys):
  other = dataclasses.replace(SMALL, seed=3, model=dataclasses.replace(SMALL.model, pattern='*-', d_model=64))
  folders = [_run(tmp_path / 'a', [3.0, 2.0, 1.0]), _run(tmp_path / 'b', [3.0, 2.5], other)]
  assert compare_runs.main([*folders, f'--out={tmp_path / "both"}']) == 0
  out, err = capsys.readouterr()
  table, changed, _ = out.split('\n\n')
  first = dict(zip(_cells(table.splitlines()[0]), _cells(table.splitlines()[2]), strict=True))
  flops = flops_per_token(SMALL.model, 16) * 300
  seconds = 100 / 10 + 100 / 20 + 100 / 30
  assert first == {
    'run': 'a', 'pattern': '`M-!*-`', 'parameters': first['parameters'], 'steps': '3', 'tokens': '300',
    'FLOPs': f'{flops:.3g}', 'time in steps': f'{seconds:.0f}s', 'wall time': '-', 'training loss': '1.000', 'validation loss': '1.250',
    'best': '1.125 at 1', 'bits per byte': f'{1.25 / math.log(2):.3f}', 'tokens/s': '20',
  }  # fmt: skip
  assert [_cells(row) for row in changed.splitlines()[2:]] == [
    ['seed', '0', '3'], ['model.pattern', '"M-!*-"', '"*-"'], ['model.d_model', '128', '64'],
  ]  # fmt: skip
  assert not err
  picture = (tmp_path / 'both.svg').read_text()
  for text in ('>a<', '>b<', 'training tokens', 'training FLOPs', 'time in steps', 'nats / token'):
    assert text in picture
  assert (tmp_path / 'both.png').read_bytes().startswith(b'\x89PNG')
  assert {p.name for p in tmp_path.iterdir()} == {'a', 'b', 'both.svg', 'both.png'}


def test_a_field_of_a_layer_kind_that_no_run_has_is_not_shown(tmp_path, capsys):
  mamba = dataclasses.replace(SMALL.model, mamba=config_lib.MambaConfig(state=8))
  other = dataclasses.replace(SMALL, model=mamba)
  folders = [_run(tmp_path / 'a', [1.0]), _run(tmp_path / 'b', [1.0], other)]
  assert compare_runs.main([*folders, f'--out={tmp_path / "x.svg"}']) == 0
  assert 'The configs are the same.' in capsys.readouterr().out
  assert not (tmp_path / 'x.png').exists()


@pytest.mark.parametrize('measured', [True, False])
def test_other_tokenizers_are_drawn_in_bits_per_byte_if_all_have_them(tmp_path, capsys, measured):
  other = dataclasses.replace(SMALL, data=dataclasses.replace(SMALL.data, tokenizer='other.json'))
  folders = [_run(tmp_path / 'a', [2.0, 1.0]), _run(tmp_path / 'b', [4.0, 3.0], other, validation=measured)]
  assert compare_runs.main([*folders, f'--out={tmp_path / "x.svg"}']) == 0
  err, picture = capsys.readouterr().err, (tmp_path / 'x.svg').read_text()
  assert err.startswith('warning: the runs have different tokenizers')
  assert ('bits / byte' in picture) == measured == ('the picture is in bits per byte' in err)


def test_other_data_is_warned_about(tmp_path, capsys):
  other = dataclasses.replace(SMALL, data=dataclasses.replace(SMALL.data, validation=0.1))
  folders = [_run(tmp_path / 'a', [1.0]), _run(tmp_path / 'b', [1.0], other)]
  assert compare_runs.main([*folders, f'--out={tmp_path / "x.svg"}']) == 0
  assert 'warning: the runs read different data' in capsys.readouterr().err


def test_many_short_runs_of_one_name_without_rates(tmp_path, capsys):
  folders = [_run(tmp_path / str(i) / '$run$', [2.0 + i], validation=False, tokens_per_second=None) for i in range(10)]
  assert compare_runs.main([*folders, f'--out={tmp_path / "x.svg"}']) == 0
  rows = capsys.readouterr().out.splitlines()
  assert _cells(rows[2])[0] == '0/$run$' and _cells(rows[11])[0] == '9/$run$'
  assert _cells(rows[2])[6] == _cells(rows[2])[-1] == _cells(rows[2])[9] == '-'


def test_measured_seconds_are_used_where_there_are_some(tmp_path, capsys):
  folder = _run(tmp_path / 'a', [2.0, 1.0], seconds={'startup': 5.0, 'steps': 70.0, 'data_wait': 2.0, 'lost': 4.0})
  assert compare_runs.main([folder, f'--out={tmp_path / "x.svg"}']) == 0
  assert _cells(capsys.readouterr().out.splitlines()[2])[6:8] == ['1:12', '1:21']


BAD = {
  'no such folder': None,
  'No such file': {},
  'not JSON': {'config.json': '{'},
  'config.json: not a config of this version': {'config.json': '{"sed": 1}'},
  'no losses yet': {'config.json': '{}'},
  'no losses': {'config.json': '{}', 'metrics.jsonl': '{"step": 1, "tokens": "many", "loss": null}\n{"torn'},
}


@pytest.mark.parametrize('message', BAD)
def test_a_folder_that_is_no_run_is_one_line(tmp_path, capsys, message):
  good, bad = _run(tmp_path / 'good', [1.0]), tmp_path / 'ba\x1bd'
  if BAD[message] is not None:
    bad.mkdir()
    for name, text in BAD[message].items():
      (bad / name).write_text(text)
  _refused(capsys, tmp_path, [good, str(bad), f'--out={tmp_path / "x.svg"}'], message)


@pytest.mark.parametrize(
  ('more', 'message'),
  [
    (['good'], 'given twice'), (['good/config.json'], 'a file, not the folder'), (['--out=nowhere/x.svg'], 'no folder nowhere'),
    (['--out=.svg/../good'], '--out: no folder'), (['--out=pictures.svg'], 'is a folder'),
  ],
)  # fmt: skip
def test_arguments_that_cannot_be(tmp_path, capsys, monkeypatch, more, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'pictures.svg').mkdir()
  _run(tmp_path / 'good', [1.0])
  _refused(capsys, tmp_path, ['good', *more], message)


def _refused(capsys, folder, argv, message):
  before = sorted(folder.rglob('*'))
  assert compare_runs.main(argv) == 2
  out, err = capsys.readouterr()
  assert err.startswith('error: ') and message in err and err.count('\n') == 1 and '\x1b' not in err
  assert not out and sorted(folder.rglob('*')) == before
