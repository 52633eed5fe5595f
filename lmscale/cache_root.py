"""Where this package keeps what it would otherwise do again."""

import os
import pathlib


def cache_root(configured: str = '') -> pathlib.Path:
  """`configured` (data.cache) if not empty, else $LMSCALE_CACHE, else ~/.cache/lmscale."""
  return pathlib.Path(configured or os.environ.get('LMSCALE_CACHE') or '~/.cache/lmscale').expanduser().absolute()
