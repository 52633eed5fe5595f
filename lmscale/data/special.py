"""Special tokens out of reach of text.

A tokenizer's model finds a special token in a text that spells it where the token is a word of its vocabulary: always in
Unigram, WordLevel and WordPiece, in BPE where merges or a look-up of whole words lead to it, in SentencePiece where it is
a user-defined symbol or a word or character of its own. Here such tokens get names that no text spells, under the same
ids, and merges into them are left out. The other ids of a text stay what they were.
"""

import hashlib
import json
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from lmscale.errors import ConfigError

BYTES = frozenset(f'<0x{byte:02X}>' for byte in range(256))  # how byte fallback writes a byte
SPELLED_BYTE = {  # splits a spelled byte in two, after every other splitting; only a real one is then looked up
  'type': 'Split', 'pattern': {'Regex': '(?<=<)(?=0x[0-9A-F]{2}>)'}, 'behavior': 'Isolated', 'invert': False,
}


def hide_in_json(content: dict[str, Any], hidden: set[str], raw: bytes) -> bool:
  """Takes the tokens `hidden` of a tokenizer.json (changed in place) away from text; whether that was needed.

  Raises:
    ConfigError: a hidden token also writes a byte of text.
  """
  model = content['model']
  letters = set(_byte_letters(content)) | (BYTES if model.get('byte_fallback') else set())
  if shared := sorted(hidden & letters & set(_names(model))):
    raise ConfigError(f'the special token {shared[0]!r} also writes a byte of text, so it cannot be kept out of it')
  added = content.get('added_tokens') or []
  found = _reached(model, hidden) | {token['content'] for token in added if not token.get('special')} & hidden
  spelled_bytes = model.get('byte_fallback') and _reached(model, BYTES)
  if found:
    names = _new_names(hidden, raw)
    _rename(model, names)
    for token in added:
      token['content'] = names.get(token['content'], token['content'])
  if spelled_bytes:
    before = content.get('pre_tokenizer')
    content['pre_tokenizer'] = {'type': 'Sequence', 'pretokenizers': [*([before] if before else []), SPELLED_BYTE]}
  return bool(found or spelled_bytes)


def hide_in_sentencepiece(raw: bytes, end: str) -> tuple[bytes, bool]:
  """(a .model in which no text becomes a control symbol or the piece `end`, whether that had to be changed).

  Raises:
    ConfigError: `end` writes a byte of text.
  """
  from sentencepiece import sentencepiece_model_pb2
  model = sentencepiece_model_pb2.ModelProto.FromString(raw)
  kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
  declared = {end, model.trainer_spec.bos_piece, model.trainer_spec.eos_piece, model.trainer_spec.pad_piece}
  by_piece = model.trainer_spec.model_type in (model.trainer_spec.WORD, model.trainer_spec.CHAR)
  needed = False
  for i, piece in enumerate(model.pieces):
    if piece.piece == end and piece.type == kinds.BYTE:
      raise ConfigError(f'the special token {end!r} also writes a byte of text, so it cannot be kept out of it')
    control = piece.type == kinds.CONTROL
    if control or piece.piece == end or piece.piece in declared and piece.type == kinds.USER_DEFINED:
      needed |= not control or by_piece or len(piece.piece) == 1
      piece.piece, piece.type = _new_name(i, raw), kinds.CONTROL
  return (model.SerializeToString(), True) if needed else (raw, False)


def _new_names(hidden: Iterable[str], raw: bytes) -> dict[str, str]:
  return {name: _new_name(i, raw) for i, name in enumerate(sorted(hidden))}


def _new_name(number: int, raw: bytes) -> str:
  """Nobody writes it who does not set out to, and then `PretrainedTokenizer` refuses the text."""
  return f'{hashlib.sha256(b"hidden" + raw).hexdigest()}-{number}'


def _names(model: dict[str, Any]) -> Iterable[str]:
  vocab = model['vocab']
  return vocab if isinstance(vocab, dict) else (name for name, _ in vocab)  # Unigram: [name, score]


def _merges(model: dict[str, Any]) -> Iterator[tuple[Any, str, str, str]]:
  """(the merge as it is written, both parts, what they become)."""
  prefix = model.get('continuing_subword_prefix') or ''
  for merge in model.get('merges') or ():
    left, right = merge.split(' ', 1) if isinstance(merge, str) else merge
    yield merge, left, right, left + right.removeprefix(prefix)


def _reached(model: dict[str, Any], names: Iterable[str]) -> set[str]:
  """Those of `names` that the model itself makes of a text that spells them."""
  found = set(_names(model)).intersection(names)
  if 'merges' not in model or model.get('ignore_merges'):
    return found
  prefix, suffix = (model.get(field) or '' for field in ('continuing_subword_prefix', 'end_of_word_suffix'))
  letters = {name for name in found if len(name.removeprefix(prefix).removesuffix(suffix)) == 1}
  return letters | found.intersection(whole for *_, whole in _merges(model))


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
  vocab = model['vocab']
  if isinstance(vocab, dict):
    model['vocab'] = {names.get(name, name): i for name, i in vocab.items()}
  else:
    model['vocab'] = [[names.get(name, name), score] for name, score in vocab]
  if 'merges' in model:
    model['merges'] = [merge for merge, *parts in _merges(model) if names.keys().isdisjoint(parts)]
  if model.get('unk_token') in names:
    model['unk_token'] = names[model['unk_token']]


def _byte_letters(content: dict[str, Any]) -> list[str]:
  """The characters that stand for bytes where the file says that text is cut into bytes."""
  if '"ByteLevel"' not in json.dumps([content.get(part) for part in ('normalizer', 'pre_tokenizer', 'decoder')]):
    return []
  from tokenizers import pre_tokenizers
  return pre_tokenizers.ByteLevel.alphabet()


def bytes_in_json(content: dict[str, Any], ids: Mapping[str, int], none: Container[int]) -> np.ndarray | None:
  """int [ids]: how many bytes of text each token of a tokenizer.json stands for, 0 for the ids `none`; None where the
  decoder adds or takes away what depends on the neighbours."""
  letters = set(_byte_letters(content))
  if not letters and '"\\u2581"' not in json.dumps(content.get('decoder')):
    return None
  added = {token['content'] for token in content.get('added_tokens') or ()}
  fallback = content['model'].get('byte_fallback')
  sizes = np.zeros(max(ids.values()) + 1, np.int64)
  for name, i in ids.items():
    if i not in none:
      by_letter = letters and name not in added
      sizes[i] = len(name) if by_letter else piece_bytes(name, bool(fallback) and name in BYTES)
  return sizes


def piece_bytes(piece: str, is_byte: bool) -> int:
  """Bytes of text that a piece stands for in which a lower bar is a space."""
  return 1 if is_byte else len(piece.replace('\u2581', ' ').encode())
