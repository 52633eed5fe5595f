import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from lmscale import config as config_lib
from lmscale.data import tokenizer as tokenizer_lib

TOKENIZER = tokenizer_lib.get_tokenizer('bytes')


@hypothesis.given(st.text())
def test_text_survives_the_round_trip(text):
  ids = TOKENIZER.encode(text)
  assert ids.dtype == np.uint16 and ids.max(initial=0) < 256
  assert TOKENIZER.decode(ids) == text


@hypothesis.given(st.binary())
def test_bytes_are_their_own_ids(raw):
  assert TOKENIZER.encode(raw).tolist() == list(raw)
  assert TOKENIZER.decode(list(raw)) == raw.decode('utf-8', 'replace')


def test_decode_drops_the_end_and_shows_ids_that_there_are_not():
  assert TOKENIZER.end == 256 and TOKENIZER.size == 257
  assert TOKENIZER.decode([104, 256, 105]) == 'hi'
  assert TOKENIZER.decode([104, 257, 263, 105, -1]) == 'h\ufffd\ufffdi\ufffd'
  assert TOKENIZER.decode(iter([104, 105])) == 'hi'


def test_lone_surrogates_are_replaced():
  assert TOKENIZER.decode(TOKENIZER.encode('a\ud800b')) == 'a\ufffdb'


def test_unknown_name_is_a_config_error():
  with pytest.raises(config_lib.ConfigError, match="data.tokenizer.*'bpe'"):
    tokenizer_lib.get_tokenizer('bpe')
