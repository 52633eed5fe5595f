"""Tokenizers: text to ids and back.

`bytes` needs no file; `pretrained.py` reads Hugging Face's tokenizer.json and SentencePiece's .model. All have the same
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
    """The text of `ids`. Ids that stand for no text (`end`, rows of the embedding beyond `size`) are dropped."""


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
    """The text of `ids`. Ids that are no byte (end of document, padding rows) are dropped, bad UTF-8 replaced."""
    ids = np.asarray(list(ids) if not isinstance(ids, np.ndarray) else ids, np.int64)
    return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes().decode('utf-8', 'replace')


def get_tokenizer(name: str) -> Tokenizer:
  """The tokenizer that `data.tokenizer` names: `bytes`, a tokenizer.json or a .model. Raises ConfigError for others."""
  if name == 'bytes':
    return ByteTokenizer()
  from lmscale.data import pretrained
  return pretrained.open_tokenizer(name)


def fitting_tokenizer(config: Config) -> Tokenizer:
  """The tokenizer of data.tokenizer. Raises ConfigError where it has ids that the embedding has no row for."""
  found = get_tokenizer(config.data.tokenizer)
  if found.size > config.model.vocab:
    raise ConfigError(
      f'model.vocab: {config.model.vocab} rows are fewer than the {found.size} ids of data.tokenizer '
      f'{config.data.tokenizer}; set model.vocab={found.size} or more'
    )
  return found
