import json
import pathlib
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
from made import CORPUS, make_bpe, make_sentencepiece
from tokenizers import models, normalizers, pre_tokenizers, processors

from lmscale.data import tokenizer_files
from lmscale.data.tokenizer import get_tokenizer
from lmscale.errors import ConfigError


@pytest.fixture(scope='module')
def names(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tokenizers')
  return make_bpe(folder / 'tokenizer.json'), make_sentencepiece(folder / 'spiece.model')


@pytest.fixture(params=[0, 1], ids=['tokenizer.json', 'model'])
def name(request, names):
  return names[request.param]


@hypothesis.settings(deadline=None, max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(text=st.text(max_size=60))
def test_text_survives_the_round_trip(name, text):
  tokenizer = get_tokenizer(name)
  ids = tokenizer.encode(text)
  assert ids.dtype == np.uint16 and ids.max(initial=0) < tokenizer.size and tokenizer.end not in ids
  assert tokenizer.decode(ids) == text
  assert np.array_equal(tokenizer.encode(text.encode()), ids)


def test_a_batch_is_the_single_texts(name):
  tokenizer = get_tokenizer(name)
  texts = [text.encode() for text in (*CORPUS[:2], '', 'x', '\n')]
  for ids, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
    assert np.array_equal(ids, tokenizer.encode(text))
  assert tokenizer.encode_batch([]) == []
  assert tokenizer.encode('').size == 0 and len(tokenizer.encode(CORPUS[0])) < 0.6 * len(CORPUS[0])


def test_bad_text_is_replaced_and_nul_kept(name):
  tokenizer = get_tokenizer(name)
  assert tokenizer.decode(tokenizer.encode('a\ud800b')) == 'a\ufffdb'
  assert tokenizer.decode(tokenizer.encode(b'a\xffb')) == 'a\ufffdb'
  assert tokenizer.decode(tokenizer.encode('a\0b')) == 'a\0b'


def test_decode_drops_the_end_and_shows_ids_that_there_are_not(name):
  tokenizer = get_tokenizer(name)
  ids = tokenizer.encode('hello').tolist()
  assert tokenizer.decode([tokenizer.end, *ids, tokenizer.end]) == 'hello'
  assert tokenizer.decode([*ids, tokenizer.size, 10**9, -1, *ids]) == 'hello\ufffd\ufffd\ufffdhello'
  assert tokenizer.decode(np.array(ids)) == 'hello' and tokenizer.decode(iter(ids)) == 'hello'


def test_text_that_names_special_tokens_stays_text(names):
  for name, written in zip(names, ('<|endoftext|>', '</s>'), strict=True):
    tokenizer = get_tokenizer(name)
    ids = tokenizer.encode(f'a{written}b')
    assert tokenizer.end not in ids and tokenizer.decode(ids) == f'a{written}b'
  assert get_tokenizer(names[0]).end == 1 and get_tokenizer(names[1]).end == 2


def test_settings_in_the_file_that_would_change_ids_are_switched_off(tmp_path, names):
  def change(tokenizer):
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.model.dropout = 0.5
    tokenizer.post_processor = processors.TemplateProcessing(single='<|endoftext|> $A', special_tokens=[('<|endoftext|>', 1)])

  plain, changed = get_tokenizer(names[0]), get_tokenizer(make_bpe(tmp_path / 'tokenizer.json', change))
  for text in (''.join(CORPUS), 'short'):  # longer than the truncation, shorter than the padding
    assert np.array_equal(plain.encode(text), changed.encode(text))
    assert np.array_equal(changed.encode(text), changed.encode(text))


def test_a_long_text_is_tokenised_in_parts(name, monkeypatch):
  tokenizer = get_tokenizer(name)
  text = ''.join(CORPUS) + 'x' * 300 + ' y' * 200
  monkeypatch.setattr(tokenizer_files, 'PIECE', 100)
  parts = list(tokenizer_files.cut(text))
  assert ''.join(parts) == text and max(map(len, parts)) <= 100 and parts[0].endswith('\n')
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert ids.tolist() == [int(i) for part in parts for i in tokenizer.encode(part)]


def test_identity_is_kind_and_content(tmp_path, names):
  first = get_tokenizer(names[0]).identity
  assert first.startswith('tokenizer.json-v1:') and get_tokenizer(names[1]).identity.startswith('sentencepiece-v1:')
  raw = pathlib.Path(names[0]).read_bytes()
  (tmp_path / 'moved.json').write_bytes(raw)
  (tmp_path / 'other.json').write_bytes(raw + b'\n')
  assert get_tokenizer(str(tmp_path / 'moved.json')).identity == first
  assert get_tokenizer(str(tmp_path / 'other.json')).identity != first


def test_large_vocabularies_take_int32(tmp_path):
  words = {f'w{i}': i for i in range(1 << 16)} | {'</s>': 1 << 16}
  tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token='w0'))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.add_special_tokens(['</s>'])
  tokenizer.save(str(tmp_path / 'words.json'))
  found = get_tokenizer(str(tmp_path / 'words.json'))
  assert found.encode('w5 w65535').tolist() == [5, 65535] and found.encode('w5').dtype == np.int32
  assert (found.size, found.end) == ((1 << 16) + 1, 1 << 16)


def rejected(name):
  with pytest.raises(ConfigError) as caught:
    get_tokenizer(name)
  message = str(caught.value)
  assert message.startswith('data.tokenizer: ') and '\n' not in message and len(message) < 500
  return message


def test_what_is_no_tokenizer_is_one_clear_line(tmp_path, names, capfd):
  assert 'not bytes nor the path' in rejected('bpe')
  assert 'No such file' in rejected(str(tmp_path / 'missing.json'))
  (tmp_path / 'folder.json').mkdir()
  assert 'is a folder' in rejected(str(tmp_path / 'folder.json'))
  assert 'not bytes nor' in rejected('a\0.json')
  whole = pathlib.Path(names[0]).read_bytes()
  for i, raw in enumerate((b'', b'{}', b'[]', b'3', b'\xff\xfe', whole[:500], whole[:-2], whole.replace(b'"BPE"', b'"XYZ"'))):
    (tmp_path / f'{i}.json').write_bytes(raw)
    assert 'is damaged or no tokenizer' in rejected(str(tmp_path / f'{i}.json'))
  whole = pathlib.Path(names[1]).read_bytes()
  for i, raw in enumerate((b'', b'garbage', whole[:100], whole[:-1], b'\0' * 50)):
    (tmp_path / f'{i}.model').write_bytes(raw)
    assert 'is damaged or no tokenizer' in rejected(str(tmp_path / f'{i}.model'))


def test_a_tokenizer_without_an_end_is_rejected(tmp_path, names):
  raw = json.loads(pathlib.Path(names[0]).read_bytes())
  raw['added_tokens'] = [token for token in raw['added_tokens'] if token['content'] != '<|endoftext|>']
  (tmp_path / 'a.json').write_text(json.dumps(raw))
  assert 'no special token ends a document; it needs one of <|endoftext|>' in rejected(str(tmp_path / 'a.json'))
  name = make_sentencepiece(tmp_path / 'a.model', eos_id=-1)
  assert 'no end-of-sentence piece' in rejected(name)


def test_a_missing_package_names_the_extra(monkeypatch, names, tmp_path):
  tokenizer_files._open.cache_clear()
  for name, package in zip(names, ('tokenizers', 'sentencepiece'), strict=True):
    monkeypatch.setitem(sys.modules, package, None)
    assert f"needs the package {package}; install it with: pip install -e '.[data]'" in rejected(name)


def test_a_tokenizer_that_changes_text_is_noted_once(tmp_path):
  from lmscale.data import token_cache
  from lmscale.data.sources.text_files import TextSource
  name = make_bpe(tmp_path / 'lower.json', lambda tokenizer: setattr(tokenizer, 'normalizer', normalizers.Lowercase()))
  for i in range(3):
    (tmp_path / f'{i}.txt').write_text(f'Text {i}')
  notice, = token_cache.tokenise(TextSource(str(tmp_path)), get_tokenizer(name), tmp_path / 'cache').notices
  assert "'Text 0' came back as 'text 0'" in notice
