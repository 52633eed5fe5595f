"""Tokenizers: text to ids and back."""

from collections.abc import Iterable

import numpy as np

from lmscale import config as config_lib


class ByteTokenizer:
  """UTF-8 bytes are ids 0..255; 256 ends a document."""

  identity = 'bytes-v1'  # part of every cache key: change it when the ids of any text change
  size = 257
  end = 256

  def encode(self, text: bytes | str) -> np.ndarray:
    """uint16 [bytes of text], without the end-of-document id. A lone surrogate becomes U+FFFD."""
    if isinstance(text, str):
      text = to_utf8(text)
    return np.frombuffer(text, np.uint8).astype(np.uint16)

  def decode(self, ids: Iterable[int]) -> str:
    """The text of `ids`. Ids that are no byte (end of document, padding rows) are dropped, bad UTF-8 replaced."""
    ids = np.asarray(list(ids) if not isinstance(ids, np.ndarray) else ids, np.int64)
    return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes().decode('utf-8', 'replace')


def to_utf8(text: str) -> bytes:
  """UTF-8 of `text`; lone surrogates, which have none, become U+FFFD."""
  try:
    return text.encode()
  except UnicodeEncodeError:
    return ''.join('\ufffd' if '\ud800' <= c <= '\udfff' else c for c in text).encode()


TOKENIZERS = {'bytes': ByteTokenizer}


def get_tokenizer(name: str) -> ByteTokenizer:
  """The tokenizer that `data.tokenizer` names. Raises ConfigError for an unknown name."""
  if name not in TOKENIZERS:
    raise config_lib.ConfigError(f'data.tokenizer: unknown tokenizer {name!r}; known: {", ".join(TOKENIZERS)}')
  return TOKENIZERS[name]()
