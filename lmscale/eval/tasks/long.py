"""The nine tasks on long natural texts of LongBench (arXiv 2308.14508), in its columns: input, context, answers, all_classes."""

from collections.abc import Callable

from lmscale.eval.metrics import f1, rouge_l
from lmscale.eval.tasks.files import Doc
from lmscale.eval.tasks.sample import Sample, write

COLUMNS = {'input': str, 'context': str, 'answers': list}


def _question(doc: Doc) -> Sample:
  context = f'{doc["context"].strip()}\n\nAnswer from the text above, in a few words.\nQuestion: {doc["input"].strip()}\nAnswer:'
  return write(context, 'f1', lambda text: f1(text, doc['answers']), 32)


def _examples(metric: str, value: Callable[[Doc, str], float], tokens: int) -> Callable[[Doc], Sample]:
  """Where the context is a list of examples, which the input goes on with."""
  return lambda doc: write(f'{doc["context"].rstrip()}\n{doc["input"].rstrip()}', metric, lambda text: value(doc, text), tokens)


def _class(doc: Doc, text: str) -> float:
  """The share of the right class among the classes that are named; names within the right one's do not count."""
  right = doc['answers'][0]
  named = [name for name in doc.get('all_classes') or [right] if name in text and not (name in right and name != right)]
  return 1 / len(named) if right in named else 0.0


TASKS: dict[str, tuple[Callable[[Doc], Sample], str]] = {
  **dict.fromkeys(('narrativeqa', 'qasper', 'multifieldqa_en', 'hotpotqa', '2wikimqa', 'musique'), (_question, 'f1')),
  'trec': (_examples('acc', _class, 64), 'acc'),
  'triviaqa': (_examples('f1', lambda doc, text: f1(text, doc['answers']), 32), 'f1'),
  'samsum': (_examples('rouge_l', lambda doc, text: rouge_l(text, doc['answers']), 128), 'rouge_l'),
}
