"""The token cache: every source is tokenised once into flat arrays on disk.

A folder `<cache>/tokens/<key>` holds `tokens.bin` (all documents one after the other, each closed by the
end-of-document id), `offsets.npy` (where each document starts), `split_keys.npy` (which side of the split it is on)
and `meta.json`.
The key names content, tokenizer and format, so nothing in a folder ever goes out of date.
"""

import dataclasses
import hashlib
import io
import json
import logging
import pathlib
from typing import Any

import numpy as np

from lmscale import config as config_lib
from lmscale.data import document, storage
from lmscale.data.stdlib import StdlibSource
from lmscale.data.text import JsonlSource, TextSource
from lmscale.data.tokenizer import ByteTokenizer

FORMAT = 1

log = logging.getLogger(__name__)

Source = TextSource | JsonlSource | StdlibSource


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """The tokens of one source, memory-mapped read-only; document i is tokens[offsets[i]:offsets[i + 1]]."""

  identity: str  # hash of content, tokenizer and format
  tokens: np.ndarray  # uint16 or int32 [all]
  offsets: np.ndarray  # int64 [documents + 1]
  split_keys: np.ndarray  # uint64 [documents]
  skipped: tuple[str, ...]  # 'file:line: reason' of lines left out

  def documents(self, split: str, fraction: float) -> np.ndarray:
    """int64 indices of the documents on one side ('train' or 'validation') of the split."""
    chosen = document.in_validation(self.split_keys, fraction)
    return np.flatnonzero(chosen if split == 'validation' else ~chosen)


def open_source(source: config_lib.SourceConfig, cache: pathlib.Path) -> Source:
  """The documents that one entry of data.sources names. Raises ConfigError for an unknown kind or a bad path."""
  if source.kind == 'stdlib':
    return StdlibSource(source.path, cache)
  if source.kind == 'text':
    return TextSource(source.path)
  if source.kind == 'jsonl':
    return JsonlSource(source.path)
  raise config_lib.ConfigError(f'data source kind {source.kind!r}: unknown; known: stdlib, text, jsonl')


def tokenise(source: Source, tokenizer: ByteTokenizer, cache: pathlib.Path) -> TokenStore:
  """The token store of `source` below `cache`, written if it is missing or damaged. ConfigError: no text at all."""
  described = f'{type(source).__name__} {source.digest()} {tokenizer.identity} {FORMAT}'
  key = hashlib.sha256(described.encode()).hexdigest()[:32]
  return storage.ensure(cache / 'tokens' / key, lambda folder: _write(folder, source, tokenizer, key), _open)


def _write(folder: pathlib.Path, source: Source, tokenizer: ByteTokenizer, key: str) -> None:
  dtype = np.dtype('<u2' if tokenizer.size <= 1 << 16 else '<i4')
  end = np.array([tokenizer.end], dtype).tobytes()
  lengths, split_keys, skipped = [0], [], []
  with (folder / 'tokens.bin').open('wb') as file:
    for text, split_key in source.documents(skipped):
      ids = tokenizer.encode(text).astype(dtype, copy=False)
      file.write(ids.tobytes())
      file.write(end)
      lengths.append(len(ids) + 1)
      split_keys.append(split_key)
  if skipped:
    log.warning('%d lines give no text and are skipped: %s', len(skipped), '; '.join(skipped))
  arrays = {'offsets': np.cumsum(lengths, dtype=np.int64), 'split_keys': np.array(split_keys, np.uint64)}
  digests = {}
  for name, array in arrays.items():
    np.save(folder / f'{name}.npy', array, allow_pickle=False)
    digests[name] = hashlib.sha256((folder / f'{name}.npy').read_bytes()).hexdigest()
  meta = {'format': FORMAT, 'key': key, 'tokenizer': tokenizer.identity, 'dtype': dtype.str, 'tokens': sum(lengths),
          'documents': len(split_keys), 'sha256': digests, 'skipped': skipped}
  (folder / 'meta.json').write_text(json.dumps(meta, indent=1), encoding='utf-8')


def _open(folder: pathlib.Path) -> TokenStore:
  """Raises ValueError, KeyError or OSError if a file is missing or has not the size or hash that was written."""
  meta: dict[str, Any] = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
  dtype = np.dtype(meta['dtype'])
  arrays = {}
  for name in ('offsets', 'split_keys'):
    raw = (folder / f'{name}.npy').read_bytes()
    if hashlib.sha256(raw).hexdigest() != meta['sha256'][name]:
      raise ValueError(f'{folder}: {name}.npy changed')
    arrays[name] = np.load(io.BytesIO(raw), allow_pickle=False)
  path = folder / 'tokens.bin'
  if path.stat().st_size != meta['tokens'] * dtype.itemsize:
    raise ValueError(f'{folder}: tokens.bin has {path.stat().st_size} bytes, not {meta["tokens"]} * {dtype.itemsize}')
  empty = meta['tokens'] == 0  # which cannot be mapped
  tokens = np.zeros(0, dtype) if empty else np.memmap(path, dtype, 'r')
  return TokenStore(meta['key'], tokens, arrays['offsets'], arrays['split_keys'], tuple(meta['skipped']))
