"""The token cache: every source of text is tokenised once into flat arrays on disk.

A folder `<cache>/tokens/<key>` holds `tokens.bin` (all documents one after the other, each closed by the
end-of-document id), `offsets.npy` (where each document starts), `split_keys.npy` (which side of the split it is on),
`text_bytes.npy` (its length as text) and `meta.json`, which holds checksums of all of them.
The key names content, tokenizer and format, so nothing in a folder ever goes out of date; a source that changes while it is
read leaves nothing.
"""

import dataclasses
import hashlib
import io
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from lmscale.data import atomic_folder, document, file_digest
from lmscale.data.losses import Losses, notice_of
from lmscale.data.reading_notes import Notes
from lmscale.data.tokenizer import Tokenizer
from lmscale.errors import ConfigError

FORMAT = 1  # raise when the same text and tokenizer would give other tokens or documents
LAYOUT = 3  # raise when other files are written for them
BATCH_BYTES, BATCH_DOCUMENTS = 1 << 22, 1024  # text tokenised in one call
PROBED, PROBED_BYTES = 16, 4096  # documents of each batch, and bytes of each, on which it is tried whether text is changed


class Source(Protocol):
  """Documents, in an order of their own.

  A source may have `files`, the paths that it reads, and `notices`, a line each on what was odd about finding them.
  """

  def digest(self) -> str:
    """Names the content: equal only where the documents are equal."""

  def documents(self, notes: Notes) -> Iterable[document.Document]:
    """The documents. `notes` receives what was odd about them."""


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """The tokens of one source, memory-mapped read-only; document i is tokens[offsets[i]:offsets[i + 1]]."""

  identity: str  # hash of content, tokenizer and format
  tokens: np.ndarray  # uint16 or int32 [all]; of other people's Megatron files any integer
  offsets: np.ndarray  # int64 [documents + 1]
  split_keys: np.ndarray  # uint64 [documents]
  skipped: tuple[str, ...] = ()  # 'file:line: reason' of lines left out
  text_bytes: np.ndarray | None = None  # int64 [documents]: bytes of the texts; None where no text is known
  content: str = ''  # names the content alone
  notices: tuple[str, ...] = ()  # what was odd about the texts, now or when they were tokenised, a line each
  files: int = 0  # that it was made from
  size: int = 0  # bytes of them

  def documents(self, split: str, fraction: float) -> np.ndarray:
    """int64 indices of the documents on one side ('train' or 'validation') of the split."""
    chosen = document.in_validation(self.split_keys, fraction)
    return np.flatnonzero(chosen if split == 'validation' else ~chosen)


def tokenise(source: Source, tokenizer: Tokenizer, cache: pathlib.Path) -> TokenStore:
  """The token store of `source` below `cache`, written if it is missing or damaged.

  Raises:
    ConfigError: unusable text, or it changed while it was read.
  """
  states = {path: _state(path) for path in getattr(source, 'files', ())}
  content = source.digest()
  described = f'{type(source).__name__} {content} {tokenizer.identity} {FORMAT}'
  key = hashlib.sha256(described.encode()).hexdigest()[:32]

  def write(folder: pathlib.Path) -> None:
    _write(folder, source, tokenizer, key)
    if source.digest() != content:
      changed = [str(path) for path, state in states.items() if _state(path) != state]
      raise ConfigError(f'{", ".join(changed[:3]) or "the text"} changed while it was read, so nothing of it was '
                        'kept; start again when it is complete')

  store = atomic_folder.ensure(cache / 'tokens' / f'{key}-{LAYOUT}', write, lambda folder: _open(folder, cache))
  notices = (*getattr(source, 'notices', ()), *store.notices)
  size = sum(size for size, _ in states.values())
  return dataclasses.replace(store, content=content + store.content, notices=notices, files=len(states), size=size)


def _state(path: pathlib.Path) -> tuple[int, int]:
  try:
    status = path.stat()
  except OSError as error:
    raise file_digest.unreadable(path, error) from error
  return status.st_size, status.st_mtime_ns


def token_dtype(size: int) -> np.dtype:
  """The smallest of uint16 and int32 that holds the ids below `size`."""
  return np.dtype('<u2' if size <= 1 << 16 else '<i4')


def tokenised(documents: Iterable[document.Document], tokenizer: Tokenizer,
              losses: Losses) -> Iterator[tuple[np.ndarray, int, int]]:
  """(ids closed by the end id, split key, bytes of text or -1) of each document, a batch at a time; what the tokenizer
  loses is counted in `losses`."""
  dtype = token_dtype(tokenizer.size)
  end = np.array([tokenizer.end], dtype)
  for batch in batches(documents):
    texts = [d.text for d in batch if d.ids is None]
    found_ids = tokenizer.encode_batch(texts)
    check(texts, found_ids, losses)
    encoded = iter(found_ids)
    for found in batch:
      ids = next(encoded) if found.ids is None else _checked(found.ids, tokenizer)
      if found.ids is None or ids[-1] != tokenizer.end:
        ids = np.concatenate([ids.astype(dtype, copy=False), end])
      yield ids, found.split_key, len(found.text) if found.ids is None else -1


def check(texts: Sequence[bytes], ids: Sequence[np.ndarray], losses: Losses) -> None:
  """Counts in `losses` what became of a batch of texts."""
  losses.add(texts, ids)
  losses.probe([text[:PROBED_BYTES] for text in texts[::max(1, len(texts) // PROBED)]])


def _checked(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
  if ids.min() < 0 or ids.max() >= tokenizer.size:
    raise ConfigError(f'ids from {ids.min()} to {ids.max()}, but data.tokenizer has the ids 0 to {tokenizer.size - 1}: '
                      'name the tokenizer that the tokens were made with')
  return ids.astype(token_dtype(tokenizer.size))


def batches(documents: Iterable[document.Document]) -> Iterator[list[document.Document]]:
  """The documents in lists that are tokenised in one call."""
  batch, size = [], 0
  for found in documents:
    batch.append(found)
    size += len(found.text)
    if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _write(folder: pathlib.Path, source: Source, tokenizer: Tokenizer, key: str) -> None:
  lengths, split_keys, text_bytes, notes = [0], [], [], Notes()
  losses = Losses(tokenizer)
  with (folder / 'tokens.bin').open('wb') as file:
    writer = file_digest.BlockWriter(file)
    for ids, split_key, size in tokenised(source.documents(notes), tokenizer, losses):
      writer.write(ids.tobytes())
      lengths.append(len(ids))
      split_keys.append(split_key)
      text_bytes.append(size)
    writer.finish()
  notice_of(*losses.counts())
  arrays = {'offsets': np.cumsum(lengths, dtype=np.int64), 'split_keys': np.array(split_keys, np.uint64),
            'text_bytes': np.array(text_bytes, np.int64)}
  digests = {}
  for name, array in arrays.items():
    np.save(folder / f'{name}.npy', array, allow_pickle=False)
    digests[name] = hashlib.sha256((folder / f'{name}.npy').read_bytes()).hexdigest()
  meta = {'format': FORMAT, 'key': key, 'tokenizer': tokenizer.identity, 'dtype': token_dtype(tokenizer.size).str,
          'tokens': sum(lengths), 'documents': len(split_keys), 'sha256': digests, 'block': file_digest.BLOCK,
          'blocks': writer.checksums, 'notes': dataclasses.asdict(notes), 'losses': losses.counts()}
  (folder / 'meta.json').write_text(json.dumps({**meta, 'self': _hash(meta)}, indent=1), encoding='utf-8')


def _hash(meta: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(meta).encode()).hexdigest()


def _open(folder: pathlib.Path, cache: pathlib.Path) -> TokenStore:
  """Raises ValueError, KeyError, TypeError or OSError if a file is missing or is not what was written."""
  meta: dict[str, Any] = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
  if meta.pop('self') != _hash(meta):
    raise ValueError('meta.json changed')
  dtype = np.dtype(meta['dtype'])
  arrays = {}
  for name in ('offsets', 'split_keys', 'text_bytes'):
    raw = (folder / f'{name}.npy').read_bytes()
    if hashlib.sha256(raw).hexdigest() != meta['sha256'][name]:
      raise ValueError(f'{name}.npy changed')
    arrays[name] = np.load(io.BytesIO(raw), allow_pickle=False)
  path = folder / 'tokens.bin'
  if path.stat().st_size != meta['tokens'] * dtype.itemsize or meta['block'] != file_digest.BLOCK:
    raise ValueError(f'tokens.bin has {path.stat().st_size} bytes, not {meta["tokens"]} * {dtype.itemsize}')
  file_digest.check_blocks(path, meta['blocks'], cache)
  empty = meta['tokens'] == 0  # which cannot be mapped
  tokens = np.zeros(0, dtype) if empty else np.memmap(path, dtype, 'r')
  sizes = arrays['text_bytes'] if (arrays['text_bytes'] >= 0).all() else None
  notes = Notes(**meta['notes'])
  notices = filter(None, [*notes.lines(), notice_of(*meta['losses'])])
  return TokenStore(meta['key'], tokens, arrays['offsets'], arrays['split_keys'], tuple(notes.skipped), sizes,
                    ' decoded' if notes.decoded else '', tuple(notices))
