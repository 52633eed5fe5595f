"""The standard tasks of arXiv 2406.07887 (table 4), each in the columns in which its data set is published."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from lmscale.eval.tasks.files import Doc
from lmscale.eval.tasks.sample import Sample, answer, choose, choose_context, judge

LETTERS = 'ABCDEFGHIJ'
CHOICES = {'text': list, 'label': list}


@dataclasses.dataclass(frozen=True)
class Standard:
  """file: NAME.jsonl, and NAME_shots.jsonl for examples that are shown. make: (doc, the examples as text) -> Sample. shown: an example as
  text, None where none can be. metric: the one that the study reports. by: the column whose value doc and examples share."""

  file: str
  columns: dict[str, Any]
  make: Callable[[Doc, str], Sample]
  shown: Callable[[Doc], str] | None
  metric: str
  by: str = ''


def _question(question: str) -> str:
  return f'Question: {question.strip()}\nAnswer:'


def _multiple(
  file: str, columns: dict[str, Any], context: Callable[[Doc], str], choices: Callable[[Doc], list[str]], right: Callable[[Doc], int],
  metric: str = 'acc_norm', by: str = '',
) -> Standard:  # fmt: skip
  def make(doc: Doc, shots: str) -> Sample:
    among, index = choices(doc), right(doc)
    among[index]  # raises where there is no such choice
    return choose(shots + context(doc), among, index)

  return Standard(file, columns, make, lambda doc: f'{context(doc)} {choices(doc)[right(doc)]}', metric, by)


def _labelled(doc: Doc) -> int:
  """The index of the choice whose label is the key."""
  return [str(label) for label in doc['choices']['label']].index(str(doc['answerKey']))


def _arc(file: str, metric: str) -> Standard:
  columns = {'question': str, 'choices': dict, 'answerKey': str}
  return _multiple(file, columns, lambda doc: _question(doc['question']), lambda doc: doc['choices']['text'], _labelled, metric)


def _winogrande(doc: Doc, shots: str) -> Sample:
  before, _, behind = doc['sentence'].partition('_')
  options = [doc['option1'], doc['option2']]
  right = int(doc['answer']) - 1
  options[right]
  return choose_context([f'{shots}{before}{option}' for option in options], f' {behind.strip()}', right)


def _hellaswag_text(text: str) -> str:
  """Without the marks that its texts from instructions have."""
  return ' '.join(re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. ')).split())


def _hellaswag(doc: Doc) -> str:
  begun = f'{doc["ctx_a"]} {doc["ctx_b"].capitalize()}'
  return _hellaswag_text(f'{doc["activity_label"]}: {begun}')


def _mmlu_letters(doc: Doc) -> str:
  listed = '\n'.join(f'{letter}. {choice}' for letter, choice in zip(LETTERS, doc['choices'], strict=False))
  return f'{doc["question"].strip()}\n{listed}\nAnswer:'


def _mmlu(context: Callable[[Doc], str], choices: Callable[[Doc], list[str]], metric: str) -> Standard:
  columns = {'question': str, 'subject': str, 'choices': list, 'answer': int}
  task = _multiple('mmlu', columns, context, choices, lambda doc: doc['answer'], metric, by='subject')

  def make(doc: Doc, shots: str) -> Sample:
    return task.make(doc, f'Questions on {doc["subject"].replace("_", " ")}, each with its answer.\n\n{shots}')

  return dataclasses.replace(task, make=make)


def _truthful(number: int) -> Standard:
  name = f'mc{number}_targets'

  def make(doc: Doc, shots: str) -> Sample:
    context, among, labels = shots + _question(doc['question']), doc[name]['choices'], doc[name]['labels']
    if number == 1:
      return choose(context, among, labels.index(1), normed=False)
    return judge(context, among, [bool(label) for label in labels])

  return Standard('truthfulqa', {'question': str, name: dict}, make, lambda doc: f'{_question(doc["question"])} {doc[name]["choices"][0]}', 'acc')


def _pubmed(doc: Doc) -> str:
  return f'Abstract: {" ".join(doc["CONTEXTS"])}\n{_question(doc["QUESTION"])}'


def _race(doc: Doc) -> str:
  return f'Text: {doc["article"].strip()}\n\n{_question(doc["question"])}'


def _squad(doc: Doc) -> str:
  return f'Text: {doc["context"].strip()}\n\nWhere the text has no answer, it is: unanswerable\n{_question(doc["question"])}'


def _squad_answers(doc: Doc) -> list[str]:
  return list(doc['answers']['text']) or ['unanswerable', '']


TASKS = {
  'winogrande': Standard(
    'winogrande', {'sentence': str, 'option1': str, 'option2': str, 'answer': str}, _winogrande,
    lambda doc: doc['sentence'].replace('_', doc[f'option{doc["answer"]}']), 'acc',
  ),
  'piqa': _multiple(
    'piqa', {'goal': str, 'sol1': str, 'sol2': str, 'label': int}, lambda doc: _question(doc['goal']), lambda doc: [doc['sol1'], doc['sol2']],
    lambda doc: doc['label'],
  ),
  'hellaswag': _multiple(
    'hellaswag', {'activity_label': str, 'ctx_a': str, 'ctx_b': str, 'endings': list, 'label': (str, int)}, _hellaswag,
    lambda doc: [_hellaswag_text(ending) for ending in doc['endings']], lambda doc: int(doc['label']),
  ),
  'arc_easy': _arc('arc_easy', 'acc'),
  'arc_challenge': _arc('arc_challenge', 'acc_norm'),
  'mmlu': _mmlu(_mmlu_letters, lambda doc: list(LETTERS[: len(doc['choices'])]), 'acc'),
  'mmlu_choice_text': _mmlu(_mmlu_letters, lambda doc: doc['choices'], 'acc_norm'),
  'mmlu_cloze': _mmlu(lambda doc: _question(doc['question']), lambda doc: doc['choices'], 'acc_norm'),
  'openbookqa': _multiple(
    'openbookqa', {'question_stem': str, 'choices': dict, 'answerKey': str}, lambda doc: doc['question_stem'].strip(),
    lambda doc: doc['choices']['text'], _labelled,
  ),
  'truthfulqa_mc1': _truthful(1),
  'truthfulqa_mc2': _truthful(2),
  'pubmedqa': _multiple(
    'pubmedqa', {'QUESTION': str, 'CONTEXTS': list, 'final_decision': str}, _pubmed, lambda doc: ['yes', 'no', 'maybe'],
    lambda doc: ['yes', 'no', 'maybe'].index(doc['final_decision']), 'acc',
  ),
  'race': _multiple(
    'race', {'article': str, 'question': str, 'options': list, 'answer': str}, _race, lambda doc: doc['options'],
    lambda doc: LETTERS.index(doc['answer']), 'acc',
  ),
  'nq_open': Standard(
    'nq_open', {'question': str, 'answer': list}, lambda doc, shots: answer(shots + _question(doc['question']), doc['answer']),
    lambda doc: f'{_question(doc["question"])} {doc["answer"][0]}', 'em',
  ),
  'squad_v2': Standard(
    'squad_v2', {'context': str, 'question': str, 'answers': dict}, lambda doc, shots: answer(shots + _squad(doc), _squad_answers(doc)),
    lambda doc: f'{_squad(doc)} {_squad_answers(doc)[0]}', 'f1',
  ),
}  # fmt: skip
