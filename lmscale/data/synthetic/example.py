"""What a task makes."""

import dataclasses
import functools
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class Example:
  """A prompt, which ends where the answer begins, and what is to be found in the answer.

  answers: strings; every: all of them are wanted, else any one will do. facts: what results may be drawn against, such as the depth of a
  needle (0 the beginning, 1 the end), or the entries of a phone book.
  """

  prompt: str
  answers: tuple[str, ...]
  every: bool = True
  facts: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def answer(self) -> str:
    """A right answer."""
    return ', '.join(self.answers if self.every else self.answers[:1])

  @property
  def text(self) -> str:
    """The prompt with its answer, as a document to train on."""
    return f'{self.prompt} {self.answer}\n'


@dataclasses.dataclass(frozen=True)
class Material:
  """Text of other people's that tasks are made of.

  text: the haystack, any prose. questions: by task, [(passages with the answer, question, accepted answers)].
  """

  text: str = ''
  questions: dict[str, list[tuple[tuple[str, ...], str, tuple[str, ...]]]] = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def sentences(self) -> list[str]:
    """Of the haystack, each with what follows it."""
    return re.findall(r'\S.*?(?:[.!?]["\')\]]*(?=\s|$)|$)\s*', self.text, re.DOTALL)
