import gzip
import json

import pytest
import zstandard

from lmscale import config as config_lib
from lmscale.data import files, text


def texts(source):
  skipped = []
  return [document.text for document in source.documents(skipped)], skipped


def test_bytes_are_kept_except_bom_and_bad_utf8(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'\xef\xbb\xbfone\r\ntwo\x00\n')
  (tmp_path / 'b.txt').write_bytes(b'x\xff\xc3\xa9')
  (tmp_path / 'empty.txt').write_bytes(b'')
  assert texts(text.TextSource(str(tmp_path)))[0] == [b'one\r\ntwo\x00\n', 'x\ufffdé'.encode()]


def test_file_folder_and_glob(tmp_path):
  (tmp_path / 'sub dir ü').mkdir()
  for name in ('b.txt', 'a.txt', 'sub dir ü/c.txt', 'd.md'):
    (tmp_path / name).write_text(name)
  assert texts(text.TextSource(str(tmp_path)))[0] == [b'a.txt', b'b.txt', 'sub dir ü/c.txt'.encode()]
  assert texts(text.TextSource(str(tmp_path / '*.md')))[0] == [b'd.md']
  assert len(texts(text.TextSource(str(tmp_path / '**/*.txt')))[0]) == 3
  assert texts(text.TextSource(str(tmp_path / 'd.md')))[0] == [b'd.md']


def test_what_is_no_file_is_a_config_error(tmp_path):
  (tmp_path / 'folder').mkdir()
  for path, problem in (('missing.txt', 'no such file'), ('folder', r'has no \*.txt'), ('*.txt', 'matches no file'),
                        ('fold*', 'matches no file')):
    with pytest.raises(config_lib.ConfigError, match=problem) as caught:
      text.TextSource(str(tmp_path / path))
    assert str(tmp_path / path) in str(caught.value) and '\n' not in str(caught.value)
  with pytest.raises(config_lib.ConfigError, match='empty'):
    text.TextSource('')


def test_digest_follows_content_not_place(tmp_path):
  for name, content in (('a', 'one'), ('b', 'one'), ('c', 'two')):
    (tmp_path / name).mkdir()
    (tmp_path / name / f'{name}.txt').write_text(content)
  a, b, c = (text.TextSource(str(tmp_path / name)).digest() for name in 'abc')
  assert a == b != c


LINES = [
  (b'{"text": "one"}', None),
  (b'', None),
  (b'{"text": "br', 'broken JSON'),
  (b'{"body": "x"}', 'no field "text"'),
  (b'{"text": 3}', 'not a string'),
  (b'["text"]', 'not a JSON object'),
  (b'[' * 100000, 'broken JSON'),
  (b'{"text": "\xff\\u0000\\ud800"}', None),
  (b'{"text": ""}', None),
  (b'{"text": "first", "text": "last"}', 'field "text" twice'),
  (b'{"text": "inner", "x": {"text": 1, "text": 2}}', None),
]


def test_jsonl_skips_and_names_broken_lines(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'\xef\xbb\xbf' + b'\r\n'.join(line for line, _ in LINES))
  found, skipped = texts(text.JsonlSource(str(path)))
  assert found == [b'one', '\ufffd\x00\ufffd'.encode(), b'inner']
  expected = [(number, reason) for number, (_, reason) in enumerate(LINES, 1) if reason]
  assert len(skipped) == len(expected)
  for line, (number, reason) in zip(skipped, expected, strict=True):
    assert line.startswith(f'{path}:{number}: ') and reason in line


def test_jsonl_stops_after_the_limit_of_one_file(tmp_path):
  path = tmp_path / 'a.jsonl'
  good = json.dumps({'text': 'x'})
  path.write_text('\n'.join([good] + ['broken'] * text.MAX_SKIPPED))
  assert len(texts(text.JsonlSource(str(path)))[1]) == text.MAX_SKIPPED
  (tmp_path / 'b.jsonl').write_text('broken\n' * text.MAX_SKIPPED)
  assert len(texts(text.JsonlSource(str(tmp_path)))[1]) == 2 * text.MAX_SKIPPED
  path.write_text('\n'.join([good] + ['broken'] * (text.MAX_SKIPPED + 1)))
  with pytest.raises(config_lib.ConfigError, match=rf'a\.jsonl:{text.MAX_SKIPPED + 2}: ') as caught:
    texts(text.JsonlSource(str(path)))
  assert '\n' not in str(caught.value)


def test_jsonl_does_not_hold_a_huge_line(tmp_path, monkeypatch):
  monkeypatch.setattr(files, 'MAX_LINE', 64)
  monkeypatch.setattr(files, 'BLOCK', 7)
  path = tmp_path / 'a.jsonl'
  path.write_text('\n'.join(json.dumps({'text': word}) for word in ('one', 'x' * 500, 'two')))
  found, skipped = texts(text.JsonlSource(str(path)))
  assert found == [b'one', b'two']
  assert skipped == [f'{path}:2: longer than 64 bytes']


def test_a_long_file_is_cut_after_lines(tmp_path, monkeypatch):
  monkeypatch.setattr(text, 'MAX_TEXT', 16)
  monkeypatch.setattr(files, 'BLOCK', 5)
  raw = b'\xef\xbb\xbfone\ntwo\nthree\nfour and five and six\n.' + 'ü'.encode() * 20
  (tmp_path / 'a.txt').write_bytes(raw)
  found, _ = texts(text.TextSource(str(tmp_path)))
  assert b''.join(found) == raw.removeprefix(b'\xef\xbb\xbf')  # no character is cut, which would become U+FFFD
  assert found[0] == b'one\ntwo\n' and max(map(len, found)) <= 16
  (tmp_path / 'a.txt').write_bytes(b'\x80' * 40)
  assert texts(text.TextSource(str(tmp_path)))[0] == ['\ufffd'.encode() * n for n in (16, 16, 8)]
  (tmp_path / 'a.txt').write_bytes(b'sixteen letters.')
  assert texts(text.TextSource(str(tmp_path)))[0] == [b'sixteen letters.']


def test_archives_give_the_documents_of_their_text(tmp_path):
  lines = b'{"text": "one"}\nbroken\n{"text": "two"}'
  for name, raw in (('a.jsonl', lines), ('b.jsonl.gz', gzip.compress(lines)),
                    ('c.jsonl.zst', zstandard.ZstdCompressor().compress(lines)), ('d.txt.gz', gzip.compress(b'three'))):
    (tmp_path / name).write_bytes(raw)
  found, skipped = texts(text.JsonlSource(str(tmp_path)))
  assert found == [b'one', b'two'] * 3 and [line.rpartition(': ')[0] for line in skipped] == [
    f'{tmp_path / name}:2: broken JSON (Expecting value)'.rpartition(': ')[0]
    for name in ('a.jsonl', 'b.jsonl.gz', 'c.jsonl.zst')]
  assert texts(text.TextSource(str(tmp_path)))[0] == [b'three']


def test_a_truncated_archive_is_an_error_that_names_it(tmp_path):
  path = tmp_path / 'a.txt.gz'
  path.write_bytes(gzip.compress(b'text')[:-3])
  with pytest.raises(config_lib.ConfigError, match=r'a\.txt\.gz: the archive is truncated, after 4 bytes of text'):
    texts(text.TextSource(str(path)))


def test_another_field(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"body": "one", "text": "no"}\n{"text": "two"}\n')
  found, skipped = texts(text.JsonlSource(str(path), field='body'))
  assert found == [b'one'] and skipped == [f'{path}:2: no field "body"']
  assert text.JsonlSource(str(path), field='body').digest() != text.JsonlSource(str(path)).digest()


def test_what_is_replaced_is_counted(tmp_path, caplog):
  (tmp_path / 'a.txt').write_bytes('kept \ufffd'.encode())
  assert texts(text.TextSource(str(tmp_path)))[0] and not caplog.messages
  (tmp_path / 'b.txt').write_bytes('kept \ufffd '.encode() + b'\xff and \xfe')
  (tmp_path / 'c.jsonl').write_bytes(b'{"text": "fine"}\n{"text": "\xff \\ud800 \\u00e9"}\n')
  texts(text.TextSource(str(tmp_path)))
  texts(text.JsonlSource(str(tmp_path)))
  assert [message.replace(str(tmp_path), '.') for message in caplog.messages] == [
    '2 pieces of invalid UTF-8 became U+FFFD, the first in ./b.txt',
    '2 pieces of invalid UTF-8 became U+FFFD, the first in ./c.jsonl:2',
  ]
