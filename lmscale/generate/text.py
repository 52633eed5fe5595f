"""Texts in, texts out: a continuation's text as its tokens come, and where a stop string ends it."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lmscale.config import GenerateConfig
from lmscale.data.tokenizer import Tokenizer
from lmscale.generate.generator import Generator

UNKNOWN = '\ufffd'  # what an unfinished character decodes to
UNFINISHED = 3  # at most so many of them: a character of UTF-8 has up to four bytes
TAIL = 8  # tokens before the last ones that are decoded with them: spaces and characters depend on neighbours
WINDOW = 32


class Piece(NamedTuple):
  """What one more token adds to prompt number `prompt`. ids: the token, nothing where it ended the document. finish: as `Drawn`."""

  prompt: int
  ids: list[int]
  text: str
  finish: str


class Text:
  """The text behind a prompt, token by token. text: so far, without what may still change, and without a stop string."""

  def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]):
    self.text = ''
    self._decode, self._stop = tokenizer.decode, stop
    self._window = list(prompt[-TAIL:])
    self._decoded = len(_finished(self._decode(self._window)))  # characters of the window's text that are the prompt's or in `text`
    self._shown = 0

  def add(self, token: int) -> bool:
    """Reads one more token; whether a stop string is complete."""
    self._window.append(token)
    stopped = self._extend(_finished(self._decode(self._window)))
    if len(self._window) > WINDOW:
      self._window = self._window[-TAIL:]
      self._decoded = len(_finished(self._decode(self._window)))
    return stopped

  def take(self, last: bool = False) -> str:
    """The text that was not taken yet and stays: without what may become a stop string or is half a character.

    last: no token follows, so everything stays.
    """
    if last:
      self._extend(self._decode(self._window))
    end = len(self.text) - (0 if last else self._begun())
    new, self._shown = self.text[self._shown : end], max(end, self._shown)
    return new

  def _extend(self, decoded: str) -> bool:
    new, self._decoded = decoded[self._decoded :], max(self._decoded, len(decoded))
    start = len(self.text)
    self.text += new
    found = [at for stop in self._stop if (at := self.text.find(stop, max(0, start - len(stop) + 1))) >= 0]
    if found:
      self.text = self.text[: min(found)]
    return bool(found)

  def _begun(self) -> int:
    """Characters at the end of the text with which a stop string may begin."""
    sizes = (n for stop in self._stop for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
    return max(sizes, default=0)


def continue_texts(
  generator: Generator, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], options: GenerateConfig, seed: int
) -> Iterator[Piece]:
  """The text after each prompt (its ids) as it is made, up to an end of document or one of options.stop; see `Generator.generate`."""
  texts = [Text(tokenizer, prompt, options.stop) for prompt in prompts]
  for prompt, token, finish in generator.generate(
    prompts, options, seed, tokenizer.end, watch=lambda prompt, token: texts[prompt].add(token)
  ):
    text = texts[prompt].take(last=bool(finish))
    yield Piece(prompt, [] if token == tokenizer.end else [token], text, finish)


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
  """The ids of a prompt; of an empty one the id that ends a document, behind which another begins."""
  return [int(i) for i in tokenizer.encode(text)] or [tokenizer.end]


def _finished(decoded: str) -> str:
  """Without characters at the end of which bytes may be missing."""
  unknown = len(decoded) - len(decoded.rstrip(UNKNOWN))
  return decoded[: len(decoded) - min(unknown, UNFINISHED)]
