"""What a model can be asked: how likely a text is behind another, how likely a text is by itself, and what it writes itself."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Continuation:
  """How likely is `text` behind `context`?"""

  context: str
  text: str


@dataclasses.dataclass(frozen=True)
class Rolling:
  """How likely is `text`, every token of it, from the token on that ends a document?"""

  text: str


@dataclasses.dataclass(frozen=True)
class Window:
  """How likely is each of the tokens `ids`, from the token on that ends a document, behind those before it?"""

  ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Writing:
  """What does the model write behind `context`, greedily, up to one of `until` (left out) or `tokens` tokens?"""

  context: str
  until: tuple[str, ...] = ()
  tokens: int = 128


Request = Continuation | Rolling | Window | Writing


class Likelihood(NamedTuple):
  """logp: in nats, summed over the tokens of the text. greedy: each was the likeliest. tokens: of the text."""

  logp: float
  greedy: bool
  tokens: int


class Model(Protocol):
  """What scores tasks need of a model. The answers are in the order of the requests."""

  def continuations(self, requests: Sequence[Continuation]) -> list[Likelihood]: ...

  def rolling(self, requests: Sequence[Rolling]) -> list[Likelihood]: ...

  def windows(self, requests: Sequence[Window]) -> list[np.ndarray]:
    """Log-probabilities in nats, float64 [tokens]."""

  def write(self, requests: Sequence[Writing]) -> list[str]: ...


def ask(model: Model, requests: Sequence[Request]) -> list[Any]:
  """The answers to requests of any kinds."""
  answers: dict[int, Any] = {}
  methods = {Continuation: 'continuations', Rolling: 'rolling', Window: 'windows', Writing: 'write'}
  for kind, method in methods.items():
    of_kind = [i for i, request in enumerate(requests) if isinstance(request, kind)]
    answers |= zip(of_kind, getattr(model, method)([requests[i] for i in of_kind]) if of_kind else [], strict=True)
  return [answers[i] for i in range(len(requests))]
