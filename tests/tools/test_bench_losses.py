import pathlib
import sys

from tools import bench_losses

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'data'))
from made import CORPUS, make_bpe, make_sentencepiece


def test_a_line_for_each_tokenizer(tmp_path, capsys):
  (tmp_path / 'a.txt').write_text(''.join(CORPUS) + '你好')
  names = [make_bpe(tmp_path / 'a.json'), make_sentencepiece(tmp_path / 'a.model', byte_fallback=False, character_coverage=1.0,
                                                             hard_vocab_limit=False)]
  assert bench_losses.main(['--input', f'text:{tmp_path}/a.txt', *(f'--tokenizer={name}' for name in names)]) == 0
  first, second = capsys.readouterr().out.splitlines()
  assert 'ratio' in first and '; 0 of ' in first and '; 2 of ' in second
  assert bench_losses.main(['--tokenizer=none.json']) == 2 and 'No such file' in capsys.readouterr().err
