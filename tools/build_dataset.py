"""Tokenises text once into a Megatron indexed data set, in parallel over files.

  python tools/build_dataset.py --input jsonl:books/*.jsonl.gz --tokenizer tokenizer.json --out data/books --workers 8

Writes data/books.bin and data/books.idx as Megatron-LM reads them, one sequence per document, each closed by the
end-of-document id, and beside them data/books.meta.json (tokenizer, input, hashes) and data/books.documents.npy (which side of
the validation split a document is on, its bytes of text). Train on it with kind 'megatron' and the path data/books.

Each input file becomes a finished shard below data/books.shards/ first. The command may be killed at any moment and given
again: finished shards are not made again, and the result is the same, byte for byte.
"""

import argparse
import concurrent.futures
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import tqdm

from lmscale import config as config_lib
from lmscale.cache_root import cache_root
from lmscale.data import atomic_folder, losses, token_cache
from lmscale.data.reading_notes import Notes
from lmscale.data.sources import encoding, megatron, opening
from lmscale.data.sources.find_files import find_files
from lmscale.data.tokenizer import get_tokenizer
from lmscale.errors import ConfigError
from lmscale.exit_codes import KILLED, USER_ERROR

FORMAT = 1  # raise when the same input would give other files
COPIED = 1 << 24  # bytes at a time
ENDINGS = ('.bin', '.documents.npy', '.meta.json', '.idx')  # in the order in which they appear: .idx says it is complete
SHARD = ('shard.bin', 'shard.idx', 'documents.npy')


def units(inputs: Sequence[config_lib.SourceConfig]) -> list[tuple[config_lib.SourceConfig, int]]:
  """What one process does at a time, with its bytes: a file of text or JSONL, or a whole data set of another kind."""
  found = []
  for source in inputs:
    if source.kind not in ('text', 'jsonl'):
      found.append((source, 0))
      continue
    paths, notices = find_files(source.path, {'text': '.txt', 'jsonl': '.jsonl'}[source.kind])
    for notice in notices:
      print(f'{source.name}: {notice}', file=sys.stderr)
    for path in paths:
      found.append((dataclasses.replace(source, name=str(path), path=str(path)), path.stat().st_size))
  return found


def shard_key(source: config_lib.SourceConfig, tokenizer_name: str, end: str = '') -> str:
  """Names a unit's content and the tokenizer. Runs in a worker process."""
  opened, tokenizer = opening.open_source(source, cache_root()), get_tokenizer(tokenizer_name, end)
  return hashlib.sha256(f'{type(opened).__name__} {opened.digest()} {tokenizer.identity} {FORMAT}'.encode()).hexdigest()[:32]


def build_shard(source: config_lib.SourceConfig, key: str, tokenizer_name: str, shards: pathlib.Path,
                end: str = '') -> dict[str, Any]:
  """Tokenises one unit into the folder `key` of `shards` unless it is there; returns what it holds. In a worker process.

  Raises:
    ConfigError: the text cannot be used, or it is no longer what `key` names.
  """
  opened, tokenizer = opening.open_source(source, cache_root()), get_tokenizer(tokenizer_name, end)

  def build(folder: pathlib.Path) -> None:
    kept, notes, lost = [], Notes(), losses.Losses(tokenizer)
    with megatron.Writer(folder / 'shard', megatron.dtype_for(tokenizer.size)) as writer:
      for ids, split_key, size in token_cache.tokenised(opened.documents(notes), tokenizer, lost):
        writer.add(ids)
        kept.append((split_key, size % 2**64))
    np.save(folder / 'documents.npy', np.array(kept, np.uint64).reshape(-1, 2).T, allow_pickle=False)
    if shard_key(source, tokenizer_name, end) != key:
      raise ConfigError(f'{source.name}: changed while it was read; give the command again')
    meta = {'key': key, 'documents': len(kept), 'tokens': sum(writer.lengths), 'skipped': len(notes.skipped),
            'notices': notes.lines(), 'losses': lost.counts(), 'read': (notes.size, notes.bad),
            'sha256': {name: _sha256(folder / name) for name in SHARD}}
    (folder / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')

  def read(folder: pathlib.Path) -> dict[str, Any]:
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    for name in SHARD:
      if _sha256(folder / name) != meta['sha256'][name]:
        raise ValueError(f'{name} changed')
    return meta

  return atomic_folder.ensure(shards / key, build, read)


def merge(out: pathlib.Path, shards: pathlib.Path, made: Sequence[dict[str, Any]], tokenizer_name: str,
          end: str = '') -> None:
  """Puts the shards together under temporary names, then renames them; a killed merge is done again from the start."""
  tokenizer = get_tokenizer(tokenizer_name, end)
  dtype = megatron.dtype_for(tokenizer.size)
  temporary = shards / 'merged'
  total = hashlib.sha256()
  with megatron.with_ending(temporary, '.bin').open('wb') as file:
    for shard in made:
      with (shards / shard['key'] / 'shard.bin').open('rb') as part:
        while block := part.read(COPIED):
          file.write(block)
          total.update(block)
    _sync(file)
  lengths = [megatron.read_index(shards / shard['key'] / 'shard').lengths for shard in made]
  documents = [np.load(shards / shard['key'] / 'documents.npy', allow_pickle=False) for shard in made]
  megatron.write_index(temporary, dtype, np.concatenate(lengths))
  documents = np.concatenate(documents, axis=1)
  with megatron.with_ending(temporary, '.documents.npy').open('wb') as file:
    np.save(file, documents, allow_pickle=False)
    _sync(file)
  hashes = {name: _sha256(megatron.with_ending(temporary, ending))
            for name, ending in (('idx', '.idx'), ('documents', '.documents.npy'))}
  meta = {'format': FORMAT, 'tokenizer': tokenizer.identity, 'sha256': {'bin': total.hexdigest(), **hashes},
          'documents': documents.shape[1], 'tokens': sum(shard['tokens'] for shard in made), 'inputs': _described(made)}
  with megatron.with_ending(temporary, '.meta.json').open('w', encoding='utf-8') as file:
    json.dump(meta, file, indent=1)
    _sync(file)
  for ending in ENDINGS:
    os.replace(megatron.with_ending(temporary, ending), megatron.with_ending(out, ending))


def _described(made: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  return [{name: shard[name] for name in ('name', 'key', 'documents', 'tokens', 'skipped')} for shard in made]


def is_complete(out: pathlib.Path, keys: Sequence[str]) -> bool:
  """Whether `out` is the result for these shards. Raises ConfigError if it is another data set."""
  present = [ending for ending in ENDINGS if megatron.with_ending(out, ending).exists()]
  if '.meta.json' not in present:
    return False
  try:
    meta = json.loads(megatron.with_ending(out, '.meta.json').read_text(encoding='utf-8'))
    same = [entry['key'] for entry in meta['inputs']] == list(keys)
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise ConfigError(f'--out: {out}.meta.json is damaged; delete {out}.* or give another --out') from error
  if not same:
    raise ConfigError(f'--out: {out} was built from other input or with another tokenizer; delete {out}.* or give another '
                      '--out')
  return len(present) == len(ENDINGS)


def build(inputs: Sequence[config_lib.SourceConfig], tokenizer_name: str, out: pathlib.Path, workers: int,
          end: str = '') -> None:
  """Builds the data set `out`, going on where an earlier call was killed. Raises ConfigError for a mistake of the user's."""
  get_tokenizer(tokenizer_name, end)
  todo, shards = units(inputs), megatron.with_ending(out, '.shards')
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(min(workers, len(todo)), context, _start_worker, (os.getpid(),)) as pool:
    keys = _each(pool, 'hashing', [(size, shard_key, source, tokenizer_name, end) for source, size in todo])
    if is_complete(out, keys):
      shutil.rmtree(shards, ignore_errors=True)
      return
    taken = [path for ending in ENDINGS if (path := megatron.with_ending(out, ending)).exists()]
    if taken and not shards.exists():
      raise ConfigError(f'--out: {taken[0]} exists and was not made by this tool; give another --out')
    try:
      shards.mkdir(parents=True, exist_ok=True)
      with (shards / 'lock').open('w') as lock:
        try:
          fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
          raise ConfigError(f'--out: another process is building {out}') from error
        work = [(size, build_shard, source, key, tokenizer_name, shards, end)
                for key, (source, size) in zip(keys, todo, strict=True)]
        made = [{'name': source.name, **shard}
                for (source, _), shard in zip(todo, _each(pool, 'tokenising', work), strict=True)]
        if not sum(shard['documents'] for shard in made):
          raise ConfigError('--input: no document in it')
        try:
          encoding.judge(*(sum(shard['read'][i] for shard in made) for i in range(2)), f'{len(made)} inputs together')
          losses.report(*losses.total(shard['losses'] for shard in made))
        except ConfigError as error:
          raise ConfigError(f'--input: {error}') from error
        merge(out, shards, made, tokenizer_name, end)
    except OSError as error:
      raise ConfigError(f'--out: cannot write {out}: {error.strerror}') from error
  shutil.rmtree(shards)
  _tell_equal(keys, [source.name for source, _ in todo])
  for shard in made:
    for notice in shard['notices']:
      print(f'{shard["name"]}: {notice}', file=sys.stderr)


def _tell_equal(keys: Sequence[str], names: Sequence[str]) -> None:
  first: dict[str, int] = {}
  again = [(name, names[first[key]]) for i, (key, name) in enumerate(zip(keys, names, strict=True)) if first.setdefault(key, i) != i]
  if again:
    print(f'{len(again)} of {len(names)} inputs hold what another holds, and are in the data set again: the first is '
          f'{again[0][0]}, equal to {again[0][1]}', file=sys.stderr)


def _each(pool: concurrent.futures.Executor, what: str, work: Sequence[tuple]) -> list[Any]:
  """The results of work, a list of (bytes, function, arguments …), in its order, with a progress bar."""
  with tqdm.tqdm(total=sum(size for size, *_ in work), unit='B', unit_scale=True, desc=what, disable=None) as bar:
    futures = {pool.submit(*call): size for size, *call in work}
    try:
      for future in concurrent.futures.as_completed(futures):
        future.result()
        bar.update(futures[future])
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise
    return [future.result() for future in futures]


def _start_worker(parent: int) -> None:
  """One thread for the tokenizer, Ctrl-C left to the parent, and no life after the parent's."""
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'
  signal.signal(signal.SIGINT, signal.SIG_IGN)

  def watch() -> None:
    while os.getppid() == parent:
      time.sleep(0.5)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _sync(file: Any) -> None:
  file.flush()
  os.fsync(file.fileno())


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, 2 for a mistake of the user's, 130 when interrupted."""
  parser = argparse.ArgumentParser('build_dataset.py', description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--input', action='append', required=True, metavar='KIND:PATH', help='text, jsonl, tfds or stdlib; repeat')
  parser.add_argument('--field', default='text', help='of jsonl and tfds')
  parser.add_argument('--split', default='train', help='of tfds')
  parser.add_argument('--tokenizer', default='bytes', help='as data.tokenizer (default: %(default)s)')
  parser.add_argument('--end_token', default='', help='as data.end_token')
  parser.add_argument('--out', type=pathlib.Path, required=True, help='prefix of the files')
  parser.add_argument('--workers', type=int, default=os.cpu_count() or 1, help='processes (default: %(default)s)')
  flags = parser.parse_args(argv)
  try:
    if flags.workers < 1:
      raise ConfigError(f'--workers: {flags.workers} is less than 1')
    inputs = [opening.parse(text, flags.field, flags.split) for text in flags.input]
    out = megatron.prefix_of(str(flags.out))
    build(inputs, flags.tokenizer, out, flags.workers, flags.end_token)
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return USER_ERROR
  except KeyboardInterrupt:
    print('interrupted; the same command goes on', file=sys.stderr)
    return KILLED
  meta = json.loads(megatron.with_ending(out, '.meta.json').read_text(encoding='utf-8'))
  print(f'{out}: {meta["tokens"]:,} tokens in {meta["documents"]:,} documents, tokenizer {meta["tokenizer"]}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
