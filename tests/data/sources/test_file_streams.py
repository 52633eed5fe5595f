import gzip
import os
import struct
import tracemalloc
import zlib

import hypothesis
import hypothesis.strategies as st
import pytest
import zstandard

from lmscale.data import file_digest
from lmscale.data.reading_notes import Notes
from lmscale.data.sources import encoding, file_streams
from lmscale.errors import ConfigError

PACK = {'gz': gzip.compress, 'zst': zstandard.ZstdCompressor().compress}
KINDS = pytest.mark.parametrize('kind', list(PACK))


def content(path):
  return b''.join(file_streams.blocks(path))


def write(tmp_path, name, raw):
  (tmp_path / name).write_bytes(raw)
  return tmp_path / name


@KINDS
def test_archives_give_the_bytes_that_went_in(tmp_path, kind):
  raw = os.urandom(300_000) + b'\0' * 3_000_000
  pack = PACK[kind]
  assert content(write(tmp_path, f'a.{kind}', pack(raw))) == raw
  assert content(write(tmp_path, 'b', pack(raw))) == raw  # told by the first bytes, not the name
  assert content(write(tmp_path, f'c.{kind}', pack(b'one') + pack(b'') + pack(raw))) == b'one' + raw
  assert content(write(tmp_path, f'd.{kind}', pack(b'one') + b'\0' * 999)) == b'one'  # padding
  assert content(write(tmp_path, f'e.{kind}', pack(b''))) == b''


def test_a_long_zstd_window_is_read(tmp_path):
  parameters = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
  packed = zstandard.ZstdCompressor(compression_params=parameters).compress(b'x' * 1000)
  assert content(write(tmp_path, 'a.zst', packed)) == b'x' * 1000


def skippable(content, kind=0):
  return struct.pack('<II', 0x184D2A50 + kind, len(content)) + content


def test_zstd_frames_of_other_data_are_passed_over(tmp_path):
  """pzstd begins with one that holds the size of the next frame."""
  pack = PACK['zst']
  for kind in (0, 15):
    other = skippable(b'abcd', kind)
    assert content(write(tmp_path, 'a.zst', other + pack(b'one') + other + other + pack(b'two') + other)) == b'onetwo'
    assert content(write(tmp_path, 'a', other + pack(b'one'))) == b'one'  # told by the first bytes, not the name
    assert content(write(tmp_path, 'b.zst', other)) == b''
    assert content(write(tmp_path, 'b.zst', skippable(b'', kind) + pack(b'') + pack(b'x'))) == b'x'
    for size in range(4, len(other)):
      with pytest.raises(file_streams.Damaged, match='truncated'):
        content(write(tmp_path, 'c.zst', other[:size]))
      with pytest.raises(file_streams.Damaged, match='truncated'):
        content(write(tmp_path, 'c.zst', pack(b'one') + other[:size]))
  with pytest.raises(file_streams.Damaged, match='damaged'):
    content(write(tmp_path, 'd.zst', skippable(b'abcd') + b'text behind it'))


@KINDS
def test_every_truncation_is_noticed(tmp_path, kind):
  packed = PACK[kind](b'one\ntwo\nthree\n' + os.urandom(50))
  for size in range(4, len(packed)):
    with pytest.raises(file_streams.Damaged, match='truncated'):
      content(write(tmp_path, f'a.{kind}', packed[:size]))


@KINDS
@pytest.mark.parametrize('kept', [0.3, 0.9])
def test_what_was_whole_is_given_before_the_error(tmp_path, kind, kept):
  lines = [os.urandom(40).hex().encode() for _ in range(2000)]
  packed = PACK[kind](b'\n'.join(lines))
  path = write(tmp_path, f'a.{kind}', packed[:int(kept * len(packed))])
  found = []
  with pytest.raises(ConfigError) as caught:
    for number, line in file_streams.lines(path, Notes()):
      found.append(line)
      assert number == len(found)
  assert found == lines[:len(found)]
  assert len(found) > 100 or kind == 'zst'  # a zstd block is 128 KiB of text
  assert str(caught.value) == f'data file {path}: the archive is truncated; its last whole line is line {len(found)}'


@KINDS
def test_damage_is_noticed(tmp_path, kind):
  packed = bytearray(PACK[kind](b'some text ' * 100) if kind == 'gz' else
                     zstandard.ZstdCompressor(write_checksum=True).compress(b'some text ' * 100))
  packed[-6 if kind == 'gz' else -2] ^= 1  # the checksum
  with pytest.raises(file_streams.Damaged, match='damaged'):
    content(write(tmp_path, f'a.{kind}', packed))
  with pytest.raises(file_streams.Damaged, match='damaged'):
    content(write(tmp_path, f'b.{kind}', PACK[kind](b'x') + b'junk behind it'))
  with pytest.raises(file_streams.Damaged, match=rf'no .{kind} archive: its first bytes are 70 6c 61 69'):
    content(write(tmp_path, f'c.{kind}', b'plain text'))
  with pytest.raises(file_streams.Damaged, match='missing'):
    content(write(tmp_path, f'd.{kind}', b''))


@KINDS
def test_a_bomb_goes_off_in_bounded_memory(tmp_path, kind, monkeypatch):
  monkeypatch.setattr(file_streams, 'BOMB_BYTES', 1 << 20)
  path = write(tmp_path, f'a.{kind}', PACK[kind](b'\0' * (1 << 25)))
  tracemalloc.start()
  seen = 0
  with pytest.raises(file_streams.Damaged, match='unpacks to more than'):
    for block in file_streams.blocks(path):
      seen += len(block)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert seen <= max(1 << 20, file_streams.BOMB_RATIO * path.stat().st_size) and peak < 100 << 20
  monkeypatch.setattr(file_streams, 'BOMB_BYTES', 1 << 26)
  assert sum(map(len, file_streams.blocks(path))) == 1 << 25


def is_plain(raw):
  return not raw.startswith((*encoding.MARKS, *(magic for magic, _, _ in encoding.MAGICS)))


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(st.binary(max_size=60).map(lambda raw: raw.replace(b'\x1f', b'\n')).filter(is_plain), st.integers(1, 9), st.integers(1, 30))
def test_lines_are_those_of_split(tmp_path_factory, raw, block, longest):
  path = tmp_path_factory.mktemp('lines') / 'a'
  path.write_bytes(raw)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(file_streams, 'BLOCK', block)
    patch.setattr(file_streams, 'MAX_LINE', longest)
    found = list(file_streams.lines(path, Notes()))
  expected = []
  for number, line in enumerate(raw.removeprefix(encoding.BOM).split(b'\n'), 1):
    if len(line) > longest:
      expected.append((number, None))
    elif line.strip():
      expected.append((number, line))
  assert found == expected


def test_unreadable_files_are_a_config_error(tmp_path):
  for read in (lambda path: list(file_streams.blocks(path)), lambda path: list(file_streams.lines(path, Notes())), file_digest.digest):
    with pytest.raises(ConfigError, match='cannot be read'):
      read(tmp_path)


def test_zlib_alone_is_no_archive(tmp_path):
  with pytest.raises(file_streams.Damaged):
    content(write(tmp_path, 'a.gz', zlib.compress(b'x')))
