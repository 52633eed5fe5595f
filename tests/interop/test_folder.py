import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lmscale.errors import ConfigError
from lmscale.interop import folder as folder_lib
from lmscale.interop import huggingface

GOLDEN = pathlib.Path(__file__).parents[1] / 'goldens' / 'mamba_untied'
ONES = np.ones((2, 3), np.float32)


def write_index(path: pathlib.Path, weight_map: object) -> None:
  (path / folder_lib.INDEX).write_text(json.dumps({'weight_map': weight_map}))


def test_two_files_with_an_index(tmp_path):
  save_file({'a': ONES, 'x/../../y': 2 * ONES}, tmp_path / 'one.safetensors')
  save_file({'b': ONES.astype(ml_dtypes.bfloat16)}, tmp_path / 'two.safetensors')
  write_index(tmp_path, {'a': 'one.safetensors', 'x/../../y': 'one.safetensors', 'b': 'two.safetensors'})
  tensors = folder_lib.open_tensors(tmp_path)
  assert {name: array.dtype.name for name, array in tensors.items()} == {
    'a': 'float32', 'x/../../y': 'float32', 'b': 'bfloat16'
  }  # fmt: skip
  np.testing.assert_array_equal(tensors['x/../../y'].read(), 2 * ONES)
  np.testing.assert_array_equal(tensors['b'].read(1, 2), ONES[1:2])


@pytest.mark.parametrize(
  'name', ['../one.safetensors', '/etc/one.safetensors', 'a/one.safetensors', 'one.bin', '..', '', 7, None, ['x']]
)
def test_index_with_other_than_plain_names(tmp_path, name):
  write_index(tmp_path, {'a': name})
  with pytest.raises(ConfigError, match='is not the plain name of a .safetensors file'):
    folder_lib.open_tensors(tmp_path)


@pytest.mark.parametrize('weight_map', [None, {}, [], 'x'])
def test_index_without_a_map(tmp_path, weight_map):
  write_index(tmp_path, weight_map)
  with pytest.raises(ConfigError, match='weight_map: expected'):
    folder_lib.open_tensors(tmp_path)


def test_link_out_of_the_folder(tmp_path):
  save_file({'a': ONES}, tmp_path / 'outside.safetensors')
  inner = tmp_path / 'inner'
  inner.mkdir()
  (inner / 'model.safetensors').symlink_to(tmp_path / 'outside.safetensors')
  with pytest.raises(ConfigError, match='a link out of the folder is not followed'):
    folder_lib.open_tensors(inner)


def test_tensor_in_two_files(tmp_path):
  for name in ('one', 'two'):
    save_file({'a': ONES}, tmp_path / f'{name}.safetensors')
  write_index(tmp_path, {'a': 'one.safetensors', 'b': 'two.safetensors'})
  with pytest.raises(ConfigError, match="two files hold the tensor 'a'"):
    folder_lib.open_tensors(tmp_path)


def test_missing_file_of_the_index(tmp_path):
  write_index(tmp_path, {'a': 'one.safetensors'})
  with pytest.raises(ConfigError, match='one.safetensors: '):
    folder_lib.open_tensors(tmp_path)


def test_pickles_are_not_read(tmp_path):
  (tmp_path / 'pytorch_model.bin').write_bytes(b'\x80\x04.')
  with pytest.raises(ConfigError, match='only safetensors are read'):
    folder_lib.open_tensors(tmp_path)


def damage_empty(data: bytes) -> bytes:
  return b''


def damage_cut(data: bytes) -> bytes:
  return data[:-1]


def damage_append(data: bytes) -> bytes:
  return data + b'x'


def damage_header_size(data: bytes) -> bytes:
  return b'\xff' * 8 + data[8:]


def damage_header(data: bytes) -> bytes:
  return data[:8] + b'[' * 40 + data[48:]


@pytest.mark.parametrize('damage', [damage_empty, damage_cut, damage_append, damage_header_size, damage_header])
def test_damaged_file(tmp_path, damage):
  shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
  path = tmp_path / 'model.safetensors'
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(ConfigError, match='model.safetensors: damaged or unsupported') as error:
    huggingface.load(tmp_path)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('dtype', [np.int8, ml_dtypes.float8_e4m3fn])
def test_quantised_tensors_are_refused(tmp_path, dtype):
  save_file({'a': ONES.astype(dtype)}, tmp_path / 'model.safetensors')
  with pytest.raises(ConfigError, match='supported|unsupported'):
    folder_lib.open_tensors(tmp_path)


@pytest.mark.parametrize(
  ('text', 'message'),
  [('', 'not JSON'), ('[1]', 'expected an object'), ('{"a": ', 'not JSON'), ('[' * 100_000, 'not JSON')],
)
def test_json_that_is_not_an_object(tmp_path, text, message):
  path = tmp_path / 'config.json'
  path.write_text(text)
  with pytest.raises(ConfigError, match=message):
    folder_lib.read_json(path)


def test_json_with_bytes_that_are_not_text_or_too_large_or_missing(tmp_path, monkeypatch):
  path = tmp_path / 'config.json'
  with pytest.raises(ConfigError, match='No such file'):
    folder_lib.read_json(path)
  path.write_bytes(b'{"a": "\xff"}')
  with pytest.raises(ConfigError, match='not JSON'):
    folder_lib.read_json(path)
  monkeypatch.setattr(folder_lib, 'LARGEST_JSON', 4)
  with pytest.raises(ConfigError, match='bytes; at most 4 are read'):
    folder_lib.read_json(path)
