import gzip
import json

import pytest

from lmscale.data.tokenizer import get_tokenizer
from tools import train_tokenizer

TEXT = 'def encode(self, text):\n\treturn  self.encode_batch([text])[0]\n\nthe quick brown fox\n'


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('LMSCALE_CACHE', str(tmp_path / 'cache'))


@pytest.fixture
def corpus(tmp_path):
  (tmp_path / 'a.txt').write_text(TEXT * 5)
  lines = [json.dumps({'body': TEXT + 'x' * 9000 + str(i)}) for i in range(20)]
  (tmp_path / 'b.jsonl.gz').write_bytes(gzip.compress('\n'.join([*lines, 'broken']).encode()))
  return ['--input', f'text:{tmp_path}', '--input', f'jsonl:{tmp_path}', '--field', 'body', '--vocab', '320']


@pytest.mark.parametrize('name', ['tokenizer.json', 'spiece.model'])
def test_a_file_that_keeps_every_text_and_is_made_alike_twice(tmp_path, corpus, name, capsys):
  out = tmp_path / name
  assert train_tokenizer.main([*corpus, '--out', str(out)]) == 0
  tokenizer = get_tokenizer(str(out))
  said, err = capsys.readouterr()
  assert tokenizer.size <= 320 and f'{tokenizer.size} ids' in said and tokenizer.identity in said
  assert f'--config.data.tokenizer={out} --config.model.vocab={tokenizer.size}' in said
  assert f'{tmp_path / "b.jsonl.gz"}:21: broken JSON' in err
  text = TEXT + '\tü 漢字\0  <|endoftext|></s>'
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text and len(tokenizer.encode(TEXT)) < 0.7 * len(TEXT)
  assert train_tokenizer.main([*corpus, '--out', str(tmp_path / f'again.{name}')]) == 0
  assert (tmp_path / f'again.{name}').read_bytes() == out.read_bytes()
  assert not list(tmp_path.glob('*.tmp'))


def test_only_so_much_text_is_used(tmp_path, corpus, capsys):
  for limit in ('500', '1000000'):
    assert train_tokenizer.main([*corpus, '--max_bytes', limit, '--out', str(tmp_path / f'{limit}.json')]) == 0
    assert ('only the first' in capsys.readouterr().err) == (limit == '500')
  assert (tmp_path / '500.json').read_bytes() != (tmp_path / '1000000.json').read_bytes()


@pytest.mark.parametrize(('change', 'message'), [
  (['--out', 'a.txt'], '--out: a.txt must end with .json or .model'),
  (['--vocab', '256', '--out', 'a.json'], '--vocab: 256 is less than 300'),
  (['--input', 'books', '--out', 'a.json'], "'books' is no source; write KIND:PATH with a kind of stdlib, text, jsonl, tfds"),
  (['--input', 'megatron:x', '--out', 'a.json'], "'megatron:x' is no source"),
  (['--input', 'text:/missing', '--out', 'a.json'], "path '/missing': no such file or folder"),
  (['--out', 'no/such/folder/a.json'], '--out: the folder of no/such/folder/a.json does not exist'),
])
def test_mistakes_are_one_line(tmp_path, monkeypatch, corpus, capsys, change, message):
  monkeypatch.chdir(tmp_path)
  before = sorted(tmp_path.rglob('*'))
  assert train_tokenizer.main([*corpus, *change]) == 2
  said = capsys.readouterr().err.splitlines()
  assert said[-1].startswith('error: ') and message in said[-1]
  assert sorted(tmp_path.rglob('*')) == before


def test_an_existing_tokenizer_is_never_replaced(tmp_path, corpus, capsys):
  (tmp_path / 'a.json').write_text('mine')
  assert train_tokenizer.main([*corpus, '--out', str(tmp_path / 'a.json')]) == 2
  assert 'exists' in capsys.readouterr().err and (tmp_path / 'a.json').read_text() == 'mine'
  with pytest.raises(train_tokenizer.ConfigError, match='File exists'):
    train_tokenizer.write_new(tmp_path / 'a.json', b'other')
  assert (tmp_path / 'a.json').read_text() == 'mine' and not list(tmp_path.glob('*.tmp'))
