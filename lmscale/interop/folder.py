"""Reading a model folder that somebody else wrote: JSON and safetensors, never pickles, never code.

Nothing in the folder is trusted. Names of files come from an index and must be plain names of files inside the folder;
tensor names are only ever looked up, never made into a path; sizes are checked by the safetensors reader against the
file's length before anything is allocated. Where there are checksums (`SHA256SUMS`), every file that is read is compared.
Tensors are described from the headers of their files, and read by rows when they are asked for.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from lmscale.errors import ConfigError

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
SUMS = 'SHA256SUMS'  # as `sha256sum` writes it: `sha256sum -c SHA256SUMS` checks it, too
LINE = re.compile(r'([0-9a-f]{64}) [ *]([^/\\]+)')
LARGEST_JSON = 64 << 20  # bytes
DTYPES = {'F16': 'float16', 'BF16': 'bfloat16', 'F32': 'float32', 'F64': 'float64'}


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor in a file: its shape and dtype; `read` gives rows start..stop-1 of it, or all."""

  path: pathlib.Path
  key: str
  shape: tuple[int, ...]
  dtype: np.dtype

  def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows of the tensor. The file is mapped into memory only meanwhile."""
    with _opened(self.path) as file:
      return file.get_slice(self.key)[start:stop] if self.shape else file.get_tensor(self.key)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object from a file of at most 64 MiB. The literals Infinity and NaN are read as numbers.

  Raises:
    ConfigError: no such file, too large, not JSON, or not an object.
  """
  try:
    if path.stat().st_size > LARGEST_JSON:
      raise ConfigError(f'{path}: {path.stat().st_size} bytes; at most {LARGEST_JSON} are read')
    values = json.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise ConfigError(f'{path}: {error.strerror}') from error
  except (ValueError, RecursionError) as error:
    if isinstance(error, ConfigError):
      raise
    raise ConfigError(f'{path}: not JSON: {" ".join(str(error).split())}') from error
  if not isinstance(values, dict):
    raise ConfigError(f'{path}: expected an object, got {type(values).__name__}')
  return values


def open_tensors(folder: pathlib.Path) -> dict[str, Stored]:
  """{name: tensor} of `model.safetensors`, or of the files that `model.safetensors.index.json` names. Reads headers alone.

  Raises:
    ConfigError: neither file, a file outside the folder, a damaged file, a tensor that two files hold or that is not where the
      index says, or a dtype that is not floating point.
  """
  tensors: dict[str, Stored] = {}
  weight_map = _weight_map(folder)
  for name in sorted(set(weight_map.values())) or [SINGLE]:
    if not (path := inside(folder, name)).is_file():
      raise ConfigError(f'{path}: no such file' + f', but {INDEX} names it' * bool(weight_map))
    for key, stored in read_headers(path).items():
      if key in tensors:
        raise ConfigError(f'{folder}: two files hold the tensor {key!r}')
      tensors[key] = stored
  for key, name in weight_map.items():
    if key not in tensors or tensors[key].path.name != name:
      raise ConfigError(f'{folder / INDEX}: weight_map: {key!r} is not in {name}')
  return tensors


def inside(folder: pathlib.Path, name: str) -> pathlib.Path:
  """The path of a file in `folder`. Raises ConfigError for a link out of it."""
  path = folder / name
  if path.resolve().parent != folder.resolve():
    raise ConfigError(f'{path}: a link out of the folder is not followed; copy the folder with cp -rL')
  return path


def check_sums(folder: pathlib.Path, names: Iterable[str], tell: Callable[[int], None] = lambda size: None) -> dict[str, str]:
  """{name: SHA-256} of files of the folder, compared with `SHA256SUMS` where there is one. tell(bytes): after each part read.

  Raises:
    ConfigError: a file is not what was written, or the list is damaged.
  """
  wanted = _read_sums(folder)
  found = {}
  for name in names:
    total = hashlib.sha256()
    try:
      with inside(folder, name).open('rb') as file:
        while part := file.read(1 << 20):
          total.update(part)
          tell(len(part))
    except OSError as error:
      raise ConfigError(f'{folder / name}: {error.strerror or "cannot be read"}') from error
    found[name] = total.hexdigest()
    if name in wanted and wanted[name] != found[name]:
      raise ConfigError(f'{folder / name}: damaged: its SHA-256 is not the one in {SUMS}; copy it again')
  return found


def _read_sums(folder: pathlib.Path) -> dict[str, str]:
  path = folder / SUMS
  if not path.exists():
    return {}
  try:
    if path.stat().st_size > LARGEST_JSON:
      raise ValueError('too large')
    lines = [LINE.fullmatch(line) for line in path.read_text(encoding='utf-8').splitlines() if line.strip()]
    return {match[2]: match[1] for match in lines}
  except (OSError, ValueError, TypeError) as error:
    raise ConfigError(f'{path}: not lines of a SHA-256 and a plain file name, as sha256sum writes them; delete it to go without') from error


def _weight_map(folder: pathlib.Path) -> dict[str, str]:
  """{tensor: file} of the index; empty where there is one file without an index."""
  if folder.is_file():
    raise ConfigError(f'{folder} is a file; give the folder that holds config.json and {SINGLE} (a pickle, .pt or .bin is never read)')
  if not folder.is_dir():
    raise ConfigError(f'{folder}: no such folder')
  if (folder / SINGLE).exists():
    return {}
  if not (folder / INDEX).exists():
    raise ConfigError(
      f'{folder}: neither {SINGLE} nor {INDEX}; only safetensors are read (a .bin or .pt file can run code: convert it)'
    )
  weight_map = read_json(folder / INDEX).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise ConfigError(f'{folder / INDEX}: weight_map: expected tensor names and their files')
  for name in weight_map.values():
    if not isinstance(name, str) or pathlib.PurePath(name).name != name or not name.endswith('.safetensors'):
      raise ConfigError(f'{folder / INDEX}: weight_map: {name!r} is not the plain name of a .safetensors file')
  return weight_map


def read_headers(path: pathlib.Path) -> dict[str, Stored]:
  """{name: tensor} of one safetensors file. Raises ConfigError for a damaged one, or a dtype that is not floating point."""
  tensors = {}
  with _opened(path) as file:
    for key in file.keys():  # noqa: SIM118 (not a dict)
      part = file.get_slice(key)
      dtype = part.get_dtype()
      if dtype not in DTYPES:
        raise ConfigError(f'{path}: {key!r} is {dtype}; supported: {", ".join(DTYPES.values())}')
      tensors[key] = Stored(path, key, tuple(part.get_shape()), jnp.dtype(DTYPES[dtype]))
  return tensors


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
  """A safetensors file; its errors, and those within, become one line."""
  try:
    with safe_open(path, framework='numpy') as file:
      yield file
  except OSError as error:
    raise ConfigError(f'{path}: {error.strerror or "cannot be read"}') from error
  except ConfigError:
    raise
  except (SafetensorError, TypeError, ValueError, KeyError, AttributeError) as error:
    raise ConfigError(f'{path}: damaged or unsupported: {" ".join(str(error).split())}') from error
