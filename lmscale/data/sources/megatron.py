"""Megatron's indexed data set: `<prefix>.bin` holds the tokens back to back, `<prefix>.idx` says where sequences lie.

Little endian. The index: magic (9 bytes), version (uint64), dtype code (uint8), number of sequences S (uint64), length of
the document index D (uint64: documents + 1), sequence lengths in tokens (int32 [S]), sequence pointers in bytes
(int64 [S]), document index in sequences (int64 [D]). Written by Megatron-LM's preprocess_data.py and its forks.

An index is not trusted: its counts are compared with the file's size before anything is allocated, and everything
that a reader would rely on is checked.
"""

import os
import pathlib
import struct
from typing import NamedTuple, Self

import numpy as np

from lmscale.errors import ConfigError

MAGIC, VERSION = b'MMIDIDX\x00\x00', 1
HEADER = struct.Struct('<9sQBQQ')
DTYPES = {code: np.dtype(name) for code, name in
          {1: 'u1', 2: 'i1', 3: '<i2', 4: '<i4', 5: '<i8', 6: '<f8', 7: '<f4', 8: '<u2'}.items()}
CODES = {dtype: code for code, dtype in DTYPES.items()}
SMALL_VOCABULARY = 65_500  # below it Megatron writes uint16, else int32


class Index(NamedTuple):
  """What an .idx file says."""

  dtype: np.dtype  # of the tokens
  lengths: np.ndarray  # int32 [sequences], tokens
  documents: np.ndarray  # int64 [documents + 1]: document i is the sequences documents[i] .. documents[i + 1] - 1

  @property
  def offsets(self) -> np.ndarray:
    """int64 [documents + 1]: where in the tokens each document starts."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths, dtype=np.int64)])[self.documents]


def prefix_of(path: str) -> pathlib.Path:
  """The prefix of a pair of files, of which `path` is the prefix or either file."""
  return pathlib.Path(path.removesuffix('.idx').removesuffix('.bin')).expanduser()


def with_ending(prefix: pathlib.Path, ending: str) -> pathlib.Path:
  """`prefix` + `ending`: a prefix may hold dots."""
  return prefix.with_name(prefix.name + ending)


def read_index(prefix: pathlib.Path) -> Index:
  """The index of a pair of files.

  Raises:
    ConfigError: a file is missing, or the index is damaged, or does not fit the .bin file.
  """
  path, tokens = with_ending(prefix, '.idx'), with_ending(prefix, '.bin')
  for file in (path, tokens):
    if not file.is_file():
      raise ConfigError(f'{file}: no such file; a Megatron data set is a pair of files, .bin and .idx')
  try:
    size, bin_size = path.stat().st_size, tokens.stat().st_size
    with path.open('rb') as file:
      header = file.read(HEADER.size)
    if len(header) < HEADER.size or header[:len(MAGIC)] != MAGIC:
      raise ConfigError(f'{path}: no index of a Megatron data set (it does not begin with {MAGIC!r} and a header)')
    _, version, code, sequences, entries = HEADER.unpack(header)
    if version != VERSION:
      raise ConfigError(f'{path}: version {version}; only {VERSION} is known')
    if code not in DTYPES:
      raise ConfigError(f'{path}: dtype code {code}; known: {", ".join(f"{c} ({d})" for c, d in DTYPES.items())}')
    need = HEADER.size + 12 * sequences + 8 * entries
    if size == need + sequences and sequences:
      raise ConfigError(f'{path}: holds sequence modes: multimodal data sets are not text')
    if size != need:
      raise ConfigError(f'{path}: {sequences} sequences and {entries} document entries take {HEADER.size} + 12 * '
                        f'{sequences} + 8 * {entries} = {need} bytes, the file has {size}')
    raw = np.memmap(path, np.uint8, 'r')
    if len(raw) != size:
      raise ConfigError(f'{path}: its size changes while it is read')
  except OSError as error:
    raise ConfigError(f'{path}: cannot be read: {error.strerror}') from error
  parts = np.split(raw[HEADER.size:], np.cumsum([4 * sequences, 8 * sequences]))
  lengths, pointers, documents = (part.view(kind) for part, kind in zip(parts, ('<i4', '<i8', '<i8'), strict=True))
  _check(path, DTYPES[code].itemsize, lengths, pointers, documents, bin_size)
  return Index(DTYPES[code], lengths, documents)


def _check(path: pathlib.Path, itemsize: int, lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray,
           bin_size: int) -> None:
  if (lengths < 0).any():
    raise ConfigError(f'{path}: sequence {int(np.argmax(lengths < 0))} has the length {lengths.min()}')
  ends = np.cumsum(lengths, dtype=np.int64) * itemsize
  expected = np.concatenate([np.zeros(1, np.int64), ends])
  if (pointers != expected[:-1]).any():
    wrong = int(np.argmax(pointers != expected[:-1]))
    raise ConfigError(f'{path}: sequence {wrong} lies at byte {pointers[wrong]}, but the ones before it end at '
                      f'{expected[wrong]}')
  if expected[-1] != bin_size:
    raise ConfigError(f'{path}: its {expected[-1] // itemsize} tokens of {itemsize} bytes take {expected[-1]} bytes, the '
                      f'.bin file has {bin_size}')
  if not len(documents) or documents[0] != 0 or documents[-1] != len(lengths) or (np.diff(documents) < 0).any():
    raise ConfigError(f'{path}: the document index must rise from 0 to the {len(lengths)} sequences')


class Writer:
  """Writes a pair of files, one sequence per document; `close` completes them. A context manager."""

  def __init__(self, prefix: pathlib.Path, dtype: np.dtype):
    """`dtype` of the tokens: one of `DTYPES`."""
    self.prefix, self.dtype = prefix, np.dtype(dtype)
    self.lengths: list[int] = []
    self._file = with_ending(prefix, '.bin').open('wb')

  def add(self, ids: np.ndarray) -> None:
    """Appends a document. ValueError if its ids do not fit the dtype."""
    found = np.ascontiguousarray(ids, self.dtype)
    if (found != ids).any():
      raise ValueError(f'megatron: ids {ids.min()} .. {ids.max()} do not fit {self.dtype}')
    self._file.write(found.tobytes())
    self.lengths.append(len(found))

  def close(self) -> None:
    """Completes both files and has them on disk."""
    _sync(self._file)
    self._file.close()
    write_index(self.prefix, self.dtype, np.array(self.lengths, np.int32))

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
    self._file.close() if kind else self.close()


def write_index(prefix: pathlib.Path, dtype: np.dtype, lengths: np.ndarray, documents: np.ndarray | None = None) -> None:
  """The .idx file for sequences of `lengths` [S]; `documents` [D] as in `Index`, by default one document each."""
  if documents is None:
    documents = np.arange(len(lengths) + 1)
  pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * np.dtype(dtype).itemsize
  with with_ending(prefix, '.idx').open('wb') as file:
    file.write(HEADER.pack(MAGIC, VERSION, CODES[np.dtype(dtype)], len(lengths), len(documents)))
    for array, kind in ((lengths, '<i4'), (pointers, '<i8'), (documents, '<i8')):
      file.write(np.ascontiguousarray(array, kind).data)
    _sync(file)


def dtype_for(vocabulary: int) -> np.dtype:
  """The dtype that Megatron gives ids below `vocabulary`."""
  return np.dtype('<u2' if vocabulary < SMALL_VOCABULARY else '<i4')


def _sync(file: object) -> None:
  file.flush()
  os.fsync(file.fileno())
