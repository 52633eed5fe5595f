"""Tokenizers kept in files: Hugging Face's tokenizer.json and SentencePiece's .model.

A file is data: nothing in it is run. What would make ids depend on anything but the text (truncation, padding, BPE dropout,
special tokens written in a text) is switched off. A text longer than `PIECE` characters is cut after a line end or
a space and its parts are tokenised one by one: memory stays bounded, and the ids are still a function of the text.
"""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from lmscale.data import document
from lmscale.data.extras import need
from lmscale.errors import ConfigError

PIECE = 1 << 20  # characters tokenised at a time
LARGEST = 1 << 28  # bytes of a tokenizer file
# What ends a document in the tokenizers people use, best first.
ENDS = ('<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>', '[EOS]', '<|eos|>', '<EOS>', '<|end▁of▁sentence|>')
VERSION = 1  # raise when the same file would give other ids


class PretrainedTokenizer:
  """A tokenizer from a file; see `tokenizer.Tokenizer`."""

  def __init__(self, kind: str, raw: bytes, size: int, end: int, encode: Callable[[list[str]], list[list[int]]],
               decode: Callable[[list[int]], str]):
    self.identity = f'{kind}-v{VERSION}:{hashlib.sha256(raw).hexdigest()[:32]}'
    self.size, self.end = size, end
    self._encode, self._decode = encode, decode
    self._dtype = np.uint16 if size <= 1 << 16 else np.int32

  def encode(self, text: bytes | str) -> np.ndarray:
    """uint16 or int32 ids [n] of a text, without `end`. Bad UTF-8 and lone surrogates become U+FFFD."""
    return self.encode_batch([document.to_utf8(text) if isinstance(text, str) else text])[0]

  def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
    """`encode` of each text, all parts in one call of the library."""
    parts = [list(cut(text.decode('utf-8', 'replace'))) for text in texts]
    found = iter(self._encode([part for whole in parts for part in whole]))
    return [self._joined([next(found) for _ in whole]) for whole in parts]

  def _joined(self, parts: list[list[int]]) -> np.ndarray:
    return np.concatenate([np.array(part, self._dtype) for part in parts] or [np.empty(0, self._dtype)])

  def decode(self, ids: Iterable[int]) -> str:
    """The text of `ids`; `end`, other special tokens and ids beyond `size` are dropped."""
    return self._decode([int(i) for i in ids if 0 <= i < self.size and i != self.end])


def cut(text: str) -> Iterable[str]:
  """`text` in parts of at most `PIECE` characters, each ending with a line or at least a word if it has one."""
  while len(text) > PIECE:
    at = text.rfind('\n', 0, PIECE) + 1 or text.rfind(' ', 1, PIECE) or PIECE
    at = at if at > 0 else PIECE
    yield text[:at]
    text = text[at:]
  if text:
    yield text


def open_tokenizer(name: str) -> PretrainedTokenizer:
  """The tokenizer in the file `name`. Raises ConfigError if it is missing, damaged, or has no end-of-document token."""
  path = pathlib.Path(name).expanduser()
  makers = {'.json': _hugging_face, '.model': _sentencepiece}
  try:
    if path.suffix not in makers or '\0' in name:
      raise ConfigError(f'data.tokenizer: {name!r} is not bytes nor the path of a tokenizer.json or of a SentencePiece .model')
    if path.is_dir():
      raise ConfigError(f'data.tokenizer: {name} is a folder; give the file in it')
    if (size := path.stat().st_size) > LARGEST:
      raise ConfigError(f'data.tokenizer: {name} has {size} bytes, a tokenizer has fewer than {LARGEST}')
    raw = path.read_bytes()
  except OSError as error:
    raise ConfigError(f'data.tokenizer: {name}: {error.strerror}') from error
  return _open(name, raw, makers[path.suffix])


@functools.lru_cache(4)  # the same file is opened several times at the start of a run
def _open(name: str, raw: bytes, make: Callable[[bytes], PretrainedTokenizer]) -> PretrainedTokenizer:
  try:
    tokenizer = make(raw)
    tokenizer.encode('a b\n')
    return tokenizer
  except ConfigError as error:
    raise ConfigError(f'data.tokenizer: {name}: {error}') from error
  except BaseException as error:  # a panic in Rust is no Exception
    if isinstance(error, KeyboardInterrupt | SystemExit):
      raise
    reason = ' '.join(str(error).split())[:200]
    raise ConfigError(f'data.tokenizer: {name} is damaged or no tokenizer ({type(error).__name__}: {reason})') from error


def _hugging_face(raw: bytes) -> PretrainedTokenizer:
  library = need('tokenizers', 'data.tokenizer')
  found = library.Tokenizer.from_str(raw.decode())
  found.no_truncation()
  found.no_padding()
  found.encode_special_tokens = True  # as text: a document cannot end itself by naming the end token
  if getattr(found.model, 'dropout', None):
    found.model.dropout = None
  ids = found.get_vocab(with_added_tokens=True)
  special = {t['content'] for t in json.loads(raw).get('added_tokens') or () if t.get('special')}
  end = next((ids[name] for name in ENDS if name in special), None)
  if end is None:
    raise ConfigError(f'no special token ends a document; it needs one of {", ".join(ENDS)}')

  def encode(texts: list[str]) -> list[list[int]]:
    if len(texts) == 1:  # a prompt: waking the library's threads would take longer
      return [found.encode(texts[0], add_special_tokens=False).ids]
    return [part.ids for part in found.encode_batch_fast(texts, add_special_tokens=False)]

  return PretrainedTokenizer('tokenizer.json', raw, max(ids.values()) + 1, end, encode, found.decode)


def _sentencepiece(raw: bytes) -> PretrainedTokenizer:
  library = need('sentencepiece', 'data.tokenizer')
  found = library.SentencePieceProcessor()
  found.LoadFromSerializedProto(raw)  # unlike the constructor, this does not take empty bytes for no model at all
  end = found.eos_id()
  if end < 0:
    raise ConfigError('the model has no end-of-sentence piece (eos_id is -1)')
  threads = os.cpu_count() or 1

  def encode(texts: list[str]) -> list[list[int]]:
    return found.encode(texts, out_type=int, num_threads=threads) if texts else []

  return PretrainedTokenizer('sentencepiece', raw, found.get_piece_size(), end, encode, found.decode)
