import gzip
import json

import pytest
import zstandard

from lmscale import config as config_lib
from lmscale.data.reading_notes import Notes
from lmscale.data.sources import file_streams, text_files


def texts(source):
  notes = Notes()
  return [document.text for document in source.documents(notes)], notes.skipped


def test_bytes_are_kept_except_bom_and_bad_utf8(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'\xef\xbb\xbfone\r\ntwo\x00\n')
  (tmp_path / 'b.txt').write_bytes(b'x\xff\xc3\xa9')
  (tmp_path / 'empty.txt').write_bytes(b'')
  assert texts(text_files.TextSource(str(tmp_path)))[0] == [b'one\r\ntwo\x00\n', 'x\ufffdé'.encode()]


def test_file_folder_and_glob(tmp_path):
  (tmp_path / 'sub dir ü').mkdir()
  for name in ('b.txt', 'a.txt', 'sub dir ü/c.txt', 'd.md'):
    (tmp_path / name).write_text(name)
  assert texts(text_files.TextSource(str(tmp_path)))[0] == [b'a.txt', b'b.txt', 'sub dir ü/c.txt'.encode()]
  assert texts(text_files.TextSource(str(tmp_path / '*.md')))[0] == [b'd.md']
  assert len(texts(text_files.TextSource(str(tmp_path / '**/*.txt')))[0]) == 3
  assert texts(text_files.TextSource(str(tmp_path / 'd.md')))[0] == [b'd.md']


def test_what_is_no_file_is_a_config_error(tmp_path):
  (tmp_path / 'folder').mkdir()
  for path, problem in (('missing.txt', 'no such file'), ('folder', r'has no \*.txt'), ('*.txt', 'matches no file'),
                        ('fold*', 'matches no file')):
    with pytest.raises(config_lib.ConfigError, match=problem) as caught:
      text_files.TextSource(str(tmp_path / path))
    assert str(tmp_path / path) in str(caught.value) and '\n' not in str(caught.value)
  with pytest.raises(config_lib.ConfigError, match='empty'):
    text_files.TextSource('')


def test_digest_follows_content_not_place(tmp_path):
  for name, content in (('a', 'one'), ('b', 'one'), ('c', 'two')):
    (tmp_path / name).mkdir()
    (tmp_path / name / f'{name}.txt').write_text(content)
  a, b, c = (text_files.TextSource(str(tmp_path / name)).digest() for name in 'abc')
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
  found, skipped = texts(text_files.JsonlSource(str(path)))
  assert found == [b'one', '\ufffd\x00\ufffd'.encode(), b'inner']
  expected = [(number, reason) for number, (_, reason) in enumerate(LINES, 1) if reason]
  assert len(skipped) == len(expected)
  for line, (number, reason) in zip(skipped, expected, strict=True):
    assert line.startswith(f'{path}:{number}: ') and reason in line


def test_jsonl_stops_after_the_limit_of_one_file(tmp_path):
  path = tmp_path / 'a.jsonl'
  good = json.dumps({'text': 'x'})
  path.write_text('\n'.join([good] + ['broken'] * text_files.MAX_SKIPPED))
  assert len(texts(text_files.JsonlSource(str(path)))[1]) == text_files.MAX_SKIPPED
  (tmp_path / 'b.jsonl').write_text('broken\n' * text_files.MAX_SKIPPED)
  assert len(texts(text_files.JsonlSource(str(tmp_path)))[1]) == 2 * text_files.MAX_SKIPPED
  path.write_text('\n'.join([good] + ['broken'] * (text_files.MAX_SKIPPED + 1)))
  with pytest.raises(config_lib.ConfigError, match=rf'a\.jsonl:{text_files.MAX_SKIPPED + 2}: ') as caught:
    texts(text_files.JsonlSource(str(path)))
  assert '\n' not in str(caught.value)


def test_jsonl_does_not_hold_a_huge_line(tmp_path, monkeypatch):
  monkeypatch.setattr(file_streams, 'MAX_LINE', 64)
  monkeypatch.setattr(file_streams, 'BLOCK', 7)
  path = tmp_path / 'a.jsonl'
  path.write_text('\n'.join(json.dumps({'text': word}) for word in ('one', 'x' * 500, 'two')))
  found, skipped = texts(text_files.JsonlSource(str(path)))
  assert found == [b'one', b'two']
  assert skipped == [f'{path}:2: longer than 64 bytes']


def test_a_long_file_is_cut_after_lines(tmp_path, monkeypatch):
  monkeypatch.setattr(text_files, 'MAX_TEXT', 16)
  monkeypatch.setattr(file_streams, 'BLOCK', 5)
  raw = b'\xef\xbb\xbfone\ntwo\nthree\nfour and five and six\n.' + 'ü'.encode() * 20
  (tmp_path / 'a.txt').write_bytes(raw)
  found, _ = texts(text_files.TextSource(str(tmp_path)))
  assert b''.join(found) == raw.removeprefix(b'\xef\xbb\xbf')  # no character is cut, which would become U+FFFD
  assert found[0] == b'one\ntwo\n' and max(map(len, found)) <= 16
  (tmp_path / 'a.txt').write_bytes(b'\x80' * 40)
  assert texts(text_files.TextSource(str(tmp_path)))[0] == ['\ufffd'.encode() * n for n in (16, 16, 8)]
  (tmp_path / 'a.txt').write_bytes(b'sixteen letters.')
  assert texts(text_files.TextSource(str(tmp_path)))[0] == [b'sixteen letters.']


def test_archives_give_the_documents_of_their_text(tmp_path):
  lines = b'{"text": "one"}\nbroken\n{"text": "two"}'
  for name, raw in (('a.jsonl', lines), ('b.jsonl.gz', gzip.compress(lines)),
                    ('c.jsonl.zst', zstandard.ZstdCompressor().compress(lines)), ('d.txt.gz', gzip.compress(b'three'))):
    (tmp_path / name).write_bytes(raw)
  found, skipped = texts(text_files.JsonlSource(str(tmp_path)))
  assert found == [b'one', b'two'] * 3 and [line.rpartition(': ')[0] for line in skipped] == [
    f'{tmp_path / name}:2: broken JSON (Expecting value)'.rpartition(': ')[0]
    for name in ('a.jsonl', 'b.jsonl.gz', 'c.jsonl.zst')]
  assert texts(text_files.TextSource(str(tmp_path)))[0] == [b'three']


def test_a_truncated_archive_is_an_error_that_names_it(tmp_path):
  path = tmp_path / 'a.txt.gz'
  path.write_bytes(gzip.compress(b'text')[:-3])
  with pytest.raises(config_lib.ConfigError, match=r'a\.txt\.gz: the archive is truncated, after 4 bytes of text'):
    texts(text_files.TextSource(str(path)))


def test_another_field(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"body": "one", "text": "no"}\n{"text": "two"}\n')
  found, skipped = texts(text_files.JsonlSource(str(path), field='body'))
  assert found == [b'one'] and skipped == [f'{path}:2: no field "body"']
  assert text_files.JsonlSource(str(path), field='body').digest() != text_files.JsonlSource(str(path)).digest()


def notes_of(source):
  notes = Notes()
  list(source.documents(notes))
  return notes


def test_what_is_replaced_is_counted(tmp_path):
  (tmp_path / 'a.txt').write_bytes('kept \ufffd'.encode())
  assert notes_of(text_files.TextSource(str(tmp_path))).lines() == []
  (tmp_path / 'b.txt').write_bytes('kept \ufffd '.encode() + b'\xff and \xfe')
  (tmp_path / 'c.jsonl').write_bytes(b'{"text": "fine"}\n{"text": "\xff \\ud800 \\u00e9"}\n')
  assert notes_of(text_files.TextSource(str(tmp_path))).lines() == [
    f'2 pieces of invalid UTF-8 became U+FFFD, the first in {tmp_path}/b.txt']
  assert notes_of(text_files.JsonlSource(str(tmp_path))).lines() == [
    f'2 pieces of invalid UTF-8 became U+FFFD, the first in {tmp_path}/c.jsonl:2']


@pytest.mark.parametrize('field', ['text', 'té', 'a"b\\', 'x y', '\U0001f600'])
def test_a_field_twice_is_seen_however_it_is_written(tmp_path, field):
  path = tmp_path / 'a.jsonl'
  spellings = {json.dumps(field), json.dumps(field, ensure_ascii=False),
               '"' + ''.join(f'\\u{ord(c):04x}' if ord(c) < 1 << 16 else json.dumps(c)[1:-1] for c in field) + '"'}
  lines = [f'{{{a}: "one", "x": {{{b}: 1, {b}: 2}}, {b}: "two"}}' for a in spellings for b in spellings]
  lines += [f'{{{a}: "kept", "x": [{{{a}: "inner"}}, {{{a}: "inner"}}], "y": "{{}}", "y": 2}}' for a in spellings]
  path.write_text('\n'.join(lines), encoding='utf-8')
  found, skipped = texts(text_files.JsonlSource(str(path), field=field))
  assert found == [b'kept'] * len(spellings)
  assert [line.rpartition(': ')[2] for line in skipped] == [
    f'field {json.dumps(field, ensure_ascii=False)} twice'] * len(spellings)**2


MARKED = ['utf-16-le', 'utf-16-be', 'utf-32-le', 'utf-32-be']


@pytest.mark.parametrize('encoding', MARKED)
@pytest.mark.parametrize('pack', [bytes, gzip.compress, zstandard.ZstdCompressor().compress], ids=['plain', 'gz', 'zst'])
def test_marked_encodings_are_decoded(tmp_path, encoding, pack, monkeypatch):
  words = 'naïve, 日本語 and \U0001f600\r\nsecond line\n' * 30
  monkeypatch.setattr(file_streams, 'BLOCK', 7)  # characters lie across blocks
  (tmp_path / 'a.txt').write_bytes(pack(('\ufeff' + words).encode(encoding)))
  lines = [json.dumps({'text': f'{i} é\U0001f600'}, ensure_ascii=i % 2 == 0) for i in range(40)]
  (tmp_path / 'a.jsonl').write_bytes(pack(('\ufeff' + '\n'.join(lines)).encode(encoding)))
  assert texts(text_files.TextSource(str(tmp_path / 'a.txt'))) == ([words.encode()], [])
  assert texts(text_files.JsonlSource(str(tmp_path / 'a.jsonl'))) == ([json.loads(line)['text'].encode() for line in lines], [])
  assert notes_of(text_files.TextSource(str(tmp_path))).lines() == [
    f'1 texts were decoded by their byte order mark, the first in {tmp_path}/a.txt']


@pytest.mark.parametrize('pack', [bytes, gzip.compress], ids=['plain', 'gz'])
def test_damage_of_a_marked_encoding_is_counted(tmp_path, pack):
  raw = b'\xff\xfe' + b'a\0b\0' + b'\x00\xd8' + b'c\0' + b'\x00\xdc' + '\ufffd'.encode('utf-16-le') + b'd\0' + b'e'
  (tmp_path / 'a.txt').write_bytes(pack(raw))
  assert texts(text_files.TextSource(str(tmp_path)))[0] == ['ab\ufffdc\ufffd\ufffdd\ufffd'.encode()]
  assert notes_of(text_files.TextSource(str(tmp_path))).replaced == 3
  (tmp_path / 'a.txt').write_bytes(pack(b'\0\0\xfe\xff' + b'\0\0\0a' + b'\0\x11\0\0' + b'\0\0\0b'))
  assert texts(text_files.TextSource(str(tmp_path)))[0] == ['a\ufffdb'.encode()]


@pytest.mark.parametrize('encoding', ['latin-1', 'cp1251', 'utf-16-le', 'utf-16-be', 'utf-32-le'])
@pytest.mark.parametrize('ending', ['txt', 'jsonl'])
def test_another_encoding_without_a_mark_is_an_error(tmp_path, encoding, ending):
  words = 'пример текста ' * 50 if encoding == 'cp1251' else 'ça et là, déjà vu ' * 50
  raw = json.dumps({'text': words}, ensure_ascii=False) + '\n' if ending == 'jsonl' else words
  path = tmp_path / f'a.{ending}'
  path.write_bytes(raw.encode(encoding))
  kind = text_files.TextSource if ending == 'txt' else text_files.JsonlSource
  with pytest.raises(config_lib.ConfigError, match=rf'data file {path}: [\d,]+ of [\d,]+ bytes are NUL or no UTF-8.*iconv') as caught:
    texts(kind(str(path)))
  assert '\n' not in str(caught.value)


def test_one_percent_is_damage_and_more_is_not(tmp_path):
  def read(bad, good):
    (tmp_path / 'a.txt').write_bytes(b'\xff' * bad + b'a' * good)
    return texts(text_files.TextSource(str(tmp_path)))[0]
  assert read(100, 9_900) == ['\ufffd'.encode() * 100 + b'a' * 9_900]
  assert read(64, 0) == ['\ufffd'.encode() * 64]  # a few bytes are no encoding
  with pytest.raises(config_lib.ConfigError, match=r'101 of 10,000 bytes are NUL or no UTF-8, 1.0%, and 1% is the most'):
    read(101, 9_899)
  with pytest.raises(config_lib.ConfigError, match='65 of 65 bytes'):
    read(65, 0)
  (tmp_path / 'a.txt').write_bytes('\ufffd'.encode() * 900)  # genuine ones are text
  assert len(texts(text_files.TextSource(str(tmp_path)))[0][0]) == 2700


def test_many_small_files_in_another_encoding_are_an_error(tmp_path):
  for i in range(30):
    (tmp_path / f'{i:02}.txt').write_bytes(b'un peu d\xe9j\xe0 vu, mais \xe7a va')
  with pytest.raises(config_lib.ConfigError, match=rf'30 data files, the first of them {tmp_path}/00.txt: 90 of 780 bytes'):
    texts(text_files.TextSource(str(tmp_path)))
