import itertools
import json
import shutil

import made
import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import file_utils

from lmscale.data import document, token_cache
from lmscale.data.reading_notes import Notes
from lmscale.data.sources.tfds_source import TfdsSource, quiet
from lmscale.data.tokenizer import ByteTokenizer
from lmscale.errors import ConfigError


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  return made.prepare(tmp_path_factory.mktemp('tfds'))


@pytest.fixture
def copy(prepared, tmp_path):
  shutil.copytree(prepared, tmp_path / 'copy')
  return tmp_path / 'copy' / 'small' / '1.2.0'


def read(path, split='train', field='text'):
  notes = Notes()
  return list(TfdsSource(str(path), split, field).documents(notes)), notes.skipped


def test_text_of_a_folder_and_of_its_parents(prepared):
  for folder in (prepared, prepared / 'small', prepared / 'small' / '1.2.0'):
    found, skipped = read(folder)
    assert [d.text.decode() for d in found] == made.TEXTS and not skipped
  assert found[0].split_key == document.split_key(made.TEXTS[0].encode())


def test_a_prepared_name(prepared, monkeypatch):
  monkeypatch.setattr(file_utils, 'list_data_dirs', lambda **_: [str(prepared)])
  for name in ('small', 'small:1.2.0', 'small:1.*.*'):
    assert len(read(name)[0]) == 30
  for name in ('absent', 'small:3.0.0', 'small/config', 'na:me:s', '\0'):
    with pytest.raises(ConfigError, match="neither a folder nor a data set that TFDS has prepared.*file_format='array_record'"):
      read(name)


def test_splits_and_what_is_empty(prepared):
  assert [d.text.decode() for d in read(prepared, 'train[10:15]')[0]] == made.TEXTS[10:15]
  found, skipped = read(prepared, 'test')
  assert [d.text for d in found] == [b'held out'] and skipped[0].endswith('small/1.2.0:test:1: empty text')


class Given(tfds.core.GeneratorBasedBuilder):
  """Texts as bytes that the test chose."""

  VERSION = tfds.core.Version('1.0.0')
  url_infos = {}  # noqa: RUF012
  texts = ()

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({'text': tfds.features.Text()}),
                                 disable_shuffling=True)

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for i, text in enumerate(self.texts):
      yield i, {'text': text}


def given(folder, *texts):
  Given.texts = texts
  with quiet():
    Given(data_dir=folder, file_format='array_record').download_and_prepare()
  return TfdsSource(str(folder), 'train', 'text')


def test_text_follows_the_rules_of_files(tmp_path):
  words = 'déjà vu ' * 99
  source = given(tmp_path / 'a', words.encode(), ('\ufeff' + words).encode(), ('\ufeff' + words).encode('utf-16-le'), b'one \xff',
                 b'\xff\xfe', 'kept \ufffd'.encode())
  place = f'{source.folder}:train'
  for _ in range(2):
    store = token_cache.tokenise(source, ByteTokenizer(), tmp_path)
    assert store.notices == (
      f'3 texts were decoded by their byte order mark, the first in {place}:1',
      f'1 pieces of invalid UTF-8 became U+FFFD, the first in {place}:3', f'1 lines give no text and are skipped: {place}:4: empty text')
  found = [bytes(store.tokens[a:b - 1].tolist()).decode() for a, b in itertools.pairwise(store.offsets)]
  assert found == [words] * 3 + ['one \ufffd', 'kept \ufffd'] and store.content.endswith(' decoded')
  source = given(tmp_path / 'b', words.encode('latin-1'))
  with pytest.raises(ConfigError, match=rf'{source.folder}:train: 198 of 792 bytes are NUL or no UTF-8'):
    token_cache.tokenise(source, ByteTokenizer(), tmp_path)


def test_tokens_become_a_store(prepared, tmp_path):
  store = token_cache.tokenise(TfdsSource(str(prepared), 'train', 'tokens'), ByteTokenizer(), tmp_path)
  whole = b''.join(text.encode() for text in made.TEXTS)
  assert store.tokens[store.tokens != 256].tolist() == list(whole) and (store.tokens[store.offsets[1:] - 1] == 256).all()
  assert store.text_bytes is None and len(store.split_keys) == 30
  text = token_cache.tokenise(TfdsSource(str(prepared), 'train', 'text'), ByteTokenizer(), tmp_path)
  assert np.array_equal(text.tokens, store.tokens) and text.text_bytes.sum() == len(whole)

  class Few(ByteTokenizer):
    identity, size, end = 'few', 100, 99
  with pytest.raises(ConfigError, match='ids from 32 to 195, but data.tokenizer has the ids 0 to 99'):
    token_cache.tokenise(TfdsSource(str(prepared), 'train', 'tokens'), Few(), tmp_path)


def test_digest_names_content_split_and_field(prepared, copy):
  same = {TfdsSource(str(path), 'train', 'text').digest() for path in (prepared, copy)}
  others = {TfdsSource(str(prepared), split, field).digest() for split, field in
            (('test', 'text'), ('train', 'tokens'), ('train[:9]', 'text'))}
  assert len(same) == 1 and len(same | others) == 4


@pytest.mark.parametrize(('split', 'field', 'message'), [
  ('valid', 'text', "no split 'valid'; it has"),
  ('train[:', 'text', "split 'train\\[:' cannot be opened"),
  ('train[:5%%]', 'text', 'cannot be opened'),
  ('', 'text', "no split ''"),
  ('train', 'body', "no feature 'body'.*it has label, text, tokens"),
  ('train', 'label', 'neither text nor a list of integers'),
])
def test_what_is_not_there_is_a_config_error(prepared, split, field, message):
  with pytest.raises(ConfigError, match=message) as caught:
    read(prepared, split, field)
  assert '\n' not in str(caught.value)


def test_lost_records_are_noticed(copy):
  parts = sorted(copy.glob('*-train.array_record-*'))
  shutil.copy(copy / 'small-test.array_record-00000-of-00002', parts[1])
  with pytest.raises(ConfigError, match='the files of split train hold 16 records, but 30 were written'):
    read(copy)
  parts[1].unlink()
  with pytest.raises(ConfigError, match='missing'):
    read(copy)


def test_other_formats_are_refused(copy):
  path = copy / 'dataset_info.json'
  for stored_as in ('tfrecord', 'parquet'):
    path.write_text(json.dumps(json.loads(path.read_text()) | {'fileFormat': stored_as}))
    with pytest.raises(ConfigError, match=f"stored as {stored_as}, which cannot.*file_format='array_record'"):
      read(copy)


def test_a_class_that_is_not_tfds_own_is_not_imported(copy):
  path = copy / 'features.json'
  path.write_text(path.read_text().replace('tensorflow_datasets.core.features.text_feature.Text', 'antigravity.Text'))
  with pytest.raises(ConfigError, match="'antigravity.Text' is not one of TFDS itself"):
    read(copy)


def test_folders_without_one_data_set(prepared, tmp_path, copy):
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ConfigError, match='0 data sets in the folder'):
    read(tmp_path / 'empty')
  shutil.copytree(copy, copy.parent / '2.0.0')
  with pytest.raises(ConfigError, match='2 data sets in the folder'):
    read(copy.parent)
  with pytest.raises(ConfigError, match='path: empty'):
    read('')
