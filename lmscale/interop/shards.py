"""Writing safetensors one tensor at a time: files of bounded size, an index where there is more than one, their SHA-256.

The format is 8 bytes with the header's length, little-endian; the header, JSON with the dtype, shape and place of each tensor;
and their numbers one after another, row by row. Where everything lies follows from shapes and dtypes, so nothing is held in memory.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lmscale.interop.folder import DTYPES, INDEX, SINGLE, SUMS
from lmscale.train.streamed import Pending

NAMES = {ours: theirs for theirs, ours in DTYPES.items()}
ALIGNED = 8  # bytes: the numbers begin at a multiple of it
LARGEST_PIECE = 64 << 20  # bytes hashed and written at a time


@dataclasses.dataclass(frozen=True)
class ToWrite(Pending):
  """A tensor to be written, under a name."""

  name: str


def write_shards(
  folder: pathlib.Path, tensors: Sequence[ToWrite], shard_size: int, tell: Callable[[int], None] = lambda size: None
) -> dict[str, str]:
  """Writes tensors in their order into files of at most `shard_size` bytes of numbers (a larger tensor has its own).

  tell(bytes): after each tensor. Returns {file: SHA-256}, the index's file included.
  """
  shards = _cut(tensors, shard_size)
  names = [SINGLE] if len(shards) == 1 else [f'model-{i + 1:05}-of-{len(shards):05}.safetensors' for i in range(len(shards))]
  sums = {name: _write(folder / name, shard, tell) for name, shard in zip(names, shards, strict=True)}
  if len(shards) > 1:
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {'metadata': {'total_size': sum(tensor.nbytes for tensor in tensors)}, 'weight_map': weight_map}
    sums[INDEX] = write_json(folder / INDEX, index)
  return sums


def write_json(path: pathlib.Path, values: dict[str, Any]) -> str:
  """Writes JSON; returns its SHA-256."""
  raw = (json.dumps(values, indent=2, ensure_ascii=False) + '\n').encode()
  path.write_bytes(raw)
  return hashlib.sha256(raw).hexdigest()


def write_sums(folder: pathlib.Path, sums: dict[str, str]) -> None:
  """Writes `SHA256SUMS`, as `sha256sum` would."""
  (folder / SUMS).write_text(''.join(f'{sums[name]}  {name}\n' for name in sorted(sums)), encoding='utf-8')


def _cut(tensors: Sequence[ToWrite], shard_size: int) -> list[list[ToWrite]]:
  shards: list[list[ToWrite]] = [[]]
  size = 0
  for tensor in tensors:
    if shards[-1] and size + tensor.nbytes > shard_size:
      shards.append([])
      size = 0
    shards[-1].append(tensor)
    size += tensor.nbytes
  return shards


def _header(tensors: Sequence[ToWrite]) -> bytes:
  entries: dict[str, Any] = {'__metadata__': {'format': 'pt'}}  # transformers wants to know
  start = 0
  for tensor in tensors:
    place = [start, start + tensor.nbytes]
    entries[tensor.name] = {'dtype': NAMES[tensor.dtype.name], 'shape': list(tensor.shape), 'data_offsets': place}
    start += tensor.nbytes
  raw = json.dumps(entries, separators=(',', ':')).encode()
  raw += b' ' * (-len(raw) % ALIGNED)
  return len(raw).to_bytes(8, 'little') + raw


def _write(path: pathlib.Path, tensors: Sequence[ToWrite], tell: Callable[[int], None]) -> str:
  total = hashlib.sha256()
  with path.open('wb') as file:

    def put(raw: Any) -> None:
      file.write(raw)
      total.update(raw)

    put(_header(tensors))
    for tensor in tensors:
      array = np.ascontiguousarray(tensor.load())
      if array.shape != tensor.shape or array.dtype != tensor.dtype:
        raise ValueError(f'{tensor.name}: {array.dtype}{list(array.shape)} came, {tensor.dtype}{list(tensor.shape)} was announced')
      raw = memoryview(array.reshape(-1).view(np.uint8))
      for start in range(0, len(raw), LARGEST_PIECE):
        put(raw[start : start + LARGEST_PIECE])
      tell(tensor.nbytes)
    file.flush()
    os.fsync(file.fileno())
  return total.hexdigest()
