"""Trains a tokenizer on any text that lmscale reads.

  python tools/train_tokenizer.py --input jsonl:books/*.jsonl.gz --input text:notes/ --vocab 32768 --out tokenizer.json

The ending of --out chooses the kind: .json is a byte-level BPE with GPT-2's pattern of words (Hugging Face tokenizers), .model
a SentencePiece BPE with byte fallback and no normalisation. Both keep every text. The same input gives the same file, byte
for byte. The file is there only when it is complete, and an existing one is never replaced.
"""

import argparse
import io
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence

import tqdm

from lmscale import config as config_lib
from lmscale.cache_root import cache_root
from lmscale.data.optional_packages import need
from lmscale.data.reading_notes import Notes
from lmscale.data.sources import opening
from lmscale.data.tokenizer_files import open_tokenizer
from lmscale.errors import ConfigError

END = '<|endoftext|>'
SMALLEST = 300  # 256 bytes, special tokens and something to learn
LINE = 4096  # bytes of a line that SentencePiece takes; longer ones are cut


def texts(sources: Sequence[config_lib.SourceConfig], cache: pathlib.Path, limit: int) -> Iterator[str]:
  """The documents of the sources in order, up to `limit` bytes of text."""
  left = limit
  with tqdm.tqdm(unit='B', unit_scale=True, desc='reading', disable=None) as bar:
    for source in sources:
      opened, notes = opening.open_source(source, cache), Notes()
      for document in opened.documents(notes):
        if document.ids is not None:
          raise ConfigError(f'{source.name}: holds tokens, not text')
        if len(document.text) > left:
          print(f'only the first {limit:,} bytes are used (--max_bytes)', file=sys.stderr)
          return
        left -= len(document.text)
        bar.update(len(document.text))
        yield document.text.decode('utf-8', 'replace')
      for line in (*getattr(opened, 'notices', ()), *notes.lines()):
        print(f'{source.name}: {line}', file=sys.stderr)


def train_bpe(found: Iterator[str], vocab: int) -> bytes:
  """A tokenizer.json."""
  library = need('tokenizers', '--out')
  from tokenizers import decoders, models, pre_tokenizers, trainers
  tokenizer = library.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[END], show_progress=False,
                                initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
  tokenizer.train_from_iterator(found, trainer)
  return tokenizer.to_str(pretty=True).encode()


def train_sentencepiece(found: Iterator[str], vocab: int) -> bytes:
  """A .model."""
  library = need('sentencepiece', '--out')
  out = io.BytesIO()
  lines = (line[at:at + LINE // 4] for text in found for line in text.split('\n') for at in range(0, len(line), LINE // 4))
  try:
    library.SentencePieceTrainer.train(
      sentence_iterator=lines, model_writer=out, model_type='bpe', vocab_size=vocab, byte_fallback=True,
      normalization_rule_name='identity', remove_extra_whitespaces=False, add_dummy_prefix=False, num_threads=1,
      max_sentence_length=LINE, input_sentence_size=0, hard_vocab_limit=False, minloglevel=2,
    )
  except RuntimeError as error:
    raise ConfigError(f'--vocab {vocab}: {" ".join(str(error).split())[-300:]}') from error
  return out.getvalue()


def write_new(path: pathlib.Path, content: bytes) -> None:
  """Makes the file with all its content, or nothing. Raises ConfigError if it exists or cannot be written."""
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  try:
    with temporary.open('wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.link(temporary, path)  # unlike a rename, this fails where the file exists
  except OSError as error:
    raise ConfigError(f'--out: cannot write {path}: {error.strerror}') from error
  finally:
    temporary.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, or 2 for a mistake of the user's."""
  parser = argparse.ArgumentParser('train_tokenizer.py', description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--input', action='append', required=True, metavar='KIND:PATH', help='text to learn from; repeat')
  parser.add_argument('--field', default='text', help='of jsonl and tfds')
  parser.add_argument('--split', default='train', help='of tfds')
  parser.add_argument('--vocab', type=int, default=32768, help='number of ids (default: %(default)s)')
  parser.add_argument('--out', type=pathlib.Path, required=True, help='tokenizer.json, or a .model')
  parser.add_argument('--max_bytes', type=int, default=1 << 30, help='text used (default: 1 GiB)')
  flags = parser.parse_args(argv)
  try:
    trainers = {'.json': train_bpe, '.model': train_sentencepiece}
    if flags.out.suffix not in trainers:
      raise ConfigError(f'--out: {flags.out} must end with .json or .model')
    if flags.vocab < SMALLEST:
      raise ConfigError(f'--vocab: {flags.vocab} is less than {SMALLEST}: the 256 bytes are always in it')
    if flags.out.exists():
      raise ConfigError(f'--out: {flags.out} exists; data made with it would no longer fit, give another name')
    if not flags.out.absolute().parent.is_dir():
      raise ConfigError(f'--out: the folder of {flags.out} does not exist')
    sources = [opening.parse(text, flags.field, flags.split) for text in flags.input]
    found = texts(sources, cache_root(), flags.max_bytes)
    write_new(flags.out, trainers[flags.out.suffix](found, flags.vocab))
    made = open_tokenizer(str(flags.out))
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  print(f'{flags.out}: {made.size} ids, a document ends with {made.end}, identity {made.identity}')
  print(f'to use it: --config.data.tokenizer={flags.out} --config.model.vocab={made.size} or more')
  return 0


if __name__ == '__main__':
  sys.exit(main())
