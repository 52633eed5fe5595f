"""Tasks for a model: from their names to numbers, with what is needed to know later where those are from."""

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from lmscale.data.synthetic.dice import Dice
from lmscale.data.synthetic.tasks import VERSION
from lmscale.data.tokenizer import Tokenizer
from lmscale.errors import ConfigError
from lmscale.eval.metrics import mean, standard_error
from lmscale.eval.requests import Model, ask
from lmscale.eval.tasks import fetching, files, long, position, standard, synthetic
from lmscale.eval.tasks.sample import Sample, text

TEXT = 'text'  # the task of texts themselves: how likely is each, per byte and per token


@dataclasses.dataclass(frozen=True)
class Options:
  """data: the folder of data sets; None: what has a published name is fetched, once, into `cache`. samples: of each task, 0 for all that there are (of synthetic ones, DEFAULT). shots: examples shown before
  a standard question. tokens: lengths of synthetic tasks; the longest is that of loss by position. haystack: text in which needles are
  hidden; '': Python's help topics. context: tokens that the model reads at most."""

  data: pathlib.Path | None = None
  cache: pathlib.Path = pathlib.Path()
  samples: int = 0
  shots: int = 0
  tokens: tuple[int, ...] = (1024,)
  haystack: str = ''
  seed: int = 0
  context: int = 1024

  def folder(self, file: str, task: str) -> pathlib.Path:
    """Where FILE.jsonl lies. Raises ConfigError where nobody can say, or it cannot be fetched."""
    return self.data or fetching.fetched(file, task, self.cache)

  def describe(self) -> dict[str, Any]:
    """What a score depends on beside the model and the data, JSON-able."""
    haystack = hashlib.sha256(self.haystack.encode()).hexdigest() if self.haystack else ''
    return {'samples': self.samples, 'shots': self.shots, 'lengths': list(self.tokens), 'haystack': haystack, 'seed': self.seed,
            'context': self.context}  # fmt: skip


DEFAULT = 100


def task_names() -> list[str]:
  """All that can be asked for."""
  return [*standard.TASKS, *long.TASKS, *synthetic.NAMES, TEXT, position.NAME]


def check_tasks(names: Sequence[str], field: str) -> None:
  """Raises ConfigError for a name that is none, or none at all. field: where they were given."""
  known = task_names()
  if not names:
    raise ConfigError(f'{field}: none; give some of {", ".join(known)}')
  for name in names:
    if name not in known:
      raise ConfigError(f'{field}: {name!r} is no task; known: {", ".join(known)}')


def has_lengths(names: Sequence[str]) -> bool:
  """Whether `Options.tokens` matter to one of them."""
  return bool(set(names) & {*synthetic.NAMES, position.NAME})


@dataclasses.dataclass(frozen=True)
class Asked:
  """The samples of a task, and the digest of the file that they are from, or of what made them."""

  samples: list[Sample]
  digest: str

  @property
  def questions(self) -> str:
    """SHA-256 of all that the model is asked: equal where two models were asked the same."""
    return hashlib.sha256(repr([sample.requests for sample in self.samples]).encode('utf-8', 'backslashreplace')).hexdigest()


def prepare(name: str, tokenizer: Tokenizer, options: Options) -> Asked:
  """The samples of a task, for a model that reads the ids of `tokenizer`. Raises ConfigError where they cannot be had."""
  if name in synthetic.NAMES:
    material, digest = synthetic.material(name, options.haystack, options.folder)
    count = options.samples or DEFAULT

    def of(tokens: int) -> list[Sample]:
      return synthetic.samples(name, lambda text: len(tokenizer.encode(text)), tokens, count, options.seed, material)

    lengths = [of(tokens) for tokens in options.tokens]
    return Asked([sample for of_length in lengths for sample in of_length], digest or f'synthetic {VERSION}')
  if name == TEXT:
    data = files.read(options.folder(TEXT, name), TEXT, {'text': str}, name)
    return Asked([text(doc['text']) for doc in _some(data.docs, options)], data.digest)
  if name == position.NAME:
    data, tokens = files.read(options.folder(TEXT, name), TEXT, {'text': str}, name), min(max(options.tokens), options.context)
    return Asked(position.samples([doc['text'] for doc in data.docs], tokenizer, tokens, options.samples, options.seed), data.digest)
  if name in long.TASKS:
    make, _ = long.TASKS[name]
    data = files.read(options.folder(name, name), name, long.COLUMNS, name)
    chosen = files.DataSet(_some(data.docs, options), data.digest)
    return Asked(files.each(chosen, make, f'{name}.jsonl'), data.digest)
  return _prepare_standard(name, options)


def _prepare_standard(name: str, options: Options) -> Asked:
  task = standard.TASKS[name]
  data = files.read(options.folder(task.file, name), task.file, task.columns, name)
  chosen = files.DataSet(_some(data.docs, options), data.digest)
  shown = _shown(name, task, options)
  return Asked(files.each(chosen, lambda doc: task.make(doc, shown(doc)), f'{task.file}.jsonl'), data.digest)


def _shown(name: str, task: standard.Standard, options: Options) -> Callable[[files.Doc], str]:
  """The examples before a question, as text: the first of the file that fit it."""
  if not options.shots:
    return lambda doc: ''
  pool = files.read(options.folder(f'{task.file}_shots', name), f'{task.file}_shots', task.columns, name).docs

  def of(doc: files.Doc) -> str:
    fitting = [other for other in pool if not task.by or other[task.by] == doc[task.by]][: options.shots]
    if len(fitting) < options.shots:
      raise ValueError(f'{options.shots} examples to show, {task.file}_shots.jsonl has {len(fitting)} that fit')
    return ''.join(f'{task.shown(other)}\n\n' for other in fitting)

  return of


def _some(docs: list[files.Doc], options: Options) -> list[files.Doc]:
  """All, or so many of them, drawn."""
  if not options.samples or options.samples >= len(docs):
    return docs
  chosen = Dice('samples', options.seed).distinct(options.samples, len(docs))
  return [docs[i] for i in sorted(chosen)]


def score_samples(model: Model, asked: Asked) -> list[dict[str, float]]:
  """{metric: number} of each sample."""
  requests = [request for sample in asked.samples for request in sample.requests]
  answers = iter(ask(model, requests))
  return [sample.score([next(answers) for _ in sample.requests]) for sample in asked.samples]


def summarise(name: str, asked: Asked, scored: list[dict[str, float]]) -> dict[str, Any]:
  """The scores of a task: {metric, metric_stderr, samples}, JSON-able; of synthetic ones also by length, and by depth where they have one."""
  if name == TEXT:
    return _text_scores(scored) | {'digest': asked.digest}
  found = _scores(scored)
  if name == position.NAME:
    return position.by_position(found) | {'digest': asked.digest}
  lengths = dict.fromkeys(sample.facts['length'] for sample in asked.samples if 'length' in sample.facts)
  if lengths:
    of = {n: [(sample, score) for sample, score in zip(asked.samples, scored, strict=True) if sample.facts['length'] == n] for n in lengths}
    found['by_length'] = {str(n): _scores([score for _, score in pairs]) | _by_depth(pairs) for n, pairs in of.items()}
  return found | {'digest': asked.digest}


def _scores(scored: Sequence[dict[str, float]]) -> dict[str, Any]:
  found: dict[str, Any] = {}
  for metric in scored[0]:
    values = [score[metric] for score in scored]
    error = standard_error(values)
    found |= {metric: mean(values), f'{metric}_stderr': None if math.isnan(error) else error}
  return found | {'samples': len(scored)}


def _by_depth(pairs: Sequence[tuple[Sample, dict[str, float]]], parts: int = 5) -> dict[str, Any]:
  """The mean accuracy where what is asked for lies in each fifth of the text; None of none."""
  if not all('depth' in sample.facts for sample, _ in pairs):
    return {}
  of: list[list[float]] = [[] for _ in range(parts)]
  for sample, score in pairs:
    of[min(int(sample.facts['depth'] * parts), parts - 1)].append(score['acc'])
  return {'acc_by_depth': [mean(values) if values else None for values in of]}


def _text_scores(scored: Sequence[dict[str, float]]) -> dict[str, Any]:
  """Of all texts together. The errors of the ratios are those of their numerators, given the denominators."""
  sums = {name: math.fsum(score[name] for score in scored) for name in ('nats', 'tokens', 'bytes')}
  loss, bits = sums['nats'] / max(sums['tokens'], 1), sums['nats'] / math.log(2) / max(sums['bytes'], 1)
  residuals = [score['nats'] - loss * score['tokens'] for score in scored]
  error = standard_error(residuals) * len(scored) / max(sums['tokens'], 1)
  known = not math.isnan(error)
  return {
    'loss': loss, 'loss_stderr': error if known else None, 'perplexity': math.exp(min(loss, 700)), 'bits_per_byte': bits,
    'bits_per_byte_stderr': error / math.log(2) * sums['tokens'] / max(sums['bytes'], 1) if known else None, 'samples': len(scored),
  }  # fmt: skip


def metric_of(name: str) -> str:
  """The metric of a task that a table shows."""
  if name in standard.TASKS:
    return standard.TASKS[name].metric
  if name in long.TASKS:
    return long.TASKS[name][1]
  return {TEXT: 'bits_per_byte', position.NAME: 'loss'}.get(name, 'acc')
