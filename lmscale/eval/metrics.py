"""Numbers of answers: exact match and F1 of words as SQuAD counts them, ROUGE-L, means with their standard errors."""

import collections
import math
import re
import string
from collections.abc import Sequence

ARTICLES = re.compile(r'\b(a|an|the)\b')
PUNCTUATION = str.maketrans('', '', string.punctuation)


def normalise(text: str) -> str:
  """Lower case, without punctuation and English articles, spaces made one (arXiv 1606.05250, the official scorer's definition)."""
  return ' '.join(ARTICLES.sub(' ', text.lower().translate(PUNCTUATION)).split())


def exact_match(text: str, answers: Sequence[str]) -> float:
  """1 where the text is one of the answers, but for form; of no answers, where it is empty."""
  return float(any(normalise(text) == normalise(answer) for answer in answers or ['']))


def f1(text: str, answers: Sequence[str]) -> float:
  """The best harmonic mean of precision and recall of words over the answers; of no answers, 1 for an empty text."""
  return max(_f1(normalise(text).split(), normalise(answer).split()) for answer in answers or [''])


def _f1(found: list[str], wanted: list[str]) -> float:
  if not found or not wanted:
    return float(found == wanted)
  common = sum((collections.Counter(found) & collections.Counter(wanted)).values())
  return 2 * common / (len(found) + len(wanted))


def rouge_l(text: str, answers: Sequence[str]) -> float:
  """The best F1 of the longest common subsequence of words (Lin 2004), lower case, as they are split by spaces."""
  return max(_rouge_l(text.lower().split(), answer.lower().split()) for answer in answers or [''])


def _rouge_l(found: list[str], wanted: list[str]) -> float:
  if not found or not wanted:
    return float(found == wanted)
  row = [0] * (len(wanted) + 1)
  for word in found:
    before = row[:]
    for j, other in enumerate(wanted):
      row[j + 1] = before[j] + 1 if word == other else max(before[j + 1], row[j])
  return 2 * row[-1] / (len(found) + len(wanted))


def mean(values: Sequence[float]) -> float:
  """Their mean; nan of none."""
  return math.fsum(values) / len(values) if values else math.nan


def standard_error(values: Sequence[float]) -> float:
  """Of their mean: the sample's standard deviation over the root of how many there are; nan of fewer than two."""
  if len(values) < 2:
    return math.nan
  middle = mean(values)
  return math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (len(values) - 1) / len(values))


def digits_right(text: str, answer: str) -> float:
  """The share of an answer's characters that the text has at the same places: what is remembered, if not all."""
  return mean([float(a == b) for a, b in zip(text.strip().ljust(len(answer)), answer, strict=False)])
