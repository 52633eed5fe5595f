"""What counting a tokenizer's losses costs, as a share of the time that tokenising takes.

  python tools/bench_losses.py --tokenizer data/tokenizer.json --input stdlib:prose

CPU time of this process and its threads; both parts take turns on the same batches of documents, as in a run's start.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from lmscale.cache_root import cache_root
from lmscale.data import losses, token_cache
from lmscale.data.reading_notes import Notes
from lmscale.data.sources import opening
from lmscale.data.tokenizer import get_tokenizer
from lmscale.errors import ConfigError


def measure(tokenizer_name: str, source: str, limit: int) -> tuple[float, float, losses.Losses]:
  """(CPU seconds of tokenising the first `limit` bytes of `source`, of the check, what it counted)."""
  tokenizer = get_tokenizer(tokenizer_name)
  found = losses.Losses(tokenizer)
  tokenising, checking, size = 0.0, 0.0, 0
  opened = opening.open_source(opening.parse(source), cache_root())
  for batch in token_cache.batches(opened.documents(Notes())):
    texts = [document.text for document in batch]
    start = time.process_time()
    ids = tokenizer.encode_batch(texts)
    middle = time.process_time()
    token_cache.check(texts, ids, found)
    tokenising, checking = tokenising + middle - start, checking + time.process_time() - middle
    if (size := size + sum(map(len, texts))) >= limit:
      break
  return tokenising, checking, found


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, or 2 for a mistake of the user's."""
  parser = argparse.ArgumentParser('bench_losses.py', description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--tokenizer', action='append', required=True, help='as data.tokenizer; repeat')
  parser.add_argument('--input', default='stdlib:prose', metavar='KIND:PATH', help='text (default: %(default)s)')
  parser.add_argument('--max_bytes', type=int, default=1 << 23, help='text used (default: 8 MiB)')
  flags = parser.parse_args(argv)
  try:
    for name in flags.tokenizer:
      tokenising, checking, found = measure(name, flags.input, flags.max_bytes)
      print(f'{name}: tokenising {tokenising:.2f} s, check {checking:.3f} s, ratio {checking / tokenising:.3f}; '
            f'{found.lost:,} of {found.characters:,} characters lost')
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())
