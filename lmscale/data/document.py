"""A document and the side of the train/validation split it falls on."""

import hashlib
from typing import NamedTuple

import numpy as np


class Document(NamedTuple):
  """One text, or its ids where it comes tokenised. `split_key` (uint64) decides train or validation: it is the hash of
  the file that the text is from."""

  text: bytes
  split_key: int
  ids: np.ndarray | None = None  # integers [n > 0]; text is then empty


def split_key(text: bytes) -> int:
  """First 64 bits of the SHA-256 of `text`: equal texts get equal keys, wherever they are stored."""
  return int.from_bytes(hashlib.sha256(text).digest()[:8], 'big')


def in_validation(keys: np.ndarray, fraction: float) -> np.ndarray:
  """bool [n]: which of the uint64 split keys [n] are in the validation share `fraction` (0 <= fraction < 1)."""
  return keys < np.uint64(int(fraction * 2.0**64))


def split_of(text: bytes, fraction: float) -> str:
  """'train' or 'validation' for a document with this text."""
  return 'validation' if in_validation(np.array([split_key(text)], np.uint64), fraction)[0] else 'train'


def to_utf8(text: str) -> bytes:
  """UTF-8 of `text`; lone surrogates, which have none, become U+FFFD."""
  try:
    return text.encode()
  except UnicodeEncodeError:
    return ''.join('\ufffd' if '\ud800' <= c <= '\udfff' else c for c in text).encode()
