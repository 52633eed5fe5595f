"""No text becomes a special token, whatever kind of tokenizer, and however the text spells it."""

import json
import pathlib
import re

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers
from made import CORPUS, make_bpe, make_sentencepiece
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from lmscale.data import tokenizer_files
from lmscale.data.tokenizer import get_tokenizer
from lmscale.errors import ConfigError

SPECIALS = ['<pad>', '</s>', '<unk>', '<|im_start|>', '§']
LETTERS = sorted({*'abcdefghijklmnopqrstuvwxyz<>/|_ \n\t!0123456789AX▁', *''.join(CORPUS)})
BYTES = [f'<0x{byte:02X}>' for byte in range(256)]
UNKNOWN = 2


def numbered(*names):
  return {name: i for i, name in enumerate(dict.fromkeys(names))}


def metaspace_decoder():
  return decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()])


def unigram(**options):
  vocab = [(name, 0.0) for name in SPECIALS] + [(name, -5.0) for name in LETTERS]
  if options.get('byte_fallback'):
    vocab += [(name, 0.0) for name in BYTES]
  made = tokenizers.Tokenizer(models.Unigram(vocab, UNKNOWN, **options))
  made.decoder = metaspace_decoder()
  return made


def word_level(pre_tokenizer=None):
  made = tokenizers.Tokenizer(models.WordLevel(numbered(*SPECIALS, 'the', 'a', *LETTERS), unk_token='<unk>'))
  made.pre_tokenizer = pre_tokenizer or pre_tokenizers.WhitespaceSplit()
  return made


def word_piece():
  made = tokenizers.Tokenizer(models.WordPiece(numbered(*SPECIALS, *LETTERS, *('##' + c for c in LETTERS)), unk_token='<unk>'))
  made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return made


def bpe(merges=(), names=(), **options):
  joined = [a + b for a, b in merges]
  names = [*SPECIALS, *LETTERS, *joined, *(BYTES if options.get('byte_fallback') else ()), *names]
  return tokenizers.Tokenizer(models.BPE(numbered(*names), list(merges), unk_token='<unk>', **options))


END_MERGES = [('<', '/'), ('</', 's'), ('</s', '>'), ('</s>', '\n'), ('a', 'n')]


def byte_level(**changes):
  made = tokenizers.Tokenizer(models.BPE(**changes))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  texts = ['the end</s> of </s></s> <pad>', '<|im_start|>'] * 30  # so that the spellings are learnt as words
  made.train_from_iterator(texts, trainers.BpeTrainer(
    vocab_size=400, special_tokens=['<pad>', '<unk>'], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  return made


def replacing():
  made = unigram(byte_fallback=True)
  made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace('END', '</s>'), normalizers.Lowercase()])
  return made


KINDS = {
  'unigram': unigram,
  'unigram with bytes': lambda: unigram(byte_fallback=True),
  'unigram, NFKC and Replace': replacing,
  'words': word_level,
  'words of characters': lambda: word_level(pre_tokenizers.Split('', 'isolated')),
  'words by punctuation': lambda: word_level(pre_tokenizers.Whitespace()),
  'word pieces': word_piece,
  'bpe': bpe,
  'bpe whose merges spell it': lambda: bpe(END_MERGES),
  'bpe with bytes whose merges spell it': lambda: bpe(END_MERGES, byte_fallback=True),
  'bpe that looks words up': lambda: bpe(names=['</s>'], ignore_merges=True),
  'byte-level bpe': byte_level,
}


@pytest.fixture(scope='module', params=KINDS)
def hugging_face(request, tmp_path_factory):
  made = KINDS[request.param]()
  specials = SPECIALS[:4] if request.param == 'byte-level bpe' else SPECIALS  # in which § is the letter of a byte
  made.add_special_tokens(specials)
  path = tmp_path_factory.mktemp('special') / 'tokenizer.json'
  made.save(str(path))
  ids = {made.token_to_id(name) for name in specials}
  return get_tokenizer(str(path)), ids - {made.token_to_id('<unk>')}, made


PLAIN = ['the cat', ' ', '\n', 'a', 'END', '＜／ｓ＞', '<', '/s>', '</', 's>', '<pad', '|', '<0x0A>', 'é', '你', '\0', '\U0010ffff']
SPELLINGS = st.lists(st.sampled_from([*SPECIALS, *PLAIN]) | st.text(max_size=3), max_size=8).map(''.join)
BOUNDED = hypothesis.settings(deadline=None, max_examples=60, derandomize=True,
                              suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])


@BOUNDED
@hypothesis.given(text=SPELLINGS)
@hypothesis.example('the </s> x')
@hypothesis.example('END')
@hypothesis.example('＜／ｓ＞')
def test_no_text_becomes_a_special_token(hugging_face, text):
  tokenizer, special, _ = hugging_face
  ids = tokenizer.encode(text).tolist()
  assert not special & set(ids) and tokenizer.end not in ids
  assert max(ids, default=0) < tokenizer.size


@BOUNDED
@hypothesis.given(text=st.lists(st.sampled_from(['the cat', 'a ', 'dog\n', 'é', '你', 'an', 'end']), max_size=6).map(''.join))
def test_text_without_them_keeps_the_ids_of_the_library(hugging_face, text):
  tokenizer, _, library = hugging_face
  assert tokenizer.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids


def test_the_spelling_survives_where_the_tokenizer_knows_its_characters(hugging_face):
  tokenizer, _, library = hugging_face
  if library.decoder is not None and library.normalizer is None:
    text = 'the </s> <pad>\n'
    assert tokenizer.decode([*tokenizer.encode(text), tokenizer.end]) == text


def test_a_spelled_byte_is_no_byte(tmp_path):
  """`<0x0A>` in a text is six characters, not the line end that a fallback to bytes writes so."""
  made = unigram(byte_fallback=True)
  made.add_special_tokens(SPECIALS)
  made.save(str(tmp_path / 'a.json'))
  tokenizer = get_tokenizer(str(tmp_path / 'a.json'))
  assert tokenizer.decode(tokenizer.encode('a <0x0A>é')) == 'a <0x0A>é'


def test_identity_changes_only_where_ids_of_a_text_do(tmp_path):
  for kind, version in (('unigram', 2), ('words', 2), ('bpe whose merges spell it', 2), ('bpe that looks words up', 2), ('bpe', 2),
                        ('byte-level bpe', 1)):
    made = KINDS[kind]()
    made.add_special_tokens(['<pad>', '</s>', '<unk>'] + SPECIALS[3:] * (kind != 'byte-level bpe'))
    made.save(str(tmp_path / f'{kind}.json'))
    assert f'-v{version}:' in get_tokenizer(str(tmp_path / f'{kind}.json')).identity, kind


def test_a_special_token_that_is_a_letter_of_the_alphabet_is_refused(tmp_path):
  for name, made in (('Ċ', byte_level()), ('!', byte_level()), ('<0x0A>', bpe(byte_fallback=True))):
    made.add_special_tokens(['</s>', name])
    made.save(str(tmp_path / 'a.json'))
    with pytest.raises(ConfigError, match=re.escape(f'the special token {name!r} also writes a byte of text')):
      get_tokenizer(str(tmp_path / 'a.json'))


def test_unknown_text_that_would_end_a_document_is_refused(tmp_path):
  made = tokenizers.Tokenizer(models.WordLevel(numbered('</s>', 'a'), unk_token='</s>'))
  made.add_special_tokens(['</s>'])
  made.save(str(tmp_path / 'a.json'))
  with pytest.raises(ConfigError, match="unknown text becomes '</s>', which ends a document"):
    get_tokenizer(str(tmp_path / 'a.json'))


SENTENCEPIECE = {
  'bpe': {},
  'unigram': {'model_type': 'unigram'},
  'unigram without bytes': {'model_type': 'unigram', 'byte_fallback': False},
  'NFKC': {'normalization_rule_name': 'nmt_nfkc', 'add_dummy_prefix': True},
  'characters': {'model_type': 'char', 'byte_fallback': False, 'vocab_size': 40},
  'words': {'model_type': 'word', 'byte_fallback': False, 'vocab_size': 20},
}


@pytest.fixture(scope='module', params=[(kind, user) for kind in SENTENCEPIECE for user in (False, True)], ids=str)
def sentencepiece(request, tmp_path_factory):
  kind, user = request.param
  symbols = {'control_symbols': ['<ctl>', '§'], 'user_defined_symbols': ['<s>', '</s>', '<tab>'] if user else ['<tab>']}
  path = tmp_path_factory.mktemp('spiece') / 'a.model'
  return get_tokenizer(make_sentencepiece(path, hard_vocab_limit=False, pad_id=3, pad_piece='<pad>', **symbols, **SENTENCEPIECE[kind]))


@BOUNDED
@hypothesis.given(text=st.lists(st.sampled_from(['<s>', '<ctl>', *SPECIALS, *PLAIN]) | st.text(max_size=3), max_size=8).map(''.join))
@hypothesis.example('</s>')
@hypothesis.example('</s> x')
@hypothesis.example('§')
@hypothesis.example('＜／ｓ＞')
def test_no_text_becomes_a_control_symbol(sentencepiece, text):
  ids = set(sentencepiece.encode(text).tolist())
  assert sentencepiece.end == 2 and not ids & {1, 2, 3}
  assert not ids & sentencepiece.special


def test_a_user_defined_symbol_stays_one_token(sentencepiece):
  ids = sentencepiece.encode('<tab>').tolist()
  assert '<tab>' in sentencepiece.decode(ids)


def test_an_end_that_the_model_calls_text_can_be_named(tmp_path):
  """A token of the vocabulary that is not marked as special: as data.end_token no text reaches it any more."""
  made = byte_level()
  made.add_tokens(['<stop>'])  # not special: found in any text
  made.save(str(tmp_path / 'a.json'))
  for end in ('<stop>', 'Ġend'):
    tokenizer = get_tokenizer(str(tmp_path / 'a.json'), end)
    assert tokenizer.end == made.token_to_id(end)
    text = 'the end <stop> of </s>'
    assert tokenizer.end in made.encode(text).ids and tokenizer.end not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
  name = make_sentencepiece(tmp_path / 'a.model', eos_id=-1, user_defined_symbols=['<stop>'])
  tokenizer = get_tokenizer(name, '<stop>')
  assert tokenizer.end not in tokenizer.encode('a <stop> b') and tokenizer.decode(tokenizer.encode('a <stop> b')) == 'a <stop> b'
  with pytest.raises(ConfigError, match="'<0x0A>' also writes a byte of text"):
    get_tokenizer(name, '<0x0A>')


def with_specials(path, *names):
  return make_bpe(path, lambda tokenizer: tokenizer.add_special_tokens(list(names)))


@pytest.mark.parametrize('end', tokenizer_files.ENDS)
def test_the_ends_of_published_models_are_found(tmp_path, end):
  raw = json.loads(pathlib.Path(with_specials(tmp_path / 'a.json', '<|begin|>', end)).read_text())
  raw['added_tokens'] = [token for token in raw['added_tokens'] if token['content'] in ('<pad>', '<|begin|>', end)]
  (tmp_path / 'a.json').write_text(json.dumps(raw))
  tokenizer = get_tokenizer(str(tmp_path / 'a.json'))
  assert tokenizer.end == raw['added_tokens'][-1 if end != '<|endoftext|>' else 1]['id']
  assert tokenizer.end not in tokenizer.encode(f'a {end} b')


def test_a_named_end_is_part_of_the_identity_where_it_is_not_the_usual_one(tmp_path):
  name = with_specials(tmp_path / 'a.json', '<|im_end|>')
  usual = get_tokenizer(name)
  assert get_tokenizer(name, '<|endoftext|>').identity == usual.identity
  other = get_tokenizer(name, '<|im_end|>')
  assert other.identity == f'{usual.identity}:end={other.end}' and other.end != usual.end
  name = make_sentencepiece(tmp_path / 'a.model', control_symbols=['<stop>'])
  usual, other = get_tokenizer(name), get_tokenizer(name, '<stop>')
  assert other.identity == f'{usual.identity}:end={other.end}' and get_tokenizer(name, '</s>').identity == usual.identity


def test_an_end_that_does_not_exist_is_one_line_with_near_ones(tmp_path):
  name = with_specials(tmp_path / 'a.json', '<|im_end|>', '<|im_start|>')
  for tokenizer, end, near in ((name, '<|imend|>', "did you mean '<|im_end|>'"), (name, '<|endoftext', "mean '<|endoftext|>'"),
                               (name, 'zzz', 'leave it empty for the usual one'), ('bytes', '</s>', 'data.tokenizer is bytes'),
                               (make_sentencepiece(tmp_path / 'a.model'), '</S>', "mean '</s>'")):
    with pytest.raises(ConfigError) as caught:
      get_tokenizer(tokenizer, end)
    assert near in str(caught.value) and f'{end!r}' in str(caught.value) and '\n' not in str(caught.value)
