import struct
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from lmscale.data.sources import megatron
from lmscale.errors import ConfigError

# Written by megatron-core 0.16.1's IndexedDatasetBuilder: [5 4 3 299], [7 299], and a document of [9 8] and [1 2 299].
BIN = '0500040003002b0107002b010900080001000200' + '2b01'
IDX = ('4d4d494449445800000100000000000000080400000000000000040000000000000004000000020000000200000003000000'
       '000000000000000008000000000000000c000000000000001000000000000000'
       '0000000000000000010000000000000002000000000000000400000000000000')


@pytest.fixture
def prefix(tmp_path):
  (tmp_path / 'tiny.bin').write_bytes(bytes.fromhex(BIN))
  (tmp_path / 'tiny.idx').write_bytes(bytes.fromhex(IDX))
  return tmp_path / 'tiny'


def test_what_megatron_wrote_is_read(prefix):
  index = megatron.read_index(prefix)
  assert index.dtype == np.uint16 and index.lengths.tolist() == [4, 2, 2, 3]
  assert index.documents.tolist() == [0, 1, 2, 4] and index.offsets.tolist() == [0, 4, 6, 11]


def test_what_we_write_is_what_megatron_writes(prefix, tmp_path):
  index = megatron.read_index(prefix)
  megatron.write_index(tmp_path / 'again', index.dtype, index.lengths, index.documents)
  assert (tmp_path / 'again.idx').read_bytes().hex() == IDX


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(st.lists(st.lists(st.integers(0, 65_535), max_size=9), max_size=9), st.sampled_from(['<u2', '<i4', '<i8']))
def test_documents_survive_the_round_trip(tmp_path_factory, documents, dtype):
  folder = tmp_path_factory.mktemp('round')
  with megatron.Writer(folder / 'a.b', dtype) as writer:
    for ids in documents:
      writer.add(np.array(ids, np.int64))
  index = megatron.read_index(folder / 'a.b')
  tokens = np.fromfile(folder / 'a.b.bin', index.dtype)
  assert index.dtype == np.dtype(dtype)
  assert [tokens[a:b].tolist() for a, b in zip(index.offsets, index.offsets[1:], strict=False)] == documents
  megatron.write_index(folder / 'c', dtype, index.lengths, index.documents)
  assert (folder / 'c.idx').read_bytes() == (folder / 'a.b.idx').read_bytes()


def test_ids_that_do_not_fit_are_not_written(tmp_path):
  with pytest.raises(ValueError, match='65536 do not fit uint16'), megatron.Writer(tmp_path / 'a', '<u2') as writer:
    writer.add(np.array([1, 65_536]))
  assert not (tmp_path / 'a.idx').exists()
  assert megatron.dtype_for(65_499) == np.uint16 and megatron.dtype_for(65_500) == np.int32


def test_either_file_names_the_pair():
  for name in ('data/a.b', 'data/a.b.bin', 'data/a.b.idx'):
    assert megatron.prefix_of(name).as_posix() == 'data/a.b'


def packed(magic=megatron.MAGIC, version=1, code=8, sequences=4, entries=4, lengths=(4, 2, 2, 3), pointers=(0, 8, 12, 16),
           documents=(0, 1, 2, 4), tail=b''):
  return struct.pack('<9sQBQQ', magic, version, code, sequences, entries) + np.array(lengths, '<i4').tobytes() + np.array(
    pointers, '<i8').tobytes() + np.array(documents, '<i8').tobytes() + tail


def test_packed_is_the_golden():
  assert packed().hex() == IDX


@pytest.mark.parametrize(('raw', 'message'), [
  (b'', 'no index of a Megatron data set'),
  (b'MMIDIDX\0\0', 'no index of a Megatron data set'),
  (packed(magic=b'TNTIDX\0\0\0'), 'no index of a Megatron data set'),
  (packed(version=2), 'version 2; only 1 is known'),
  (packed(code=9), r'dtype code 9; known: 1 \(uint8\)'),
  (packed(sequences=2**63), 'bytes, the file has 114'),
  (packed(entries=2**40), '4 sequences and 1099511627776 document entries take 34'),
  (packed(tail=b'x'), '= 114 bytes, the file has 115'),
  (packed(tail=b'\0' * 4), 'multimodal'),
  (packed()[:-1], 'the file has 113'),
  (packed(lengths=(4, -2, 2, 3)), 'sequence 1 has the length -2'),
  (packed(pointers=(0, 8, 10, 16)), 'sequence 2 lies at byte 10, but the ones before it end at 12'),
  (packed(pointers=(2, 8, 12, 16)), 'sequence 0 lies at byte 2'),
  (packed(lengths=(4, 2, 2, 4)), r'12 tokens of 2 bytes take 24 bytes, the \.bin file has 22'),
  (packed(code=4, pointers=(0, 16, 24, 32)), r'take 44 bytes, the \.bin file has 22'),
  (packed(documents=(0, 2, 1, 4)), 'must rise from 0 to the 4 sequences'),
  (packed(documents=(1, 1, 2, 4)), 'must rise from 0'),
  (packed(documents=(0, 1, 2, 3)), 'must rise from 0'),
  (packed(documents=(0, 1, 9, 4)), 'must rise from 0'),
  (packed(entries=0, documents=()), 'must rise from 0'),
])
def test_a_damaged_index_is_rejected_at_open(prefix, raw, message):
  prefix.with_suffix('.idx').write_bytes(raw)
  tracemalloc.start()
  with pytest.raises(ConfigError, match=message) as caught:
    megatron.read_index(prefix)
  assert tracemalloc.get_traced_memory()[1] < 1 << 20  # nothing is allocated for what a header claims
  tracemalloc.stop()
  assert 'tiny.idx: ' in str(caught.value) and '\n' not in str(caught.value)


def test_a_missing_shorter_or_longer_file_is_rejected(prefix):
  for raw, size in ((bytes.fromhex(BIN)[:-2], 20), (bytes.fromhex(BIN) + b'12', 24)):
    prefix.with_suffix('.bin').write_bytes(raw)
    with pytest.raises(ConfigError, match=rf'take 22 bytes, the \.bin file has {size}'):
      megatron.read_index(prefix)
  for ending in ('.bin', '.idx'):
    prefix.with_suffix(ending).unlink()
    with pytest.raises(ConfigError, match=rf'tiny\{ending}: no such file; a Megatron data set is a pair of files'):
      megatron.read_index(prefix)
    prefix.with_suffix(ending).write_bytes(b'')
