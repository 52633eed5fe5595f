"""What one entry of `data.sources` names: text to be tokenised, or tokens as they are."""

import pathlib

from lmscale import config as config_lib
from lmscale.config import FIELD_KINDS, SOURCE_KINDS
from lmscale.data import token_cache
from lmscale.data.sources.stdlib_source import StdlibSource
from lmscale.data.sources.synthetic_source import SyntheticSource
from lmscale.data.sources.text_files import JsonlSource, TextSource
from lmscale.data.tokenizer import Tokenizer
from lmscale.errors import ConfigError


def open_store(source: config_lib.SourceConfig, tokenizer: Tokenizer, cache: pathlib.Path) -> token_cache.TokenStore:
  """The tokens of a source; text is tokenised below `cache` first. Raises ConfigError for what cannot be used."""
  if source.kind == 'megatron':
    from lmscale.data.sources import megatron_source
    return megatron_source.open_store(source.path, tokenizer, cache)
  return token_cache.tokenise(open_source(source, cache), tokenizer, cache)


def open_source(source: config_lib.SourceConfig, cache: pathlib.Path) -> token_cache.Source:
  """The documents of a source that is not in Megatron's format. Raises ConfigError: unknown kind, or a bad path."""
  if source.kind == 'stdlib':
    return StdlibSource(source.path, cache)
  if source.kind == 'text':
    return TextSource(source.path, cache)
  if source.kind == 'jsonl':
    return JsonlSource(source.path, cache, source.field)
  if source.kind == 'tfds':
    from lmscale.data.sources.tfds_source import TfdsSource  # imported where used: TFDS takes a second
    return TfdsSource(source.path, source.split, source.field, cache)
  if source.kind == 'synthetic':
    return SyntheticSource(source.path)
  raise ConfigError(f'data source kind {source.kind!r}: unknown; known: {", ".join(SOURCE_KINDS)}')


def parse(text: str, field: str = 'text', split: str = 'train') -> config_lib.SourceConfig:
  """The source that a command line names as KIND:PATH, for example `jsonl:books/*.jsonl.gz`. ConfigError if it is none."""
  kind, colon, path = text.partition(':')
  known = [name for name in SOURCE_KINDS if name != 'megatron']
  if not colon or kind not in known or not path:
    raise ConfigError(f'{text!r} is no source; write KIND:PATH with a kind of {", ".join(known)}')
  return config_lib.SourceConfig(text, kind, path, 1.0, field if kind in FIELD_KINDS else 'text',
                                 split if kind == 'tfds' else 'train')
