"""Reading a model folder that somebody else wrote: JSON and safetensors, never pickles, never code.

Nothing in the folder is trusted. Names of files come from an index and must be plain names of files inside the folder;
tensor names are only ever looked up, never made into a path; sizes are checked by the safetensors reader against the
file's length before anything is allocated.
"""

import json
import pathlib
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from lmscale.errors import ConfigError

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
LARGEST_JSON = 64 << 20  # bytes
FLOATS = ('float16', 'bfloat16', 'float32', 'float64')


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


def read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Every tensor of `model.safetensors`, or of the files that `model.safetensors.index.json` names, as stored.

  Raises:
    ConfigError: neither file, a file outside the folder, a damaged file, a tensor that two files hold, or a dtype that
      is not floating point.
  """
  tensors: dict[str, np.ndarray] = {}
  for name in _file_names(folder):
    for key, array in _read_file(_inside(folder, name)).items():
      if key in tensors:
        raise ConfigError(f'{folder}: two files hold the tensor {key!r}')
      tensors[key] = array
  return tensors


def _file_names(folder: pathlib.Path) -> list[str]:
  if (folder / SINGLE).exists():
    return [SINGLE]
  if not (folder / INDEX).exists():
    raise ConfigError(
      f'{folder}: neither {SINGLE} nor {INDEX}; only safetensors are read (a .bin or .pt file can run code: convert it)'
    )
  weight_map = read_json(folder / INDEX).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise ConfigError(f'{folder / INDEX}: weight_map: expected tensor names and their files')
  names = list(weight_map.values())
  for name in names:
    if not isinstance(name, str) or pathlib.PurePath(name).name != name or not name.endswith('.safetensors'):
      raise ConfigError(f'{folder / INDEX}: weight_map: {name!r} is not the plain name of a .safetensors file')
  return sorted(set(names))


def _inside(folder: pathlib.Path, name: str) -> pathlib.Path:
  path = folder / name
  if path.resolve().parent != folder.resolve():
    raise ConfigError(f'{path}: a link out of the folder is not followed; copy the file here')
  return path


def _read_file(path: pathlib.Path) -> dict[str, np.ndarray]:
  tensors = {}
  try:
    with safe_open(path, framework='numpy') as file:
      for key in file.keys():  # noqa: SIM118 (not a dict)
        tensors[key] = file.get_tensor(key)
  except OSError as error:
    raise ConfigError(f'{path}: {error.strerror or "cannot be read"}') from error
  except (SafetensorError, TypeError, ValueError, KeyError, AttributeError) as error:
    raise ConfigError(f'{path}: damaged or unsupported: {" ".join(str(error).split())}') from error
  for key, array in tensors.items():
    if array.dtype.name not in FLOATS:
      raise ConfigError(f'{path}: {key!r} is {array.dtype.name}; supported: {", ".join(FLOATS)}')
  return tensors
