"""Where the pictures of `compare_runs.py` are written, and how: whole or not at all."""

import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

from lmscale.errors import ConfigError


def outputs(out: pathlib.Path, more: str = '') -> list[pathlib.Path]:
  """The files that --out names, with `more` at the end of their names. Raises ConfigError where they cannot be written there."""
  ends = [out.suffix] if out.suffix in ('.svg', '.png') else ['.svg', '.png']
  name = out.name.removesuffix(out.suffix) if out.suffix in ends and len(ends) == 1 else out.name
  paths = [out.with_name(name + more + end) for end in ends]
  if not out.parent.is_dir():
    raise ConfigError(f'--out: no folder {out.parent}')
  if folders := [path for path in paths if path.is_dir()]:
    raise ConfigError(f'--out: {folders[0]} is a folder')
  return paths


def save(figure: Any, paths: Sequence[pathlib.Path]) -> None:
  """Writes a figure in the formats of the names."""
  for path in paths:
    temporary = path.with_name(f'.{path.name}.tmp')
    kind = path.suffix[1:]
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # a name may have characters that the font has not
      figure.savefig(temporary, format=kind, dpi=150, metadata={'Date': None} if kind == 'svg' else None)
    temporary.replace(path)
