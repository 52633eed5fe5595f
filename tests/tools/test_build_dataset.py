import gzip
import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lmscale import config as config_lib
from lmscale.data.loader import Loader
from lmscale.data.sources import megatron
from lmscale.errors import ConfigError
from tools import build_dataset

ROOT = pathlib.Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / 'tests' / 'data'))
from made import make_bpe, make_sentencepiece

ENDINGS = ('.bin', '.idx', '.meta.json', '.documents.npy')


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('LMSCALE_CACHE', str(tmp_path / 'cache'))


@pytest.fixture
def corpus(tmp_path):
  """Twelve files of JSON lines, one of them damaged in a line, two of them equal."""
  folder = tmp_path / 'in [1]'
  folder.mkdir()
  rng = random.Random(0)
  for i in range(12):
    lines = [json.dumps({'text': ''.join(rng.choices('abcdefgh ', k=rng.randrange(1, 400)))}) for _ in range(60)]
    (folder / f'{i:02}.jsonl.gz').write_bytes(gzip.compress('\n'.join(lines + ['broken'] * (i == 3)).encode(), mtime=0))
  (folder / '05.jsonl.gz').write_bytes((folder / '04.jsonl.gz').read_bytes())
  return folder


def inline(monkeypatch):
  """Runs the work in this process, as starting others takes a second each, and does not wait for the disk."""
  monkeypatch.setattr(os, 'fsync', lambda descriptor: None)
  class Pool(build_dataset.concurrent.futures.ThreadPoolExecutor):
    def __init__(self, workers, *_):
      super().__init__(1)
  monkeypatch.setattr(build_dataset.concurrent.futures, 'ProcessPoolExecutor', Pool)


def built(out):
  return {ending: megatron.with_ending(out, ending).read_bytes() for ending in ENDINGS}


def command(corpus, out, *more):
  return [sys.executable, str(ROOT / 'tools' / 'build_dataset.py'), '--input', f'jsonl:{corpus}', '--out', str(out),
          '--workers', '2', *more]


def environment():
  return {**os.environ, 'PYTHONPATH': str(ROOT)}


def test_the_result_trains_as_the_text_does(tmp_path, corpus, monkeypatch, capsys):
  inline(monkeypatch)
  out = tmp_path / 'new' / 'folder' / 'mine'
  assert build_dataset.main(['--input', f'jsonl:{corpus}', '--out', f'{out}.bin', '--workers', '3']) == 0
  said, err = capsys.readouterr()
  assert '720 documents, tokenizer bytes-v1' in said and '03.jsonl.gz:61: broken JSON' in err
  assert not megatron.with_ending(out, '.shards').exists() and len(list(out.parent.iterdir())) == 4
  meta = json.loads(built(out)['.meta.json'])
  assert meta['sha256']['bin'] == hashlib.sha256(built(out)['.bin']).hexdigest()
  assert [entry['skipped'] for entry in meta['inputs']] == [0, 0, 0, 1, *[0] * 8]
  stores, loaders = [], []
  for source in (config_lib.SourceConfig('a', 'jsonl', str(corpus)), config_lib.SourceConfig('a', 'megatron', str(out))):
    data = config_lib.DataConfig(sources=(source,), validation=0.2)
    config = config_lib.Config(train=config_lib.TrainConfig(seq_len=64), data=data)
    loaders.append(Loader(config, 'validation'))
    stores.append(loaders[-1].stores[0])
  for name in ('tokens', 'offsets', 'split_keys', 'text_bytes'):
    assert np.array_equal(getattr(stores[0], name), getattr(stores[1], name))
  ratios = [loader.bytes_per_token(loader.samples_per_epoch) for loader in loaders]
  assert ratios[0] == pytest.approx(ratios[1], rel=0.01) and 0.98 < ratios[0] < 1


def test_a_second_call_finds_everything_done(tmp_path, corpus, monkeypatch, capsys):
  inline(monkeypatch)
  argv = ['--input', f'jsonl:{corpus}', '--out', str(tmp_path / 'a')]
  assert build_dataset.main(argv) == 0
  before = {path: path.stat().st_mtime_ns for path in tmp_path.glob('a.*')}
  monkeypatch.setattr(build_dataset, 'build_shard', None)
  assert build_dataset.main(argv) == 0 and len(before) == 4
  assert {path: path.stat().st_mtime_ns for path in tmp_path.glob('a.*')} == before
  (corpus / '07.jsonl.gz').write_bytes(gzip.compress(b'{"text": "other"}'))
  assert build_dataset.main(argv) == 2
  assert 'was built from other input or with another tokenizer' in capsys.readouterr().err
  assert {path: path.stat().st_mtime_ns for path in tmp_path.glob('a.*')} == before


def test_each_step_may_be_the_last(tmp_path, corpus, monkeypatch):
  """Stopped before each rename, and before each shard: the next call gives the same files."""
  inline(monkeypatch)
  inputs = [config_lib.SourceConfig('a', 'jsonl', str(corpus))]
  build_dataset.build(inputs, 'bytes', tmp_path / 'whole', 1)
  expected = built(tmp_path / 'whole')
  for stop in (0, 5, 12, 13, 14, 15, 16):  # twelve shards, then four renames
    calls = []

    def count(step, stop=stop, calls=calls):
      def stepped(*args):
        calls.append(1)
        if len(calls) > stop:
          raise RuntimeError('killed')
        return step(*args)
      return stepped

    out = tmp_path / f'a{stop}'
    with monkeypatch.context() as patch:
      patch.setattr(build_dataset, 'build_shard', count(build_dataset.build_shard))
      patch.setattr(build_dataset.os, 'replace', count(os.replace))
      if stop < 16:
        with pytest.raises(RuntimeError, match='killed'):
          build_dataset.build(inputs, 'bytes', out, 1)
        assert not megatron.with_ending(out, '.idx').exists()  # the last to appear
      else:
        build_dataset.build(inputs, 'bytes', out, 1)
    build_dataset.build(inputs, 'bytes', out, 1)
    assert built(out) == expected


@pytest.mark.parametrize('shares', [(None, 0.6), pytest.param(range(8), marks=pytest.mark.slow)], ids=['twice', 'often'])
def test_killed_at_any_moment(tmp_path, corpus, shares):
  """Real processes, killed with SIGKILL (the parent alone: its workers must not live on), then run to the end.

  A share is when to kill, of the time that a whole run takes; None is when the first shard is being made.
  """
  if len(shares) > 2:
    shares = [None, *(random.uniform(0.3, 1) for _ in shares)]
  started = time.monotonic()
  subprocess.run(command(corpus, tmp_path / 'whole'), env=environment(), check=True, capture_output=True)
  took = time.monotonic() - started
  expected = built(tmp_path / 'whole')
  killed = []
  for share in shares:
    process = subprocess.Popen(command(corpus, tmp_path / 'a'), env=environment(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < (60 if share is None else share * took):
      if share is None and [path for path in tmp_path.glob('a.shards/*') if path.name != 'lock']:
        break  # its workers are at work
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed.append(process.pid)
  deadline = time.monotonic() + 20
  while any(map(alive, killed)) and time.monotonic() < deadline:
    time.sleep(0.1)
  assert not any(map(alive, killed))  # in the sessions of the killed parents
  subprocess.run(command(corpus, tmp_path / 'a'), env=environment(), check=True, capture_output=True)
  assert built(tmp_path / 'a') == expected
  assert not megatron.with_ending(tmp_path / 'a', '.shards').exists()


def alive(session):
  """Processes of a session that are not zombies."""
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*/stat'):
    try:
      fields = path.read_text().rpartition(')')[2].split()
    except OSError:
      continue
    if int(fields[3]) == session and fields[0] != 'Z':
      found.append(path.parent.name)
  return found


def test_mistakes_are_one_line_and_change_nothing(tmp_path, corpus, monkeypatch, capsys):
  inline(monkeypatch)
  (tmp_path / 'taken.bin').write_bytes(b'mine')
  (tmp_path / 'empty.jsonl').write_text('')
  before = sorted(tmp_path.glob('*'))
  for argv, message in (
    (['--input', 'jsonl:/missing', '--out', f'{tmp_path}/a'], "path '/missing': no such file"),
    (['--input', f'{corpus}', '--out', f'{tmp_path}/a'], 'is no source'),
    (['--input', f'jsonl:{corpus}', '--out', f'{tmp_path}/a', '--tokenizer', 'x.json'], 'data.tokenizer: x.json: No such file'),
    (['--input', f'jsonl:{corpus}', '--out', f'{tmp_path}/a', '--workers', '0'], '--workers: 0'),
    (['--input', f'jsonl:{corpus}', '--out', f'{tmp_path}/taken'], 'taken.bin exists and was not made by this tool'),
    (['--input', f'jsonl:{corpus}', '--out', f'{tmp_path}/taken.bin/a'], '--out: cannot write'),
    (['--input', 'stdlib:nothing', '--out', f'{tmp_path}/a'], "'nothing': a stdlib source is one of code, prose"),
  ):
    assert build_dataset.main(argv) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith('error: ') and message in said[0]
    assert [path for path in sorted(tmp_path.glob('*')) if path.name != 'cache'] == before
  assert build_dataset.main(['--input', f'jsonl:{tmp_path}/empty.jsonl', '--out', f'{tmp_path}/a']) == 2
  assert 'no document in it' in capsys.readouterr().err and not list(tmp_path.glob('a.bin'))


def test_two_processes_do_not_build_the_same(tmp_path, corpus, monkeypatch):
  inline(monkeypatch)
  (tmp_path / 'a.shards').mkdir()
  with (tmp_path / 'a.shards' / 'lock').open('w') as lock:
    build_dataset.fcntl.flock(lock, build_dataset.fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match='another process is building'):
      build_dataset.build([config_lib.SourceConfig('a', 'jsonl', str(corpus))], 'bytes', tmp_path / 'a', 1)


def test_a_truncated_archive_leaves_nothing(tmp_path, corpus, monkeypatch, capsys):
  inline(monkeypatch)
  path = corpus / '09.jsonl.gz'
  path.write_bytes(path.read_bytes()[:-9])
  argv = ['--input', f'jsonl:{corpus}', '--out', str(tmp_path / 'a')]
  assert build_dataset.main(argv) == 2
  assert '09.jsonl.gz: the archive is truncated; its last whole line is line' in capsys.readouterr().err
  assert not [path for path in tmp_path.glob('a.*') if path.name != 'a.shards']


def test_a_file_that_changed_meanwhile_is_not_kept(tmp_path, corpus):
  path, shards = corpus / '02.jsonl.gz', tmp_path / 'shards'
  source = config_lib.SourceConfig('a', 'jsonl', str(path))
  key = build_dataset.shard_key(source, 'bytes')
  path.write_bytes((corpus / '04.jsonl.gz').read_bytes())
  with pytest.raises(ConfigError, match='changed while it was read; give the command again'):
    build_dataset.build_shard(source, key, 'bytes', shards)
  assert not (shards / key).exists()


def test_the_end_token_can_be_named(corpus, tmp_path, monkeypatch, capsys):
  inline(monkeypatch)
  name = make_bpe(tmp_path / 'tokenizer.json')
  argv = ['--input', f'jsonl:{corpus}/00.jsonl.gz', '--tokenizer', name, '--out', str(tmp_path / 'a'), '--workers', '1']
  assert build_dataset.main([*argv, '--end_token', '<pad>']) == 0
  index = megatron.read_index(tmp_path / 'a')
  tokens = np.fromfile(tmp_path / 'a.bin', index.dtype)
  assert set(tokens[index.offsets[1:] - 1]) == {0} and ':end=0' in capsys.readouterr().out
  assert build_dataset.main(argv) == 2 and 'with another tokenizer' in capsys.readouterr().err
  assert build_dataset.main([*argv, '--end_token', '<pd>']) == 2 and "did you mean '<pad>'" in capsys.readouterr().err


def test_what_the_tokenizer_loses_is_judged_over_all_files(tmp_path, monkeypatch, capsys, caplog):
  """One file in a script that the tokenizer does not know: a small part of all text is said, a large one refused."""
  inline(monkeypatch)
  name = make_sentencepiece(tmp_path / 'a.model', byte_fallback=False, vocab_size=60, hard_vocab_limit=False)
  for latin, code in ((3000, 0), (30, 2)):
    folder = tmp_path / str(latin)
    folder.mkdir()
    (folder / 'a.jsonl').write_text(json.dumps({'text': 'the dog '}) + '\n' + ('{"text": "the dog"}\n' * latin))
    (folder / 'b.jsonl').write_text(json.dumps({'text': '床前明月光' * 100}) + '\n')
    argv = ['--input', f'jsonl:{folder}', '--tokenizer', name, '--out', str(folder / 'out'), '--workers', '1']
    assert build_dataset.main(argv) == code
    said = caplog.text + capsys.readouterr().err
    assert f"500 of {8 + 7 * latin + 500:,} characters, for example in '床前明月光" in said
    assert (folder / 'out.bin').exists() == (code == 0)
  assert '--input: the tokenizer loses 69.64%' in said and 'at most 5% may be lost' in said


def test_what_is_there_twice_or_odd_is_told_and_damaged_shards_are_not_merged(tmp_path, corpus, monkeypatch, capsys, caplog):
  inline(monkeypatch)
  copied = min(corpus.iterdir())
  (tmp_path / 'again.jsonl').write_bytes(copied.read_bytes())
  (tmp_path / 'odd.jsonl').write_bytes(b'{"text": "\xff"}\nbroken\n')
  inputs = [arg for path in (copied, tmp_path / 'again.jsonl', tmp_path / 'odd.jsonl', copied) for arg in ('--input', f'jsonl:{path}')]
  real = build_dataset.merge
  monkeypatch.setattr(build_dataset, 'merge', None)
  with pytest.raises(TypeError):
    build_dataset.main([*inputs, '--out', f'{tmp_path}/a'])
  shard = next(tmp_path.glob('a.shards/*/shard.bin'))
  shard.write_bytes(bytes(shard.stat().st_size))
  monkeypatch.setattr(build_dataset, 'merge', real)
  assert build_dataset.main([*inputs, '--out', f'{tmp_path}/a']) == 0
  assert [record.getMessage() for record in caplog.records] == [f'{shard.parent} is damaged and built again: shard.bin changed']
  err = capsys.readouterr().err
  assert f'2 of 4 inputs hold what another holds, and are in the data set again: the first is {tmp_path}/again.jsonl, equal to {copied}' in err
  assert f'{tmp_path}/odd.jsonl: 1 pieces of invalid UTF-8 became U+FFFD, the first in {tmp_path}/odd.jsonl:1' in err
  assert build_dataset.main([*inputs, '--out', f'{tmp_path}/b']) == 0
  assert built(tmp_path / 'a') == built(tmp_path / 'b')


def test_many_small_files_in_another_encoding_are_refused_together(tmp_path, monkeypatch, capsys):
  inline(monkeypatch)
  (tmp_path / 'in').mkdir()
  for i in range(30):
    (tmp_path / 'in' / f'{i}.txt').write_bytes(f'{i} un peu déjà vu, mais ça va'.encode('latin-1'))
  assert build_dataset.main(['--input', f'text:{tmp_path}/in', '--out', f'{tmp_path}/a']) == 2
  assert 'error: --input: 30 inputs together: 90 of' in capsys.readouterr().err and not (tmp_path / 'a.idx').exists()
