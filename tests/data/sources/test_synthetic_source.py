"""A synthetic task as a source of the blend."""

import numpy as np
import pytest

from lmscale.config import Config, DataConfig, SourceConfig, TrainConfig
from lmscale.data.loader import Loader
from lmscale.data.reading_notes import Notes
from lmscale.data.sources.opening import open_source
from lmscale.data.sources.synthetic_source import SyntheticSource
from lmscale.errors import ConfigError


def test_documents_hold_their_answers(tmp_path):
  source = open_source(SourceConfig('book', 'synthetic', 'phonebook:220-400:50'), tmp_path)
  texts = [d.text.decode() for d in source.documents(Notes())]
  assert len(texts) == len(set(texts)) == 50
  lengths = [len(text) for text in texts]
  assert max(lengths) <= 400 and max(lengths) - min(lengths) > 120
  for text in texts:
    *_, last = text.strip().splitlines()
    name, number = last.removeprefix('The number of ').split(' is ')
    assert f'{name}: {number}\n' in text
  assert [d.text.decode() for d in source.documents(Notes())] == texts
  digests = {SyntheticSource(path).digest() for path in ('copy:50:9', 'copy:51:9', 'copy:50:8', 'mqar:50:9', 'copy:40-50:9')}
  assert len(digests) == 5


def test_it_trains_beside_other_sources(tmp_path):
  sources = (SourceConfig('mqar', 'synthetic', 'mqar:64:300'), SourceConfig('copy', 'synthetic', 'copy:40:300'))
  config = Config(data=DataConfig(sources=sources, cache=str(tmp_path)), train=TrainConfig(seq_len=64))
  batch = Loader(config, tell=False).batch(0, range(8))
  assert batch['tokens'].shape == (8, 64) and np.any(batch['labels'] >= 0)
  assert Loader(config, tell=False).identity == Loader(config, tell=False).identity


@pytest.mark.parametrize(
  'path,reason',
  [
    ('phonebook', 'a synthetic source is TASK:BYTES:DOCUMENTS'), ('phonebook:100', 'is TASK:BYTES'), ('copy:9-3:5', 'is TASK:BYTES'),
    ('copy:x:5', 'is TASK:BYTES'), ('copy:50:0', 'is TASK:BYTES'), ('niah:50:5', "no task 'niah' to train on; known: niah_single_1,"),
    ('qa_1:5000:5', "no task 'qa_1'"), ('phonebook:60:5', 'task phonebook: 60 tokens are too few'),
  ],
)  # fmt: skip
def test_bad_paths(path, reason):
  with pytest.raises(ConfigError, match=reason):
    SyntheticSource(path)
