"""Synthetic tasks as questions: see `data/synthetic`."""

import pathlib
from collections.abc import Callable

from lmscale.data.synthetic import chains, counting, needles, phonebook, questions
from lmscale.data.synthetic.example import Example, Material
from lmscale.data.synthetic.haystack import topics
from lmscale.data.synthetic.tasks import PHONEBOOK, RECALL, TASKS, make_example
from lmscale.eval.metrics import digits_right
from lmscale.eval.requests import Continuation, Writing
from lmscale.eval.tasks import files
from lmscale.eval.tasks.sample import Sample, contains

ANSWER_TOKENS = {
  **dict.fromkeys(needles.TASKS, needles.ANSWER_TOKENS), **counting.ANSWER_TOKENS, 'vt': chains.ANSWER_TOKENS,
  'qa_1': questions.ANSWER_TOKENS, 'qa_2': questions.ANSWER_TOKENS, **dict.fromkeys(PHONEBOOK, phonebook.ANSWER_TOKENS),
}  # fmt: skip
NAMES = tuple(TASKS)
QA_FILES = {'qa_1': 'squad_v2', 'qa_2': 'hotpot'}
QA_COLUMNS = {
  'qa_1': {'context': str, 'question': str, 'answers': dict},
  'qa_2': {'context': dict, 'supporting_facts': dict, 'question': str, 'answer': str},
}


def samples(task: str, count: Callable[[str], int], tokens: int, number: int, seed: int, material: Material) -> list[Sample]:
  """`number` examples whose prompt and answer have about `tokens` tokens, of which a text has `count(text)`."""
  made = [make_example(task, seed, i, tokens, count, material) for i in range(number)]
  return [_sample(task, example, count, tokens) for example in made]


def _sample(task: str, example: Example, count: Callable[[str], int], tokens: int) -> Sample:
  facts = example.facts | {'length': tokens}
  if task in RECALL:  # one answer, of one token or many: is each of its tokens the likeliest?
    return Sample(
      (Continuation(example.prompt, f' {example.answer}'),), lambda answers: {'acc': float(answers[0].greedy)}, facts
    )
  room = max(ANSWER_TOKENS[task], count(f' {example.answer}'))
  if task not in PHONEBOOK:
    return contains(example.prompt, example.answers, example.every, room, facts)
  number = example.answers[0]
  return Sample(
    (Writing(example.prompt, ('\n',), room),),
    lambda written: {'acc': float(written[0].strip() == number), 'digits': digits_right(written[0], number)},
    facts,
  )


def material(task: str, text: str, folder: Callable[[str, str], pathlib.Path]) -> tuple[Material, str]:
  """(what the task is made of, the digest of the file that it is from, if any). text: of the haystack; '': Python's help topics.
  folder(file, task): where a file lies."""
  if task not in QA_FILES:
    return Material(text or topics()), ''
  data = files.read(folder(QA_FILES[task], task), QA_FILES[task], QA_COLUMNS[task], task)
  found = files.each(data, _squad if task == 'qa_1' else _hotpot, QA_FILES[task])
  return Material(questions={task: [entry for entry in found if entry[2]]}), data.digest


def _squad(doc: files.Doc) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
  return (doc['context'],), doc['question'], tuple(doc['answers']['text'])


def _hotpot(doc: files.Doc) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
  """The passages that its answer follows from."""
  wanted = set(doc['supporting_facts']['title'])
  passages = zip(doc['context']['title'], doc['context']['sentences'], strict=True)
  return tuple(f'{title}\n{"".join(sentences)}' for title, sentences in passages if title in wanted), doc['question'], (doc['answer'],)
