"""The tokenizer's files beside a model: copied along, made where there are none, and looked at before they are believed.

They are data: `data.tokenizer` opens a tokenizer.json or a tokenizer.model, the others are only carried.
"""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

from lmscale.config import Config
from lmscale.data.tokenizer import ByteTokenizer, Tokenizer, get_tokenizer
from lmscale.errors import ConfigError
from lmscale.interop.folder import inside

READABLE = ('tokenizer.json', 'tokenizer.model')  # the first that is there is opened
CARRIED = (
  *READABLE, 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json', 'vocab.json', 'merges.txt',
  'chat_template.jinja', 'generation_config.json',
)  # fmt: skip
LARGEST = 1 << 28  # bytes of each
END = '<|endoftext|>'
WITHOUT = '--no_tokenizer leaves the tokenizer out'


@dataclasses.dataclass(frozen=True)
class Found:
  """Files of a folder to be carried, and what `data.tokenizer` is to be: a name of one of them, `bytes`, or empty."""

  folder: pathlib.Path
  files: tuple[str, ...]
  name: str = ''
  tokenizer: Tokenizer | None = None


def find(folder: pathlib.Path, vocab: int, end_token: str = '') -> Found:
  """The tokenizer's files in `folder`, opened.

  Raises:
    ConfigError: one is damaged, too large or a link out of the folder, or has more ids than the embedding has rows.
  """
  files = tuple(name for name in CARRIED if inside(folder, name).is_file())
  for name in files:
    if (size := (folder / name).stat().st_size) > LARGEST:
      raise ConfigError(f'{folder / name}: {size} bytes; at most {LARGEST} are read')
  name = next((name for name in READABLE if name in files), '')
  if not name:
    return Found(folder, files)
  if name == 'tokenizer.json' and _is_bytes(folder / name):
    return Found(folder, files, 'bytes', ByteTokenizer())
  try:
    tokenizer = get_tokenizer(str(folder / name), end_token)
  except ConfigError as error:
    raise ConfigError(f'{error}; {WITHOUT}') from error
  if tokenizer.size > vocab:
    raise ConfigError(f'{folder / name}: {tokenizer.size} ids, but vocab_size is {vocab}; {WITHOUT}')
  return Found(folder, files, name, tokenizer)


def find_file(path: pathlib.Path, vocab: int, end_token: str = '') -> Found:
  """A tokenizer in a file of any name that ends with .json or .model, opened. Raises ConfigError as `find`."""
  tokenizer = get_tokenizer(str(path), end_token)
  if tokenizer.size > vocab:
    raise ConfigError(f'{path}: {tokenizer.size} ids, but the embedding has {vocab} rows')
  return Found(path.parent, (path.name,), path.name, tokenizer)


def carry(found: Found, target: pathlib.Path) -> None:
  """Copies the files into the folder `target`, which is made if there are any."""
  if found.files:
    target.mkdir(exist_ok=True)
  for name in found.files:
    shutil.copyfile(found.folder / name, target / name)


def open_for(config: Config, identity: str | None) -> Tokenizer:
  """The tokenizer of a model's config. Raises ConfigError where it cannot be opened or is not the one of `identity`."""
  try:
    tokenizer = get_tokenizer(config.data.tokenizer, config.data.end_token)
  except ConfigError as error:
    raise ConfigError(f'{error}; {WITHOUT}') from error
  if identity is not None and tokenizer.identity != identity:
    raise ConfigError(
      f'data.tokenizer: {config.data.tokenizer} ({tokenizer.identity}) is not the tokenizer the model was trained with ({identity}); '
      f'put that one there; {WITHOUT}'
    )
  return tokenizer


def write(config: Config, tokenizer: Tokenizer, target: pathlib.Path) -> None:
  """Writes a run's tokenizer into `target` as transformers' AutoTokenizer reads one (a SentencePiece .model is only copied)."""
  name = config.data.tokenizer
  if name.endswith('.model'):
    shutil.copyfile(pathlib.Path(name).expanduser(), target / 'tokenizer.model')
    return
  if name == 'bytes':
    (target / 'tokenizer.json').write_text(_byte_json(), encoding='utf-8')
    end = END
  else:
    shutil.copyfile(pathlib.Path(name).expanduser(), target / 'tokenizer.json')
    end = _token(target / 'tokenizer.json', tokenizer.end)
  about = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': end, 'clean_up_tokenization_spaces': False}
  (target / 'tokenizer_config.json').write_text(json.dumps(about, indent=2) + '\n', encoding='utf-8')


def _token(path: pathlib.Path, index: int) -> str:
  """What a tokenizer.json calls the id `index`."""
  content = json.loads(path.read_text(encoding='utf-8'))
  added = {token['id']: token['content'] for token in content.get('added_tokens') or ()}
  return added.get(index) or next(name for name, i in content['model']['vocab'].items() if i == index)


def _is_bytes(path: pathlib.Path) -> bool:
  """Whether this is the file that `write` makes for `bytes`: its ids are those of the byte tokenizer."""
  try:
    return _essence(json.loads(path.read_text(encoding='utf-8'))) == _essence(json.loads(_byte_json()))
  except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
    return False


def _essence(content: dict[str, Any]) -> list[Any]:
  """What the ids of a text depend on; a library that saves the file again adds other things."""
  model = content['model']
  return [content[part] for part in ('added_tokens', 'normalizer', 'pre_tokenizer', 'decoder')] + [
    model[part] for part in ('type', 'vocab', 'merges', 'dropout', 'unk_token')
  ]


def _byte_json() -> str:
  """A tokenizer.json whose ids are the bytes of UTF-8, and 256 for the end of a document.

  Its library writes each byte as one printable character: those that are printable in Latin-1 as themselves, the others, in order,
  as the characters from 256 on.
  """
  printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  others = iter(range(0x100, 0x200))
  vocab = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
  flags = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False, 'special': True}
  level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': False, 'use_regex': False}
  content = {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': [{'id': ByteTokenizer.end, 'content': END, **flags}],
    'normalizer': None,
    'pre_tokenizer': level,
    'post_processor': None,
    'decoder': level,
    'model': {'type': 'BPE', 'dropout': None, 'unk_token': None, 'vocab': vocab, 'merges': []},
  }
  return json.dumps(content, indent=1, ensure_ascii=False) + '\n'
