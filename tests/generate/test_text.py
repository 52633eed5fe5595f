"""The text of a continuation, token by token: it is what the whole decodes to, up to the first stop string."""

import itertools

import numpy as np
import pytest

from lmscale.data.tokenizer import ByteTokenizer
from lmscale.generate.text import Text, encode_prompt

BYTES = ByteTokenizer()


class Pieces:
  """Tokens with texts of their own, some half a character; a word at the beginning loses its space, as in SentencePiece."""

  end = 0
  texts = (b'', b' ab', b' c', b'd', b'\xe2\x82', b'\xac', b'\xff', b'\n')

  def decode(self, ids):
    return b''.join(self.texts[i] for i in ids).decode('utf-8', 'replace').removeprefix(' ')


def written(tokenizer, prompt, ids, stop=()):
  """(pieces as they come, how many tokens were read)."""
  text, pieces = Text(tokenizer, prompt, stop), []
  for count, token in enumerate(ids, 1):
    stopped = text.add(token)
    pieces.append(text.take(last=stopped or count == len(ids)))
    if stopped:
      break
  assert ''.join(pieces) == text.text
  return pieces, count


@pytest.mark.parametrize('seed', range(8))
def test_pieces_make_the_text_of_the_whole(seed):
  rng = np.random.default_rng(seed)
  valid = list('aé€🐍 \n'.encode() * 9)
  for ids in (rng.integers(0, 256, 90).tolist(), valid, valid[rng.integers(0, 4) :], rng.permutation(valid).tolist(), [0xE2] * 80):
    pieces, _ = written(BYTES, list(b'a prompt'), ids)
    assert ''.join(pieces) == BYTES.decode(ids)
  ids, prompt = rng.integers(1, 8, 70).tolist(), [1, 2, 3]
  pieces, _ = written(Pieces(), prompt, ids)
  assert 'ab cd' + ''.join(pieces) == Pieces().decode(prompt + ids)


def test_a_character_is_shown_when_it_is_whole():
  assert written(BYTES, [], list('é€'.encode()))[0] == ['', 'é', '', '', '€']
  assert written(BYTES, list('x€'.encode())[:-1], [0xAC, 65])[0] == ['€', 'A'], 'begun in the prompt'
  assert written(BYTES, [], [0xE2, 0x82])[0] == ['', '\ufffd'], 'never finished'


def test_a_stop_string_may_span_tokens():
  for text, stop, want in (
    ('one\n\ntwo', ('\n\n',), 'one'), ('ababac', ('abac',), 'ab'), ('a€b', ('€',), 'a'), ('xyz', ('yz', 'xy'), ''), ('abc', ('d',), 'abc'),
  ):  # fmt: skip
    pieces, count = written(BYTES, [], list(text.encode()), stop)
    assert ''.join(pieces) == want
    assert count == min((len((text[: text.find(s)] + s).encode()) for s in stop if s in text), default=len(text))
    for shown in itertools.accumulate(pieces):  # nothing that had to be taken back
      assert want.startswith(shown)
  pieces, count = written(Pieces(), [1], [2, 3, 1, 3], ('b',))
  assert (''.join(pieces), count) == (' cd a', 3), 'within a token'


def test_a_stop_string_of_the_prompt_is_none():
  assert written(BYTES, list(b'ab'), list(b'cab'), ('bc', 'ab'))[0][-1:] == ['']
  assert ''.join(written(BYTES, list(b'ab'), list(b'cab'), ('bc',))[0]) == 'cab'


def test_an_empty_prompt_begins_behind_the_end_of_a_document():
  assert encode_prompt(BYTES, '') == [BYTES.end]
  assert encode_prompt(BYTES, 'é') == [0xC3, 0xA9]
