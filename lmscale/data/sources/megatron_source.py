"""A Megatron data set as a token store: mapped where it lies, nothing is copied.

Whoever has only the two files knows neither the tokenizer nor the texts' lengths. tools/build_dataset.py writes both beside
them: `<prefix>.meta.json` (tokenizer, what it was made from, hashes) and `<prefix>.documents.npy` (split keys and bytes of
text). With them the split into training and validation is that of the texts themselves.
"""

import hashlib
import io
import itertools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from lmscale.data import atomic_folder, document, file_digest
from lmscale.data.sources import megatron
from lmscale.data.token_cache import TokenStore
from lmscale.data.tokenizer import Tokenizer
from lmscale.errors import ConfigError

FORMAT = 1  # raise when the same files would give other tokens or documents
LAYOUT = 2  # raise when other files are written about them
MAX_META = 1 << 26  # bytes
SCANNED = 1 << 24  # tokens at a time


def open_store(path: str, tokenizer: Tokenizer, cache: pathlib.Path) -> TokenStore:
  """The token store of the pair of files that `path` names; what a full scan found is kept below `cache`.

  Raises:
    ConfigError: a file is missing or damaged, or made with another tokenizer, or has ids that the tokenizer has not.
  """
  if not path or '\0' in path:
    raise ConfigError(f'path {path!r}: give the path of a Megatron data set without .bin and .idx')
  prefix = megatron.prefix_of(path)
  index = megatron.read_index(prefix)
  if index.dtype.kind == 'f':
    raise ConfigError(f'{prefix}.idx: tokens of {index.dtype} are no ids')
  idx, tokens_file = (megatron.with_ending(prefix, ending) for ending in ('.idx', '.bin'))
  hashes = {'idx': file_digest.digest(idx, cache).hex(), 'bin': file_digest.digest(tokens_file, cache).hex()}
  known = read_sidecar(prefix, hashes, len(index.documents) - 1)
  notices = ()
  if known is None:
    notices = (f'{prefix}: no .meta.json beside it says which tokenizer made it; check that it was data.tokenizer',)
  elif known['tokenizer'] != tokenizer.identity:
    raise ConfigError(f'{prefix}: made with the tokenizer {known["tokenizer"]}, but data.tokenizer is {tokenizer.identity}; '
                      'give the one it was made with')
  empty = tokens_file.stat().st_size == 0  # which cannot be mapped
  tokens = np.zeros(0, index.dtype) if empty else np.memmap(tokens_file, index.dtype, 'r')
  offsets = index.offsets
  scanned = hashlib.sha256(f'{hashes["idx"]} {hashes["bin"]} {FORMAT}'.encode()).hexdigest()[:32]

  def unchanged() -> bool:
    return hashes == {'idx': file_digest.digest(idx, cache).hex(), 'bin': file_digest.digest(tokens_file, cache).hex()}

  low, high, split_keys = _scan(tokens, offsets, unchanged, cache / 'megatron' / f'{scanned}-{LAYOUT}')
  if not empty and (low < 0 or high >= tokenizer.size):
    raise ConfigError(f'{tokens_file}: ids from {low} to {high}, but data.tokenizer has the ids 0 to {tokenizer.size - 1}: '
                      'give the tokenizer it was made with')
  sizes = None
  if known is not None:
    split_keys, sizes = known['split_keys'], known['text_bytes']
  content = hashlib.sha256(f'{hashes["idx"]} {hashes["bin"]} {known and known["documents"]}'.encode()).hexdigest()
  identity = hashlib.sha256(f'megatron {content} {FORMAT}'.encode()).hexdigest()[:32]
  return TokenStore(identity, tokens, offsets, split_keys, (), sizes, content, notices, files=2,
                    size=idx.stat().st_size + tokens_file.stat().st_size)


def _scan(tokens: np.ndarray, offsets: np.ndarray, unchanged: Callable[[], bool],
          folder: pathlib.Path) -> tuple[int, int, np.ndarray]:
  """(smallest id, largest id, split key of each document), from `folder` once they are known."""

  def build(folder: pathlib.Path) -> None:
    low, high = 0, 0
    for at in range(0, len(tokens), SCANNED):
      part = tokens[at:at + SCANNED]
      low, high = min(low, int(part.min())), max(high, int(part.max()))
    keys = (document.split_key(tokens[a:b].astype('<i8').tobytes()) for a, b in itertools.pairwise(offsets))
    np.save(folder / 'split_keys.npy', np.fromiter(keys, np.uint64, len(offsets) - 1), allow_pickle=False)
    if not unchanged():
      raise ConfigError('the .bin and .idx files changed while they were read; start again when they are complete')
    found = hashlib.sha256((folder / 'split_keys.npy').read_bytes()).hexdigest()
    (folder / 'ids.json').write_text(json.dumps({'low': low, 'high': high, 'sha256': found}))

  def read(folder: pathlib.Path) -> tuple[int, int, np.ndarray]:
    found = json.loads((folder / 'ids.json').read_text())
    raw = (folder / 'split_keys.npy').read_bytes()
    if hashlib.sha256(raw).hexdigest() != found['sha256']:
      raise ValueError('split_keys.npy changed')
    keys = np.load(io.BytesIO(raw), allow_pickle=False)
    if keys.shape != (len(offsets) - 1,) or keys.dtype != np.uint64:
      raise ValueError(f'{folder}: split keys {keys.shape} {keys.dtype}')
    return int(found['low']), int(found['high']), keys

  return atomic_folder.ensure(folder, build, read)


def read_sidecar(prefix: pathlib.Path, hashes: dict[str, str], documents: int) -> dict[str, Any] | None:
  """What tools/build_dataset.py noted about the pair; None if it did not make it.

  Raises:
    ConfigError: the notes are damaged or belong to other files.
  """
  path, arrays = megatron.with_ending(prefix, '.meta.json'), megatron.with_ending(prefix, '.documents.npy')
  if not path.exists():
    return None
  try:
    if path.stat().st_size > MAX_META:
      raise ConfigError(f'{path}: {path.stat().st_size} bytes; it is not what build_dataset.py wrote')
    meta = json.loads(path.read_text('utf-8'))
    found = {'tokenizer': str(meta['tokenizer']), 'documents': str(meta['sha256']['documents'])}
    changed = [name for name in hashes if meta['sha256'][name] != hashes[name]]
    if changed or file_digest.digest(arrays).hex() != found['documents']:
      raise ConfigError(f'{path}: belongs to other files: .{changed[0] if changed else "documents.npy"} has changed; '
                        'build the data set again, or delete .meta.json and .documents.npy')
    both = np.load(arrays, allow_pickle=False)
    if both.shape != (2, documents) or both.dtype != np.uint64:
      raise ValueError(f'{arrays.name} has the shape {both.shape}')
  except ConfigError:
    raise
  except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError) as error:
    raise ConfigError(f'{path}: damaged ({type(error).__name__}: {" ".join(str(error).split())[:120]}); build the data set '
                      'again, or delete .meta.json and .documents.npy') from error
  sizes = both[1].astype(np.int64)
  return {**found, 'split_keys': both[0], 'text_bytes': sizes if (sizes >= 0).all() else None}
