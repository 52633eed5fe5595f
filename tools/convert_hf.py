"""Exchanges models with Hugging Face transformers, which need not be installed.

  python tools/convert_hf.py import HF_FOLDER RUN_FOLDER     config.json and safetensors -> a folder of a run
  python tools/convert_hf.py export RUN_FOLDER HF_FOLDER     the newest checkpoint of a run -> a folder that transformers loads
  python tools/convert_hf.py megatron FOLDER RUN_FOLDER --config=configs/mamba_study.py:arch=hybrid,size=8b --torch
                                                             a checkpoint of Megatron-LM -> a folder of a run

A folder of a run can be generated from, evaluated, continued (--config.train.init_from) and exported. Llama, Nemotron, NemotronH,
Bamba, Mamba and Mamba-2, both ways; see docs/models.md. Exit codes: 0 done, 2 a mistake, in one line, with nothing written;
130 interrupted.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # nothing is computed

from lmscale.config import Config, recipes
from lmscale.errors import ConfigError
from lmscale.exit_codes import KILLED, USER_ERROR
from lmscale.interop.exporting import SHARD, export_model
from lmscale.interop.importing import DTYPES, import_model
from lmscale.interop.megatron import import_megatron
from lmscale.plan.parameters import parameter_count

UNITS = {'KB': 10**3, 'MB': 10**6, 'GB': 10**9, 'KIB': 2**10, 'MIB': 2**20, 'GIB': 2**30}


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> None:
    raise ConfigError(message)


def make_parser() -> argparse.ArgumentParser:
  parser = _Parser('convert_hf.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
  commands = parser.add_subparsers(dest='command', required=True, parser_class=_Parser, metavar='import|export|megatron')
  into = commands.add_parser('import', allow_abbrev=False, help='make a folder of a run')
  into.add_argument('source', metavar='HF_FOLDER')
  into.add_argument('target', metavar='RUN_FOLDER')
  into.add_argument('--dt_min', type=float, help='of Mamba-2, in place of what config.json says')
  into.add_argument('--end_token', default='', help='the token that ends a document, as data.end_token')
  out = commands.add_parser('export', allow_abbrev=False, help='make a folder that transformers loads')
  out.add_argument('source', metavar='RUN_FOLDER')
  out.add_argument('target', metavar='HF_FOLDER')
  out.add_argument('--shard_size', type=parse_size, default=SHARD, metavar='SIZE', help='of a file, such as 500MB; default: 5GB')
  out.add_argument('--vocab', type=int, default=0, metavar='ROWS', help='rows of the embedding to keep; default: all')
  other = commands.add_parser('megatron', allow_abbrev=False, help='make a folder of a run of a checkpoint of Megatron-LM')
  other.add_argument('source', metavar='FOLDER')
  other.add_argument('target', metavar='RUN_FOLDER')
  other.add_argument('--config', required=True, metavar='FILE[:ARG]', help='a recipe of the same model: the checkpoint does not describe itself')
  other.add_argument('--tokenizer', default='', metavar='FILE', help='its tokenizer.json or .model, to be carried along')
  other.add_argument('--torch', action='store_true', help='read .pt files, by weights-only loading; needs the extra megatron')
  for command in (into, out, other):
    command.add_argument('--dtype', default='', metavar='|'.join(DTYPES), help='of the numbers; default: as they are')
  for command in (into, out):
    command.add_argument('--no_tokenizer', action='store_true', help='leave the tokenizer out')
  return parser


def parse_size(text: str) -> int:
  """Bytes: a number, with a unit such as MB or GiB or without."""
  unit = next((unit for unit in UNITS if text.upper().endswith(unit)), '')
  number = text[: len(text) - len(unit)]
  if not number.isascii() or not number.isdigit() or not int(number):
    raise argparse.ArgumentTypeError(f'{text!r} is no size; write 500MB or 5GB')
  return int(number) * UNITS.get(unit, 1)


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code."""
  logging.getLogger('absl').setLevel(logging.CRITICAL)
  try:
    flags = make_parser().parse_args(argv)
    notes = {'import': run_import, 'export': run_export, 'megatron': run_megatron}[flags.command](flags)
  except ConfigError as error:
    text = '; '.join(line.strip() for line in str(error).splitlines())
    print(f'error: {"".join(c if c.isprintable() else "?" for c in text)}', file=sys.stderr)
    return USER_ERROR
  except KeyboardInterrupt:
    print('interrupted; nothing was written', file=sys.stderr)
    return KILLED
  first, *others = notes
  print('\n'.join([first, *(f'note: {note}' for note in others)]))
  return 0


def run_import(flags: argparse.Namespace) -> list[str]:
  """Imports; returns lines for people."""
  config, notes = import_model(flags.source, flags.target, flags.dtype, flags.dt_min, not flags.no_tokenizer, flags.end_token)
  return [_made(flags.target, config), *notes]


def run_megatron(flags: argparse.Namespace) -> list[str]:
  """Imports from Megatron-LM; returns lines for people."""
  recipe = recipes.load(flags.config)
  config, notes = import_megatron(flags.source, flags.target, recipe, flags.torch, flags.dtype, flags.tokenizer)
  return [_made(flags.target, config), *notes]


def _made(target: str, config: Config) -> str:
  return f'{target}: {len(config.model.layers)} layers, {parameter_count(config.model):,} parameters, tokenizer {config.data.tokenizer}'


def run_export(flags: argparse.Namespace) -> list[str]:
  """Exports; returns lines for people."""
  values, notes = export_model(flags.source, flags.target, flags.dtype, flags.shard_size, flags.vocab, not flags.no_tokenizer)
  return [f'{flags.target}: {values["architectures"][0]}, vocabulary {values["vocab_size"]:,}', *notes]


if __name__ == '__main__':
  sys.exit(main())
