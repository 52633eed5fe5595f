"""Tokenizers: text to ids and back.

`bytes` needs no file; `tokenizer_files.py` reads Hugging Face's tokenizer.json and SentencePiece's .model. All have the same
interface, and an `identity` that names everything the ids of a text depend on.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from lmscale.config import Config
from lmscale.data import document
from lmscale.errors import ConfigError


class Tokenizer(Protocol):
  """What the data pipeline, sampling and evaluation need of a tokenizer."""

  identity: str  # part of every cache key and checkpoint: equal only where the ids of every text are equal
  size: int  # ids are 0 .. size - 1
  end: int  # the id that closes a document

  def encode(self, text: bytes | str) -> np.ndarray:
    """Ids [n] of a text, without `end`. A lone surrogate becomes U+FFFD."""

  def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
    """`encode` of each text, faster."""

  def decode(self, ids: Iterable[int]) -> str:
    """The text of `ids`. `end` and other special tokens are dropped; an id that is not 0 .. size - 1 becomes U+FFFD."""

  def decode_batch(self, batch: Sequence[np.ndarray]) -> list[str]:
    """What came back of each text: `decode`, faster, and without a mark for what the tokenizer did not know."""

  def text_bytes(self, ids: np.ndarray) -> int:
    """Bytes of UTF-8 that `ids` [n] stand for; -1 where only decoding would tell."""


class ByteTokenizer:
  """UTF-8 bytes are ids 0..255; 256 ends a document."""

  identity = 'bytes-v1'  # part of every cache key: change it when the ids of any text change
  size = 257
  end = 256

  def encode(self, text: bytes | str) -> np.ndarray:
    """uint16 [bytes of text], without the end-of-document id. A lone surrogate becomes U+FFFD."""
    if isinstance(text, str):
      text = document.to_utf8(text)
    return np.frombuffer(text, np.uint8).astype(np.uint16)

  def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
    """`encode` of each text."""
    return [self.encode(text) for text in texts]

  def decode(self, ids: Iterable[int]) -> str:
    """The text of `ids` without `end`. Bad UTF-8 and ids that are not 0 .. size - 1 become U+FFFD."""
    ids = np.asarray(list(ids) if not isinstance(ids, np.ndarray) else ids, np.int64)
    ids = ids[ids != self.end]
    known = np.where((ids >= 0) & (ids < self.size), ids, 255)  # a byte that no UTF-8 has
    return known.astype(np.uint8).tobytes().decode('utf-8', 'replace')

  def decode_batch(self, batch: Sequence[np.ndarray]) -> list[str]:
    """`decode` of each array of ids."""
    return [self.decode(ids) for ids in batch]

  def text_bytes(self, ids: np.ndarray) -> int:
    """Bytes that `ids` [n] stand for."""
    return len(ids)


class IdsAlone:
  """Stands for a tokenizer that nobody knows: there are ids and no texts. A text that is decoded shows them."""

  identity, end = 'unknown', -1

  def __init__(self, size: int):
    self.size = size

  def encode(self, text: bytes | str) -> np.ndarray:
    """Raises ConfigError: no text can be read."""
    raise ConfigError('the model came without a tokenizer, so a text has no ids: give ids, or name its tokenizer by '
                      '--config.data.tokenizer=FILE')

  def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
    """Raises ConfigError for any text."""
    return [self.encode(text) for text in texts]

  def decode(self, ids: Iterable[int]) -> str:
    """The ids, a space after each."""
    return ''.join(f'{int(i)} ' for i in ids)

  def decode_batch(self, batch: Sequence[np.ndarray]) -> list[str]:
    """`decode` of each array of ids."""
    return [self.decode(ids) for ids in batch]

  def text_bytes(self, ids: np.ndarray) -> int:
    """Unknown."""
    return -1


def get_tokenizer(name: str, end: str = '') -> Tokenizer:
  """The tokenizer that `data.tokenizer` names: `bytes`, a tokenizer.json or a .model. Raises ConfigError for others.

  `end` is `data.end_token`, the name of the token that closes a document; empty: the tokenizer's usual one.
  """
  if name == 'bytes':
    if end:
      raise ConfigError(f'data.end_token: {end!r}, but data.tokenizer is bytes, which ends documents with an id of its own; '
                        'leave data.end_token empty')
    return ByteTokenizer()
  from lmscale.data import tokenizer_files
  return tokenizer_files.open_tokenizer(name, end)


def fitting_tokenizer(config: Config) -> Tokenizer:
  """The tokenizer of data.tokenizer and data.end_token. Raises ConfigError where it has ids that the embedding has no row for."""
  found = get_tokenizer(config.data.tokenizer, config.data.end_token)
  if found.size > config.model.vocab:
    raise ConfigError(
      f'model.vocab: {config.model.vocab} rows are fewer than the {found.size} ids of data.tokenizer '
      f'{config.data.tokenizer}; set model.vocab={found.size} or more'
    )
  return found
