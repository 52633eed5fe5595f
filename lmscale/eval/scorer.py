"""Asks a model of ours. Texts that share their beginning are read once up to there, and its caches copied to each.

How texts become tokens follows what is usual (lm-evaluation-harness): spaces at the end of a context go to what follows it, both are
tokenised together and cut where the context alone ends, and an empty context is the token that ends a document.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lmscale.config import GenerateConfig
from lmscale.data.tokenizer import Tokenizer
from lmscale.eval.requests import Continuation, Likelihood, Rolling, Window, Writing
from lmscale.generate.engine import Engine
from lmscale.generate.generator import Generator, cache_length, round_up
from lmscale.generate.ragged import chunks, cut
from lmscale.generate.text import continue_texts, encode_prompt


class Pair(NamedTuple):
  """The ids of one request. before: at least one."""

  before: list[int]
  scored: list[int]


class Scored(NamedTuple):
  """Of each token that was scored: its log-probability, float64, and whether it was the likeliest."""

  logps: np.ndarray
  greedy: np.ndarray

  @property
  def together(self) -> Likelihood:
    return Likelihood(float(self.logps.sum()), bool(self.greedy.all()), len(self.logps))


class Scorer:
  """A model with its tokenizer. context: tokens that it reads at most; longer texts lose their beginning, and `truncated` counts them.

  between: is called between batches, in several processes at the same places, and may raise what ends the asking.
  """

  def __init__(
    self, engine: Engine, tokenizer: Tokenizer, options: GenerateConfig, context: int, between: Callable[[], None] = lambda: None
  ):
    self._engine, self.tokenizer, self._options, self.context = engine, tokenizer, options, context
    self._generator = Generator(engine, tokenizer.size)
    self._rows = round_up(options.batch, engine.ranks)
    self._between = between
    self.truncated = 0

  def continuations(self, requests: Sequence[Continuation]) -> list[Likelihood]:
    """See `requests.Continuation`."""
    scored = self._score([self.encode_pair(request.context, request.text) for request in requests])
    return [one.together for one in scored]

  def rolling(self, requests: Sequence[Rolling]) -> list[Likelihood]:
    """See `requests.Rolling`. Texts longer than the context are read in windows of it that predict each token once; the last one
    begins as early as it can."""
    parts = [self.cut_windows([int(i) for i in self.tokenizer.encode(request.text)]) for request in requests]
    found = iter(self._score([pair for pairs in parts for pair in pairs]))
    sums = []
    for pairs in parts:
      answers = [next(found).together for _ in pairs]
      sums.append(Likelihood(sum(a.logp for a in answers), all(a.greedy for a in answers), sum(a.tokens for a in answers)))
    return sums

  def windows(self, requests: Sequence[Window]) -> list[np.ndarray]:
    """See `requests.Window`."""
    return [scored.logps for scored in self._score([Pair([self.tokenizer.end], list(request.ids)) for request in requests])]

  def write(self, requests: Sequence[Writing]) -> list[str]:
    """See `requests.Writing`."""
    texts = [''] * len(requests)
    kinds = dict.fromkeys((request.until, request.tokens) for request in requests)
    for until, tokens in kinds:
      chosen = [i for i, request in enumerate(requests) if (request.until, request.tokens) == (until, tokens)]
      prompts = [self._cut(encode_prompt(self.tokenizer, requests[i].context), tokens) for i in chosen]
      order = sorted(range(len(chosen)), key=lambda j: len(prompts[j]))  # those of a length are read together
      options = dataclasses.replace(self._options, tokens=tokens, stop=until, temperature=0.0)
      for piece in continue_texts(self._generator, self.tokenizer, [prompts[j] for j in order], options, seed=0):
        texts[chosen[order[piece.prompt]]] += piece.text
        self._between()
    return texts

  def encode_pair(self, context: str, text: str) -> Pair:
    """The ids of a context and of the text behind it."""
    bare = context.rstrip()
    both = [int(i) for i in self.tokenizer.encode(context + text)]
    before = len(self.tokenizer.encode(bare))
    if not before:
      return Pair([self.tokenizer.end], both)
    return Pair(both[:before], both[before:])

  def cut_windows(self, ids: list[int]) -> list[Pair]:
    """A text cut so that each of its tokens is scored once."""
    size = self.context
    pairs = [Pair([self.tokenizer.end], ids[:size])] if ids else []
    for start in range(size, len(ids), size):
      stop = min(start + size, len(ids))
      pairs.append(Pair(ids[stop - size - 1 : start], ids[start:stop]))
    return pairs

  def _cut(self, prompt: list[int], tokens: int) -> list[int]:
    room = max(self.context - tokens, 1)
    self.truncated += len(prompt) > room
    return prompt[-room:]

  def _score(self, pairs: Sequence[Pair]) -> list[Scored]:
    """Of each pair. Those with the same tokens before share their prefix, which is read once."""
    groups: dict[tuple[int, ...], list[int]] = {}
    fitted = [self._fit(pair) for pair in pairs]
    for i, (before, _) in enumerate(fitted):
      groups.setdefault(tuple(before[:-1]), []).append(i)
    nothing = Scored(np.zeros(0), np.zeros(0, bool))
    found: dict[int, Scored] = {i: nothing for i, (_, scored) in enumerate(fitted) if not scored}
    prefixes = sorted(groups, key=lambda prefix: (len(prefix), prefix))
    for first in range(0, len(prefixes), self._rows):
      self._between()
      part = prefixes[first : first + self._rows]
      found |= self._score_batch(part, [(row, i, fitted[i]) for row, prefix in enumerate(part) for i in groups[prefix] if fitted[i].scored])
    return [found[i] for i in range(len(pairs))]

  def _fit(self, pair: Pair) -> Pair:
    """With at most `context` tokens read; the last is only predicted."""
    before, scored = pair
    if len(before) + len(scored) <= self.context + 1:
      return pair
    self.truncated += 1
    scored = scored[-self.context :]
    return Pair(before[-(self.context + 1 - len(scored)) :], scored)

  def _score_batch(self, prefixes: list[tuple[int, ...]], members: list[tuple[int, int, Pair]]) -> dict[int, Scored]:
    """members: (row of its prefix, index, pair), scored `rows` at a time."""
    if not members:
      return {}
    longest = max(len(prefixes[row]) + len(scored) for row, _, (_, scored) in members)
    length = cache_length(longest)
    caches, width = self._engine.empty(self._rows, length), min(self._options.prefill_chunk, length)
    counts = np.array([*map(len, prefixes), *[0] * (self._rows - len(prefixes))], np.int32)
    caches, _ = self._read(caches, prefixes, np.zeros(self._rows, np.int32), width, None)
    found: dict[int, Scored] = {}
    members = sorted(members, key=lambda member: len(member[2][1]))
    for first in range(0, len(members), self._rows):
      part = members[first : first + self._rows]
      sources = np.zeros(self._rows, np.int32)
      sources[: len(part)] = [row for row, _, _ in part]
      texts = [(before[-1], *scored[:-1]) for _, _, (before, scored) in part]
      labels = [scored for _, _, (_, scored) in part]
      _, scores = self._read(self._engine.repeat(caches, sources), texts, counts[sources], width, labels)
      found |= {i: scored for (_, i, _), scored in zip(part, scores, strict=True)}
    return found

  def _read(
    self, caches: object, texts: Sequence[Sequence[int]], held: np.ndarray, width: int, labels: Sequence[Sequence[int]] | None
  ) -> tuple[object, list[Scored]]:
    """Reads a text into each row behind the `held` tokens there, `width` at a time.

    Returns (caches; with labels, the tokens that follow each, what they score).
    """
    parts = []
    for chunk in chunks(texts, held, width):
      hidden, caches = self._engine.prefill(caches, *chunk[1:])
      if labels is not None:
        parts.append(self._engine.likelihoods(hidden, cut(labels, chunk.start, chunk.tokens.shape), self.tokenizer.size))
    if labels is None:
      return caches, []
    logps, greedy = (np.concatenate([np.asarray(part[k]) for part in parts], axis=1) for k in (0, 1))
    return caches, [Scored(logps[row, :n].astype(np.float64), greedy[row, :n]) for row, n in enumerate(map(len, texts))]
