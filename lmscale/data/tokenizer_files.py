"""Tokenizers kept in files: Hugging Face's tokenizer.json and SentencePiece's .model.

A file is data: nothing in it is run. What would make ids depend on anything but the text (truncation, padding, BPE dropout,
special tokens written in a text) is switched off. A text longer than `PIECE` characters is cut after a line end or
a space and its parts are tokenised one by one: memory stays bounded, and the ids are still a function of the text.
"""

import difflib
import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lmscale.data import document, special
from lmscale.data.optional_packages import need
from lmscale.errors import ConfigError

PIECE = 1 << 20  # characters tokenised at a time
LARGEST = 1 << 28  # bytes of a tokenizer file
# What ends a document in the tokenizers people use, best first: where a file has several, the first is what its model was
# trained with. GPT-2, NeoX, Mamba, Falcon, OLMo, Qwen, Phi, StarCoder, Jamba; Llama 3, Bamba, Granite, Falcon-H1; Llama 2,
# Mistral, Codestral, Nemotron, T5, BLOOM; Gemma; Kimi; Hunyuan, Grok; older ones; DeepSeek, its bars full-width; Cohere;
# Seed-OSS; Phi's and Qwen's other ends.
ENDS = ('<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>', '[EOS]', '<|eos|>', '<EOS>', '<|end▁of▁sentence|>',
        '<｜end▁of▁sentence｜>', '<EOS_TOKEN>', '<seed:eos>', '<|end|>', '<|im_end|>', '<|eot_id|>')
VERSION = 1  # raise when the same file would give other ids
HIDING = 2  # the version where special tokens had to be taken away from text
UNUSUAL = ('', '\0', 'é', '你', '\U0010ffff')  # characters that a tokenizer may not know


class PretrainedTokenizer:
  """A tokenizer from a file; see `tokenizer.Tokenizer`."""

  def __init__(self, identity: str, size: int, end: int, special: Iterable[int], unknown: int | None,
               encode: Callable[[list[str]], list[list[int]]], decode: Callable[[list[list[int]]], list[str]],
               token_bytes: np.ndarray | None):
    """special: ids that no text may become. unknown: the id of what the tokenizer does not know, None if there is none.
    token_bytes: int [size], how many bytes of text each id stands for; None where that depends on its neighbours."""
    self.identity, self.size, self.end = identity, size, end
    self.special, self.unknown = frozenset(special) | {end}, unknown
    self._is_special = np.isin(np.arange(size), list(self.special))
    self._encode, self._decode = encode, decode
    self._dtype = np.uint16 if size <= 1 << 16 else np.int32
    self._token_bytes, self._prefix = token_bytes, 0
    if token_bytes is not None:  # SentencePiece and its like put a space before a text
      self._prefix = int(token_bytes[self.encode('a')].sum() == 2)

  def encode(self, text: bytes | str) -> np.ndarray:
    """uint16 or int32 ids [n] of a text, without `end`. Bad UTF-8 and lone surrogates become U+FFFD."""
    return self.encode_batch([document.to_utf8(text) if isinstance(text, str) else text])[0]

  def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
    """`encode` of each text, all parts in one call of the library. Raises ConfigError if one became a special token."""
    parts = [list(cut(text.decode('utf-8', 'replace'))) for text in texts]
    try:
      found = iter(self._encode([part for whole in parts for part in whole]))
    except Exception as error:  # the libraries raise nothing narrower
      reason = ' '.join(str(error).split())[:200]
      raise ConfigError(f'the tokenizer fails on a text: {reason}; it needs a token for what it does not know') from error
    return [self._joined(whole, [next(found) for _ in whole]) for whole in parts]

  def reaches_special(self, text: str) -> bool:
    """Whether `text` becomes a special token; one that cannot be tokenised does not."""
    try:
      return bool(self._is_special[self._encode([text])[0]].any())
    except Exception:  # noqa: BLE001 - the libraries raise nothing narrower
      return False

  def _joined(self, texts: list[str], parts: list[list[int]]) -> np.ndarray:
    ids = np.concatenate([np.array(part, self._dtype) for part in parts] or [np.empty(0, self._dtype)])
    if self._is_special[ids].any():
      raise ConfigError(f'the text {"".join(texts)[:40]!r} becomes the special token {ids[self._is_special[ids]][0]}')
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    """The text of `ids`; `end` and other special tokens are dropped, an id that the tokenizer has not is U+FFFD."""
    runs = itertools.groupby((int(i) for i in ids if i != self.end), lambda i: 0 <= i < self.size)
    return ''.join(self._decode([list(run)])[0] if known else '\ufffd' * sum(1 for _ in run) for known, run in runs)

  def decode_batch(self, batch: Sequence[np.ndarray]) -> list[str]:
    """What came back of each text; ids are below `size`."""
    return self._decode([ids[ids != self.unknown].tolist() if self.unknown is not None else ids.tolist() for ids in batch])

  def text_bytes(self, ids: np.ndarray) -> int:
    """Bytes of UTF-8 that `ids` [n] stand for; -1 where only decoding would tell."""
    return -1 if self._token_bytes is None else int(self._token_bytes[ids].sum()) - self._prefix


def cut(text: str) -> Iterable[str]:
  """`text` in parts of at most `PIECE` characters, each ending with a line or at least a word if it has one."""
  while len(text) > PIECE:
    at = text.rfind('\n', 0, PIECE) + 1 or text.rfind(' ', 1, PIECE) or PIECE
    at = at if at > 0 else PIECE
    yield text[:at]
    text = text[at:]
  if text:
    yield text


def open_tokenizer(name: str, end: str = '') -> PretrainedTokenizer:
  """The tokenizer in the file `name`, in which the token `end` ends a document, by default the best known of `ENDS`.

  Raises:
    ConfigError: the file is missing or damaged, has no such token, or text cannot be kept apart from its special tokens.
  """
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
  return _open(name, raw, end, makers[path.suffix])


@functools.lru_cache(4)  # the same file is opened several times at the start of a run
def _open(name: str, raw: bytes, end: str, make: Callable[[bytes, str], PretrainedTokenizer]) -> PretrainedTokenizer:
  try:
    tokenizer = make(raw, end)
    tokenizer.encode('a b\n')
    return tokenizer
  except ConfigError as error:
    raise ConfigError(f'data.tokenizer: {name}: {error}') from error
  except BaseException as error:  # a panic in Rust is no Exception
    if isinstance(error, KeyboardInterrupt | SystemExit):
      raise
    reason = ' '.join(str(error).split())[:200]
    raise ConfigError(f'data.tokenizer: {name} is damaged or no tokenizer ({type(error).__name__}: {reason})') from error


def _identity(kind: str, raw: bytes, hiding: bool, end: int, usual_end: int | None) -> str:
  """`usual_end` ends documents where nobody names another token."""
  found = f'{kind}-v{HIDING if hiding else VERSION}:{hashlib.sha256(raw).hexdigest()[:32]}'
  return found if end == usual_end else f'{found}:end={end}'


def _named(end: str, known: Container[str], names: Iterable[str]) -> str:
  """`end`, the token of data.end_token. Raises ConfigError with near ones of `names` where it is not `known`."""
  if end not in known:
    near = difflib.get_close_matches(end, list(dict.fromkeys(names)), 3, 0.6)
    raise ConfigError(f'data.end_token: it has no token {end!r}'
                      + (f'; did you mean {" or ".join(map(repr, near))}?' if near else '; leave it empty for the usual one'))
  return end


def _hugging_face(raw: bytes, named: str) -> PretrainedTokenizer:
  library = need('tokenizers', 'data.tokenizer')
  original = library.Tokenizer.from_str(raw.decode())
  ids = original.get_vocab(with_added_tokens=True)
  content = json.loads(raw)
  added = [token['content'] for token in content.get('added_tokens') or ()]
  hidden = {token['content'] for token in content.get('added_tokens') or () if token.get('special')}
  usual = next((name for group in (hidden, added) for name in ENDS if name in group), None)
  end = _named(named, ids, [*added, *(name for name in ids if name[0:1] == named[0:1])]) if named else usual
  if end is None:
    raise ConfigError(f'no special token ends a document; it needs one of {", ".join(ENDS)}, or give data.end_token')
  unknown = _unknown(content['model'], ids)
  hiding = special.hide_in_json(content, hidden | {end}, raw)
  found = library.Tokenizer.from_str(json.dumps(content)) if hiding else original
  found.no_truncation()
  found.no_padding()
  found.encode_special_tokens = True  # as text: a document cannot end itself by naming the end token
  if getattr(found.model, 'dropout', None):
    found.model.dropout = None

  def encode(texts: list[str]) -> list[list[int]]:
    if len(texts) == 1:  # a prompt: waking the library's threads would take longer
      return [found.encode(texts[0], add_special_tokens=False).ids]
    return [part.ids for part in found.encode_batch_fast(texts, add_special_tokens=False)]

  identity = _identity('tokenizer.json', raw, hiding, ids[end], ids.get(usual))
  never = {ids[name] for name in hidden | {end}} - {unknown}
  made = PretrainedTokenizer(identity, max(ids.values()) + 1, ids[end], never, unknown, encode, found.decode_batch,
                            special.bytes_in_json(content, ids, never | {unknown}))
  _try(made, end, sorted(hidden | {end}))
  return made


def _unknown(model: dict[str, Any], ids: Mapping[str, int]) -> int | None:
  """The id that text outside the vocabulary becomes."""
  return model['unk_id'] if model.get('unk_id') is not None else ids.get(model.get('unk_token'))


def _try(tokenizer: PretrainedTokenizer, end: str, names: Iterable[str]) -> None:
  """Raises ConfigError where a special token's name, or unusual text, becomes a special token."""
  if tokenizer.unknown == tokenizer.end and any(tokenizer.reaches_special(text) for text in UNUSUAL):
    raise ConfigError(f'unknown text becomes {end!r}, which ends a document; a document could end anywhere')
  for name in names:
    if tokenizer.reaches_special(text := f'{name} a {name} {name}{name}'):
      raise ConfigError(f'a text that spells {name!r}, {text!r}, becomes a special token')


def _sentencepiece(raw: bytes, named: str) -> PretrainedTokenizer:
  library = need('sentencepiece', 'data.tokenizer')
  found = library.SentencePieceProcessor()
  found.LoadFromSerializedProto(raw)  # unlike the constructor, this does not take empty bytes for no model at all
  pieces = {found.id_to_piece(i): i for i in range(found.get_piece_size())}
  usual = found.eos_id()
  if usual < 0:
    usual = next((pieces[name] for name in ENDS if name in pieces), -1)
  end = pieces[_named(named, pieces, (name for name in pieces if name[0:1] == named[0:1]))] if named else usual
  if end < 0:
    raise ConfigError('the model has no end-of-sentence piece (eos_id is -1); name the token that ends a document in data.end_token')
  name = found.id_to_piece(end)
  content, hiding = special.hide_in_sentencepiece(raw, name)
  found.LoadFromSerializedProto(content)
  threads = os.cpu_count() or 1

  def encode(texts: list[str]) -> list[list[int]]:
    return found.encode(texts, out_type=int, num_threads=threads) if texts else []

  never = {i for i in range(len(pieces)) if found.is_control(i)} | {end}
  identity = _identity('sentencepiece', raw, hiding, end, usual)
  made = PretrainedTokenizer(identity, found.get_piece_size(), end, never, found.unk_id(), encode, found.decode,
                            np.array([0 if i in never or found.is_unknown(i) else special.piece_bytes(piece, found.is_byte(i))
                                      for piece, i in pieces.items()]))
  _try(made, name, [found_name for found_name, i in pieces.items() if i in never])
  return made
