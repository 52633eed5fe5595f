"""The job generate: prompts from the command line or a file, continued by a trained model."""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from lmscale.config import Config, MeshConfig, check_tensor, fill_data
from lmscale.data.tokenizer import IdsAlone, Tokenizer, fitting_tokenizer
from lmscale.errors import ConfigError
from lmscale.exit_codes import DONE
from lmscale.generate.engine import Engine
from lmscale.generate.generator import Generator, check_prompts
from lmscale.generate.text import Piece, continue_texts, encode_prompt
from lmscale.generate.weights import generation_setup
from lmscale.jobs.devices import count_devices
from lmscale.train.console import printable, say
from lmscale.train.model_folder import ModelFolder, open_model
from lmscale.train.workdir import write_atomic


class Prompt(NamedTuple):
  """given: as in the file, a text or a list of ids. ids: what the model reads. shown: on the terminal."""

  given: Any
  ids: list[int]
  shown: str


def run(config: Config, flags: argparse.Namespace) -> int:
  """Continues the prompts of `flags` with the model in flags.workdir. Everything that can be wrong is looked at before arrays are read."""
  config = on_all_devices(config)
  folder = open_model(flags.workdir)
  tokenizer = find_tokenizer(config, folder)
  prompts, out = find_prompts(flags, tokenizer), check_out(flags)
  check_prompts(config.model, [prompt.ids for prompt in prompts], config.generate)
  check_tokenizer(folder, tokenizer, config)
  setup = generation_setup(config)
  generator = Generator(Engine(setup, folder.params(setup, setup.dtype)), tokenizer.size)
  for note in folder.notes:
    say(note, file=sys.stderr)
  say(f'{folder.path} at step {folder.step}', file=sys.stderr)
  watch = Stopwatch()
  pieces = watch.through(continue_texts(generator, tokenizer, [prompt.ids for prompt in prompts], config.generate, config.seed))
  if out:
    write_atomic(out, ''.join(json.dumps(line) + '\n' for line in lines(prompts, pieces)))
  else:
    stream(prompts, pieces)
  say(watch.describe(len(prompts)) + (f', in {out}' if out else ''), file=sys.stderr)
  return DONE


def on_all_devices(config: Config) -> Config:
  """The config with a mesh over all devices: mesh.tensor stays, as the model was cut in training; `pipe` and `data` were training's."""
  alone = dataclasses.replace(config, mesh=MeshConfig(pipe=1, tensor=config.mesh.tensor))
  alone = fill_data(alone, count_devices(config))
  check_tensor(alone)
  return alone


def find_tokenizer(config: Config, folder: ModelFolder) -> Tokenizer:
  """The config's; of an imported model that came without one, and for which none is named, ids alone."""
  if folder.about and folder.tokenizer is None and config.data.tokenizer == 'bytes':
    return IdsAlone(config.model.vocab)
  return fitting_tokenizer(config)


def check_tokenizer(folder: ModelFolder, tokenizer: Tokenizer, config: Config) -> None:
  """Raises ConfigError where the model was trained on the ids of another tokenizer."""
  if folder.tokenizer is not None and folder.tokenizer != tokenizer.identity:
    raise ConfigError(
      f'data.tokenizer: {config.data.tokenizer} is {tokenizer.identity}, but {folder.path} was trained with {folder.tokenizer}; '
      'give that tokenizer: its ids are what the model knows'
    )


def find_prompts(flags: argparse.Namespace, tokenizer: Tokenizer) -> list[Prompt]:
  """The prompts that the flags name. Raises ConfigError where there are none, or a line of the file is bad."""
  if (flags.prompt is None) == (flags.prompts is None):
    raise ConfigError('--prompt: give one of --prompt=TEXT and --prompts=FILE')
  if flags.prompt is not None:
    return [Prompt(flags.prompt, encode_prompt(tokenizer, flags.prompt), flags.prompt)]
  path = pathlib.Path(flags.prompts).expanduser()
  try:
    content = path.read_bytes()
  except OSError as error:
    raise ConfigError(f'--prompts: {path}: {error.strerror}') from error
  prompts = []
  for number, line in enumerate(content.splitlines(), 1):
    try:
      prompts.append(read_prompt(line, tokenizer))
    except ValueError as error:
      raise ConfigError(f'{path}:{number}: {error}') from error
  if not prompts:
    raise ConfigError(f'--prompts: {path} has no lines')
  return prompts


def read_prompt(line: bytes, tokenizer: Tokenizer) -> Prompt:
  """A line of a file of prompts. Raises ValueError, with what is wrong, for any other."""
  try:
    pairs = json.loads(line.decode('utf-8-sig'), object_pairs_hook=list)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'broken JSON ({" ".join(str(error).split())[:100]})') from error
  names = [pair[0] for pair in pairs if isinstance(pair, tuple)] if isinstance(pairs, list) else []
  if len([name for name in names if name in ('text', 'ids')]) != 1:
    raise ValueError('expected an object with one of "text" and "ids"')
  values = dict(pairs)
  if isinstance(values.get('text'), str):
    return Prompt(values['text'], encode_prompt(tokenizer, values['text']), values['text'])
  ids = values.get('ids')
  if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < tokenizer.size for i in ids):
    raise ValueError(f'"text" must be a string, "ids" a list of integers from 0 to {tokenizer.size - 1}')
  return Prompt(ids, ids or [tokenizer.end], tokenizer.decode(ids))


def check_out(flags: argparse.Namespace) -> pathlib.Path | None:
  """The file to write, None for the terminal. Raises ConfigError where it cannot be written."""
  if not flags.out:
    return None
  path = pathlib.Path(flags.out).expanduser().absolute()
  if path.is_dir() or not path.parent.is_dir():
    raise ConfigError(f'--out: {path} is a folder' if path.is_dir() else f'--out: there is no folder {path.parent}')
  if flags.prompts and path.exists() and path.samefile(pathlib.Path(flags.prompts).expanduser()):
    raise ConfigError(f'--out: {path} is the file of prompts; give another')
  return path


def lines(prompts: list[Prompt], pieces: Iterable[Piece]) -> list[dict[str, Any]]:
  """What --out holds: a line per prompt, in their order."""
  found = [{'prompt': prompt.given, 'ids': [], 'text': '', 'finish': ''} for prompt in prompts]
  for piece in pieces:
    line = found[piece.prompt]
    line['ids'] += piece.ids
    line['text'] += piece.text
    line['finish'] = piece.finish
  return found


def stream(prompts: list[Prompt], pieces: Iterable[Piece]) -> None:
  """Prints each prompt and what follows it as that is made; of several, which are made together, one after the other."""
  held: list[list[str]] = [[] for _ in prompts]
  finished = [False] * len(prompts)
  at = 0
  _begin(prompts, at)
  for piece in pieces:
    held[piece.prompt].append(piece.text)
    finished[piece.prompt] = bool(piece.finish)
    while at < len(prompts):
      print(printable(''.join(held[at])), end='', flush=True)
      held[at].clear()
      if not finished[at]:
        break
      print()
      at += 1
      _begin(prompts, at)


def _begin(prompts: list[Prompt], at: int) -> None:
  if len(prompts) > 1 and at < len(prompts):
    print(f'=== prompt {at + 1} of {len(prompts)}')
  if at < len(prompts):
    print(printable(prompts[at].shown), end='', flush=True)


class Stopwatch:
  """When the first piece came, and how many tokens came after it."""

  def __init__(self) -> None:
    self.began, self.first, self.last, self.tokens = time.monotonic(), 0.0, 0.0, 0

  def through(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
    for piece in pieces:
      self.last = time.monotonic()
      self.first = self.first or self.last
      self.tokens += len(piece.ids)
      yield piece

  def describe(self, prompts: int) -> str:
    """One line for people."""
    seconds = self.last - self.first
    rate = f', then {self.tokens / seconds:,.1f} tokens/s' if seconds > 0 else ''
    return (f'{prompts} prompt{"s" * (prompts != 1)}, {self.tokens:,} tokens: {self.first - self.began:.1f} s to the first '
            f'(compiling included){rate}')
