import bz2
import gzip
import io
import lzma
import tarfile
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lmscale.data.reading_notes import Notes
from lmscale.data.sources import text_files
from lmscale.errors import ConfigError

WORDS = b'some words of text\n' * 40


def made(write):
  out = io.BytesIO()
  write(out)
  return out.getvalue()


def zipped(out, names=('a.txt',)):
  with zipfile.ZipFile(out, 'w') as file:
    for name in names:
      file.writestr(name, WORDS)


def tarred(out, mode='w'):
  with tarfile.open(fileobj=out, mode=mode) as file:
    entry = tarfile.TarInfo('a.txt')
    entry.size = len(WORDS)
    file.addfile(entry, io.BytesIO(WORDS))


def streamed(out):
  table = pyarrow.table({'text': ['a', 'b']})
  with pyarrow.ipc.new_stream(out, table.schema) as writer:
    writer.write_table(table)


BINARY = {
  'an xz archive': lzma.compress(WORDS), 'an lzma archive': lzma.compress(WORDS, lzma.FORMAT_ALONE),
  'a bzip2 archive': bz2.compress(WORDS), 'a zip archive': made(zipped), 'a tar archive': made(tarred),
  'a parquet file': made(lambda out: pyarrow.parquet.write_table(pyarrow.table({'text': ['a', 'b']}), out)),
  'a NumPy array': made(lambda out: np.save(out, np.zeros(3))), 'an Arrow stream': made(streamed), 'a PDF': b'%PDF-1.7\n' + WORDS,
  '.Z archive': b'\x1f\x9d\x90' + bytes(20), 'a 7z archive': b'7z\xbc\xaf\x27\x1c\0\4' + bytes(20),
  'an lz4 archive': b'\x04\x22\x4d\x18\x64\x40\xa7' + bytes(20), 'an image': b'\x89PNG\r\n\x1a\n' + bytes(20),
}
EMPTY = {'a bzip2 archive': bz2.compress(b''), 'an empty zip archive': made(lambda out: zipped(out, ())),
         'an xz archive': lzma.compress(b''), 'a parquet file': b'PAR1 all letters PAR1'}
KINDS = pytest.mark.parametrize('kind', [text_files.TextSource, text_files.JsonlSource])


def read(path, kind=text_files.TextSource):
  notes = Notes()
  return [document.text for document in kind(str(path)).documents(notes)], notes


@KINDS
@pytest.mark.parametrize(('name', 'raw'), [*BINARY.items(), *EMPTY.items()])
def test_what_is_no_text_is_refused_by_name_with_what_to_do(tmp_path, kind, name, raw):
  for file, content in (('a.txt', raw), ('b', gzip.compress(raw))):
    (tmp_path / file).write_bytes(content)
    if file == 'b' and raw.startswith(b'PAR1 '):
      continue  # in an archive only what follows the magic tells
    with pytest.raises(ConfigError, match=f'data file {tmp_path}/{file}: is (a |an )?{name}, not text: (unpack|convert|extract)') as caught:
      read(tmp_path / file, kind)
    assert '\n' not in str(caught.value)


def test_an_archive_in_an_archive_is_refused(tmp_path):
  (tmp_path / 'a.txt.gz').write_bytes(gzip.compress(gzip.compress(WORDS)))
  with pytest.raises(ConfigError, match='a gzip archive in an archive, not text: unpack it'):
    read(tmp_path / 'a.txt.gz')


@pytest.mark.parametrize('raw', [b'BZh is no word', b'BZh9', b'PAR1 for the course', b'FEA1', b'PK', b'%PDF', b'MMIDIDX', b'Rar!', b'7z',
                                 b'GIF', b'ustar', b'x' * 250 + b'\nustar', b'xz', b'\x04', b'Obj', b'ORC 8'])
def test_text_that_begins_like_something_else_is_text(tmp_path, raw):
  (tmp_path / 'a.txt').write_bytes(raw)
  assert read(tmp_path / 'a.txt')[0] == [raw]
