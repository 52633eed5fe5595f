"""One question of a task: what a model is asked, and what its answers are worth."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from lmscale.eval.metrics import exact_match, f1, mean
from lmscale.eval.requests import Continuation, Likelihood, Request, Rolling, Writing

LINE = ('\n',)


@dataclasses.dataclass(frozen=True)
class Sample:
  """score: the answers to `requests` -> {metric: number}. facts: what results may be drawn against."""

  requests: tuple[Request, ...]
  score: Callable[[Sequence[Any]], dict[str, float]]
  facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def choose(context: str, choices: Sequence[str], right: int, normed: bool = True) -> Sample:
  """Which of the choices is likeliest behind the context? acc_norm: by log-likelihood per character."""

  def score(answers: Sequence[Likelihood]) -> dict[str, float]:
    logps = [answer.logp for answer in answers]
    found = {'acc': float(best(logps) == right)}
    if normed:
      found['acc_norm'] = float(best([logp / max(len(choice), 1) for logp, choice in zip(logps, choices, strict=True)]) == right)
    return found

  return Sample(tuple(Continuation(context, f' {choice}') for choice in choices), score)


def choose_context(contexts: Sequence[str], text: str, right: int) -> Sample:
  """Behind which of the contexts is the same text likeliest? (WinoGrande's partial scoring, arXiv 1806.02847, section 3.1.)"""
  return Sample(
    tuple(Continuation(context, text) for context in contexts),
    lambda answers: {'acc': float(best([answer.logp for answer in answers]) == right)},
  )


def judge(context: str, choices: Sequence[str], true: Sequence[bool]) -> Sample:
  """The share of probability that is given to the true ones among the choices (TruthfulQA's mc2, arXiv 2109.07958)."""

  def score(answers: Sequence[Likelihood]) -> dict[str, float]:
    most = max(answer.logp for answer in answers)
    shares = [math.exp(answer.logp - most) for answer in answers]
    return {'acc': sum(share for share, is_true in zip(shares, true, strict=True) if is_true) / sum(shares)}

  return Sample(tuple(Continuation(context, f' {choice}') for choice in choices), score)


def answer(context: str, answers: Sequence[str], tokens: int = 32, until: tuple[str, ...] = LINE) -> Sample:
  """Exact match and F1 of what is written; of no answers, of nothing."""
  return Sample(
    (Writing(context, until, tokens),), lambda written: {'em': exact_match(written[0], answers), 'f1': f1(written[0], answers)}
  )


def write(context: str, metric: str, value: Callable[[str], float], tokens: int, until: tuple[str, ...] = LINE) -> Sample:
  """Another metric of what is written."""
  return Sample((Writing(context, until, tokens),), lambda written: {metric: value(written[0])})


def contains(context: str, answers: Sequence[str], every: bool, tokens: int, facts: dict[str, Any]) -> Sample:
  """The share of the answers that is found in what is written, in any case of letters (RULER, arXiv 2404.06654, appendix B); of
  alternatives, whether one is."""

  def value(text: str) -> float:
    found = [float(wanted.lower() in text.lower()) for wanted in answers]
    return mean(found) if every else max(found)

  return dataclasses.replace(write(context, 'acc', value, tokens, ()), facts=facts)


def text(whole: str) -> Sample:
  """How likely a text is: nats, tokens and bytes of it. Metrics of a task are made of the sums."""

  def score(answers: Sequence[Likelihood]) -> dict[str, float]:
    return {'nats': -answers[0].logp, 'tokens': float(answers[0].tokens), 'bytes': float(len(whole.encode()))}

  return Sample((Rolling(whole),), score)


def best(values: Sequence[float]) -> int:
  """The index of the largest, the first of equal ones."""
  return max(range(len(values)), key=values.__getitem__)
