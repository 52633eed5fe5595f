"""How fast the loader gives batches, by kind of source, beside plain slices of a memory map.

  python tools/bench_data.py

Makes a corpus of random text in a temporary folder, stores it in every form, and prints a Markdown table: seconds of the
first start (which tokenises, or scans) and of the next, tokens per second of `Loader.batch`, and that rate over the rate of
copying windows of the same size from one memory map into the same arrays. The kinds take turns in every round; medians are
shown.
"""

import argparse
import json
import logging
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow_datasets as tfds

from lmscale import config as config_lib
from lmscale.batch import ROWS
from lmscale.data import file_digest
from lmscale.data.loader import Loader
from lmscale.data.sources import megatron, tfds_source

BYTES_VOCABULARY = 257


class Corpus(tfds.core.GeneratorBasedBuilder):
  """Token lists as a TFDS data set."""

  VERSION = tfds.core.Version('1.0.0')
  url_infos = {}  # noqa: RUF012 - nothing is downloaded

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict({'tokens': tfds.features.Tensor(shape=(None,), dtype=np.int32)})
    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for i, text in enumerate(self.texts):
      yield i, {'tokens': np.frombuffer(text, np.uint8).astype(np.int32)}


def make_sources(folder: pathlib.Path, texts: Sequence[bytes]) -> list[config_lib.SourceConfig]:
  """The same documents in every form."""
  (folder / 'text').mkdir()
  with (folder / 'a.jsonl').open('w') as lines, megatron.Writer(folder / 'a', '<u2') as writer:
    for i, text in enumerate(texts):
      (folder / 'text' / f'{i:07}.txt').write_bytes(text)
      lines.write(json.dumps({'text': text.decode()}) + '\n')
      writer.add(np.append(np.frombuffer(text, np.uint8).astype(np.uint16), np.uint16(256)))
  Corpus.texts = texts
  with tfds_source.quiet():
    Corpus(data_dir=folder / 'tfds', file_format='array_record').download_and_prepare()
  return [config_lib.SourceConfig('text', 'text', str(folder / 'text')),
          config_lib.SourceConfig('jsonl', 'jsonl', str(folder / 'a.jsonl')),
          config_lib.SourceConfig('megatron', 'megatron', str(folder / 'a')),
          config_lib.SourceConfig('tfds', 'tfds', str(folder / 'tfds'), field='tokens')]


def open_loader(source: config_lib.SourceConfig, seq_len: int, cache: pathlib.Path) -> Loader:
  """The training samples of one source."""
  train = config_lib.TrainConfig(seq_len=seq_len)
  return Loader(config_lib.Config(train=train, data=config_lib.DataConfig(sources=(source,), cache=str(cache))))


def plain(tokens: np.ndarray, seq_len: int, rows: int) -> Callable[[int], None]:
  """Copies windows at random places into the arrays of a batch: what no loader can beat."""
  out = {key: np.empty((rows, seq_len), np.int32) for key in ROWS}
  starts = np.random.default_rng(0).integers(0, len(tokens) - seq_len, 1 << 16)

  def batch(first: int) -> None:
    for i in range(rows):
      at = starts[(first + i) % len(starts)]
      out['tokens'][i] = tokens[at:at + seq_len]
      out['labels'][i] = tokens[at + 1:at + seq_len + 1]

  return batch


def measure(folder: pathlib.Path, mib: int, length: int, seq_len: int, rows: int, rounds: int, batches: int) -> list[tuple]:
  """(kind, seconds of the first start, of the next, tokens per second, share of the plain rate) of each kind."""
  rng = np.random.default_rng(0)
  lengths = rng.geometric(1 / length, (mib << 20) // length) + 1
  letters = rng.integers(97, 123, int(lengths.sum()), np.uint8).tobytes()
  ends = np.cumsum(lengths)
  sources = make_sources(folder, [letters[end - size:end] for end, size in zip(ends, lengths, strict=True)])
  time.sleep(file_digest.SETTLED + 0.5)  # a file that changed a moment ago is hashed at every start
  starts, work = [], {}
  for source in sources:
    taken = []
    for _ in range(2):
      began = time.perf_counter()
      loader = open_loader(source, seq_len, folder / 'cache')
      taken.append(time.perf_counter() - began)
    starts.append(taken)
    work[source.kind] = lambda first, loader=loader: loader.batch(first, range(rows))
  work['plain memory map'] = plain(np.memmap(folder / 'a.bin', '<u2', 'r'), seq_len, rows)
  rates = {kind: [] for kind in work}
  for turn in range(rounds + 1):
    for kind, batch in work.items():
      began = time.perf_counter()
      for i in range(batches):
        batch((turn * batches + i) * rows)
      if turn:  # the first shuffles the epoch
        rates[kind].append(batches * rows * seq_len / (time.perf_counter() - began))
  best = statistics.median(rates['plain memory map'])
  found = [(kind, *taken, statistics.median(rates[kind])) for kind, taken in zip(work, [*starts, (None, None)], strict=True)]
  return [(*entry, entry[-1] / best) for entry in found]


def main(argv: Sequence[str] | None = None) -> int:
  """Prints the table."""
  parser = argparse.ArgumentParser('bench_data.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  for name, value, text in (('mib', 64, 'size of the corpus'), ('length', 2000, 'mean bytes of a document'),
                            ('seq_len', 2048, 'tokens of a sample'), ('rows', 32, 'samples of a batch'),
                            ('rounds', 7, 'turns of each kind'), ('batches', 20, 'batches in a turn')):
    parser.add_argument(f'--{name}', type=int, default=value, help=f'{text} (default: %(default)s)')
  flags = parser.parse_args(argv)
  logging.disable()
  with tempfile.TemporaryDirectory() as folder:
    found = measure(pathlib.Path(folder), **vars(flags))
  print(f'{flags.mib} MiB, documents of {flags.length} bytes on average, samples of {flags.seq_len} tokens, '
        f'{flags.rows} in a batch; {os.cpu_count()} cores\n')
  print('| source | first start, s | next start, s | million tokens/s | of the plain rate |\n| --- | --- | --- | --- | --- |')
  for kind, first, again, rate, share in found:
    shown = ('-', '-') if first is None else (f'{first:.1f}', f'{again:.2f}')
    print(f'| {kind} | {shown[0]} | {shown[1]} | {rate / 1e6:.0f} | {share:.2f} |')
  return 0


if __name__ == '__main__':
  sys.exit(main())
