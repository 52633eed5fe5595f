"""What a tokenizer loses is counted in every text, not in the first ones."""

import json
import unicodedata

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
from made import CORPUS, make_bpe, make_sentencepiece
from tokenizers import decoders, models, normalizers, pre_tokenizers

from lmscale import config as config_lib
from lmscale.data import losses, token_cache
from lmscale.data.loader import Loader
from lmscale.data.sources.text_files import JsonlSource
from lmscale.data.tokenizer import get_tokenizer
from lmscale.errors import ConfigError

LATIN = 'the quick brown fox jumps over the dog\n'
CHINESE = '床前明月光疑是地上霜舉頭望明月低頭思故鄉'
TEXT = st.text(st.sampled_from('aZ é\n\t,，。ﬁ你好😀ı'), max_size=40)


def write(path, *texts):
  path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
  return path


def characters(path, **options):
  """A tokenizer of the Latin characters, without a way to write others: BPE drops them, with `unk_token` it says so."""
  vocab = {c: i for i, c in enumerate(['<unk>', '</s>', *sorted({*LATIN, *''.join(CORPUS)})])}
  made = tokenizers.Tokenizer(models.BPE(vocab, [], **options))
  made.add_special_tokens(['<unk>', '</s>'])
  made.decoder = tokenizers.decoders.Fuse()
  made.save(str(path))
  return str(path)


TOKENIZERS = {
  'bpe that drops': characters,
  'bpe with an unknown token': lambda path: characters(path, unk_token='<unk>'),
  'bpe that joins unknowns': lambda path: characters(path, unk_token='<unk>', fuse_unk=True),
  'model without bytes': lambda path: make_sentencepiece(path.with_suffix('.model'), byte_fallback=False, character_coverage=1.0,
                                                         hard_vocab_limit=False),
  'unigram without bytes': lambda path: make_sentencepiece(path.with_suffix('.model'), byte_fallback=False, character_coverage=1.0,
                                                            hard_vocab_limit=False, model_type='unigram'),
}


@pytest.mark.parametrize('kind', TOKENIZERS)
def test_a_loss_late_in_the_corpus_is_an_error_that_names_all(tmp_path, kind):
  path = write(tmp_path / 'a.jsonl', *[LATIN] * 70, *[CHINESE * 40] * 200)
  source = config_lib.SourceConfig('mine', 'jsonl', str(path))
  data = config_lib.DataConfig(sources=(source,), cache=str(tmp_path / 'c'), tokenizer=TOKENIZERS[kind](tmp_path / 'a.json'))
  with pytest.raises(ConfigError) as caught:
    Loader(config_lib.Config(data=data))
  lost, known = 200 * 40 * len(CHINESE), 70 * len(LATIN)
  assert str(caught.value).startswith("data.sources.0 'mine'")
  assert f'loses {lost / (lost + known):.2%} of the text, {lost:,} of {lost + known:,} characters' in str(caught.value)
  assert "characters, for example in '" in str(caught.value) and "床前" in str(caught.value).partition('example')[2] and 'at most 5% may be lost: give data.tokenizer' in str(caught.value)
  assert '\n' not in str(caught.value) and list((tmp_path / 'c' / 'tokens').iterdir()) == []


@pytest.mark.parametrize('kind', TOKENIZERS)
def test_a_small_loss_is_counted_and_known_at_every_start(tmp_path, kind):
  path = write(tmp_path / 'a.jsonl', *[LATIN] * 1500, f'x{CHINESE}o')
  tokenizer = get_tokenizer(TOKENIZERS[kind](tmp_path / 'a.json'))
  for _ in range(2):
    notice, = token_cache.tokenise(JsonlSource(str(path)), tokenizer, tmp_path / 'c').notices
    assert f'{len(CHINESE)} of {1500 * len(LATIN) + len(CHINESE) + 2:,} characters' in notice


def test_tokenizers_that_keep_text_lose_none_and_are_not_decoded(tmp_path, monkeypatch):
  path = write(tmp_path / 'a.jsonl', LATIN, CHINESE, *CORPUS[:2], 'a', '😀 \t\n')
  made = {'bytes': 0, make_bpe(tmp_path / 'a.json'): 0, make_sentencepiece(tmp_path / 'a.model'): 0,
          make_sentencepiece(tmp_path / 'b.model', add_dummy_prefix=True): 0}
  for name in made:
    tokenizer = get_tokenizer(name)
    decoded, real = [], tokenizer.decode_batch
    monkeypatch.setattr(tokenizer, 'decode_batch', lambda batch, decoded=decoded, real=real: decoded.append(len(batch)) or real(batch))
    assert not token_cache.tokenise(JsonlSource(str(path)), tokenizer, tmp_path / 'c').notices
    assert decoded == [6]  # the probe


def like_llama(path):
  """A space before the text, a bar for each space, bytes for what is not in the vocabulary."""
  names = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256)), *sorted({*LATIN, '▁'}), 'th', 'the', '▁the']
  merges = [('t', 'h'), ('th', 'e'), ('▁', 'the')]
  made = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(names)}, merges, byte_fallback=True, unk_token='<unk>'))
  made.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
  made.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
  made.add_special_tokens(['<unk>', '<s>', '</s>'])
  made.save(str(path))
  return str(path)


def test_the_bytes_of_tokens_add_up_whatever_stands_for_a_space(tmp_path):
  tokenizer = get_tokenizer(like_llama(tmp_path / 'a.json'))
  for text in (LATIN, CHINESE, 'the  the\n', 'x <0x0A> </s>', '😀'):
    ids = tokenizer.encode(text)
    assert tokenizer.text_bytes(ids) == len(text.encode()) and tokenizer.decode(ids) == text
  assert tokenizer.text_bytes(tokenizer.encode('the▁')) != len('the▁'.encode())  # comes back as a space: decoded, and told


def test_a_tokenizer_that_fails_on_a_text_is_one_line(tmp_path):
  made = tokenizers.Tokenizer(models.WordLevel({c: i for i, c in enumerate(['</s>', 'a', 'b'])}, unk_token='none'))
  made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  made.add_special_tokens(['</s>'])
  made.save(str(tmp_path / 'a.json'))
  tokenizer = get_tokenizer(str(tmp_path / 'a.json'))
  with pytest.raises(ConfigError, match='the tokenizer fails on a text: .*it needs a token for what it does not know'):
    tokenizer.encode('a c')


@pytest.mark.parametrize('normalizer', [normalizers.Lowercase(), normalizers.NFKC(), normalizers.NFD(),
                                        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
                                        normalizers.Replace('\n', ' ')], ids=str)
def test_a_changed_form_is_no_loss(tmp_path, normalizer):
  name = make_bpe(tmp_path / 'a.json', lambda tokenizer: setattr(tokenizer, 'normalizer', normalizer))
  path = write(tmp_path / 'a.jsonl', 'A line\nof Text, é， ﬁne １２３')
  notice, = token_cache.tokenise(JsonlSource(str(path)), get_tokenizer(name), tmp_path / 'c').notices
  assert notice.startswith('the tokenizer does not keep every text: ')


def test_spaces_that_vanish_are_lost(tmp_path):
  name = make_sentencepiece(tmp_path / 'a.model', remove_extra_whitespaces=True, normalization_rule_name='nmt_nfkc')
  path = write(tmp_path / 'a.jsonl', 'if a:\n' + ' ' * 20 + 'b')
  with pytest.raises(ConfigError, match=r'loses 71.43% of the text, 20 of 28|loses 7\d.\d\d% of the text, 20 of 27'):
    token_cache.tokenise(JsonlSource(str(path)), get_tokenizer(name), tmp_path / 'c')


def count(before, after):
  return sum(losses.lost_characters(before, after).values())


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(text=TEXT)
def test_counting(text):
  assert count(text, text) == 0 == count('', text) and count(text, '') == len(text)
  assert count(text, unicodedata.normalize('NFKC', text)) == 0
  assert count(text, text[::-1].lower()) == 0
  assert count(text, text.replace('你', '')) == text.count('你')
  assert count(text, text.replace(' ', '')) == text.count(' ')
  assert count(text.replace('ﬁ', 'fi'), text) == 0
  assert losses.lost_characters(text + '你霜', text) == {'你': 1, '霜': 1}
  assert losses._characters(text.encode()) == len(text)


def test_words_the_decoder_joins_hide_no_loss(tmp_path):
  """Words come back with spaces between their characters: more characters than before, and still half of them are lost."""
  vocab = {c: i for i, c in enumerate(['<unk>', '</s>', *'abcdef'])}
  made = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token='<unk>'))
  made.pre_tokenizer = pre_tokenizers.Split('', 'isolated')
  made.add_special_tokens(['<unk>', '</s>'])
  made.save(str(tmp_path / 'a.json'))
  path = write(tmp_path / 'a.jsonl', 'abcdefuvwxyz' * 50)
  with pytest.raises(ConfigError, match='loses 50.00% of the text, 300 of 600'):
    token_cache.tokenise(JsonlSource(str(path)), get_tokenizer(str(tmp_path / 'a.json')), tmp_path / 'c')


def test_hopeless_text_is_given_up_early(tmp_path, monkeypatch):
  monkeypatch.setattr(losses, 'ENOUGH', 100)
  found = losses.Losses(get_tokenizer(characters(tmp_path / 'a.json')))
  with pytest.raises(ConfigError, match='loses 100.00%'):
    found.add([CHINESE.encode() * 20], [np.empty(0, np.uint16)])


def test_a_cache_in_which_losses_were_not_counted_is_made_again(tmp_path):
  path = write(tmp_path / 'a.jsonl', LATIN)
  tokenizer = get_tokenizer(make_bpe(tmp_path / 'a.json'))
  store = token_cache.tokenise(JsonlSource(str(path)), tokenizer, tmp_path / 'c')
  file, = (tmp_path / 'c' / 'tokens').glob('*/meta.json')
  whole = json.loads(file.read_text())
  meta = {name: value for name, value in whole.items() if name not in ('losses', 'self')}
  file.write_text(json.dumps({**meta, 'self': token_cache._hash(meta)}))
  assert token_cache.tokenise(JsonlSource(str(path)), tokenizer, tmp_path / 'c').identity == store.identity
  assert json.loads(file.read_text()) == whole
