"""What tasks ask, in the columns of the published data sets, and what answers are worth; with a model that knows what it is told."""

import importlib.machinery
import json
import math
import sys
import types

import numpy as np
import pytest

from lmscale.errors import ConfigError
from lmscale.eval import evaluate
from lmscale.eval.requests import Continuation, Likelihood, Rolling, Writing, ask
from lmscale.eval.tasks import fetching, long, position, standard, synthetic

ARC = {'question': 'What is 1 + 1?', 'choices': {'text': ['one', 'two', 'three'], 'label': ['A', 'B', 'C']}, 'answerKey': 'B'}
MMLU = {'question': 'What burns?', 'subject': 'high_school_physics', 'choices': ['stone', 'wood', 'water', 'air'], 'answer': 1}
DOCS = {  # a line of each file, and the text that is likeliest where the model is right
  'winogrande': ({'sentence': 'The cup fell off the table as _ was moved.', 'option1': 'it', 'option2': 'the table', 'answer': '2'}, 'as the table'),
  'piqa': ({'goal': 'Open a jar.', 'sol1': 'Turn the lid.', 'sol2': 'Hit the wall.', 'label': 0}, ' Turn the lid.'),
  'hellaswag': ({'activity_label': 'Cooking', 'ctx_a': 'A man stirs.', 'ctx_b': 'he', 'endings': ['sings.', 'eats [title] soup.'], 'label': '1'},
                ' eats. soup.'),
  'arc_easy': (ARC, ' two'),
  'arc_challenge': (ARC | {'choices': {'text': ['one', 'two'], 'label': ['1', '2']}, 'answerKey': '2'}, ' two'),
  'openbookqa': ({'question_stem': 'Ice is', 'choices': ARC['choices'], 'answerKey': 'C'}, ' three'),
  'pubmedqa': ({'QUESTION': 'Does it help?', 'CONTEXTS': ['We tried.', 'It did.'], 'final_decision': 'yes'}, ' yes'),
  'race': ({'article': 'Tom left.', 'question': 'Who left?', 'options': ['Ann', 'Tom', 'Sam', 'Eve'], 'answer': 'B'}, ' Tom'),
  'nq_open': ({'question': 'who wrote it', 'answer': ['Jane Doe', 'J. Doe']}, 'jane doe'),
  'squad_v2': ({'context': 'Rome is old.', 'question': 'What is old?', 'answers': {'text': ['Rome'], 'answer_start': [0]}}, 'Rome'),
  'truthfulqa': ({'question': 'Is it so?', 'mc1_targets': {'choices': ['No', 'Yes'], 'labels': [1, 0]},
                  'mc2_targets': {'choices': ['No', 'Never', 'Yes'], 'labels': [1, 1, 0]}}, ' No'),
  'mmlu': (MMLU, None),
}  # fmt: skip
LONG = {'input': 'Who?', 'context': 'A long text about Ann.', 'answers': ['Ann'], 'all_classes': None}


class Knowing:
  """Finds likely what holds `text`, and writes it."""

  def __init__(self, text):
    self.text, self.seen = text, []

  def continuations(self, requests):
    self.seen += requests
    whole = [request.context + request.text for request in requests]
    return [Likelihood(-1.0 if self.text.strip() in text.rpartition('Answer:')[2] else -9.0, True, 1) for text in whole]

  def rolling(self, requests):
    return [Likelihood(-2.0 * len(request.text), True, len(request.text)) for request in requests]

  def write(self, requests):
    self.seen += requests
    return [self.text for _ in requests]

  def windows(self, requests):
    return [np.arange(len(request.ids), dtype=np.float64) - len(request.ids) + 0.5 for request in requests]

  def encode(self, text):
    return [ord(c) for c in text]


@pytest.fixture
def folder(tmp_path):
  for name, (doc, _) in DOCS.items():
    (tmp_path / f'{name}.jsonl').write_text(json.dumps(doc) + '\n')
  return tmp_path


def scores(name, model, **options):
  asked = evaluate.prepare(name, model, evaluate.Options(**options))
  return evaluate.summarise(name, asked, evaluate.score_samples(model, asked))


@pytest.mark.parametrize('name', [name for name in standard.TASKS if not name.startswith('mmlu')])
def test_who_knows_is_right_and_who_does_not_is_wrong(name, folder):
  _, text = DOCS[standard.TASKS[name].file]
  right, wrong = (scores(name, Knowing(known), data=folder) for known in (text, 'zzz'))
  metric = evaluate.metric_of(name)
  assert right[metric] > 0.99 and right['samples'] == 1
  if name not in ('piqa', 'truthfulqa_mc1', 'truthfulqa_mc2', 'pubmedqa', 'hellaswag', 'openbookqa'):  # the first, or the longest, is right there
    assert wrong[metric] == 0


def test_the_three_phrasings_of_mmlu(folder):
  for name, known in (('mmlu', ' B'), ('mmlu_choice_text', ' wood'), ('mmlu_cloze', ' wood')):
    model = Knowing(known)
    assert scores(name, model, data=folder)[evaluate.metric_of(name)] == 1
    assert [request.text for request in model.seen] == ([' A', ' B', ' C', ' D'] if name == 'mmlu' else [' stone', ' wood', ' water', ' air'])
    assert ('B. wood' in model.seen[0].context) is (name != 'mmlu_cloze')
    assert model.seen[0].context.startswith('Questions on high school physics, ')


def test_shots_are_of_the_same_subject(folder):
  others = [MMLU | {'subject': 'art', 'question': 'Which art?'}, *[MMLU | {'question': f'Which burns {i}?'} for i in range(3)]]
  (folder / 'mmlu_shots.jsonl').write_text(''.join(json.dumps(doc) + '\n' for doc in others))
  model = Knowing(' B')
  scores('mmlu', model, data=folder, shots=2)
  context = model.seen[0].context
  assert context.count('Answer: B\n\n') == 2 and 'Which art' not in context and 'burns 2' not in context
  with pytest.raises(ConfigError, match=r'mmlu.jsonl: entry 1 .*4 examples to show, mmlu_shots.jsonl has 3 that fit'):
    scores('mmlu', model, data=folder, shots=4)


def test_winogrande_scores_the_same_text_behind_both(folder):
  model = Knowing('x')
  scores('winogrande', model, data=folder)
  assert [(r.context, r.text) for r in model.seen] == [
    ('The cup fell off the table as it', ' was moved.'), ('The cup fell off the table as the table', ' was moved.')
  ]  # fmt: skip


def test_squad_without_an_answer(folder):
  doc = DOCS['squad_v2'][0] | {'answers': {'text': [], 'answer_start': []}}
  (folder / 'squad_v2.jsonl').write_text(json.dumps(doc) + '\n')
  assert scores('squad_v2', Knowing('unanswerable'), data=folder)['em'] == scores('squad_v2', Knowing(''), data=folder)['f1'] == 1
  assert scores('squad_v2', Knowing('Rome'), data=folder)['f1'] == 0


def test_the_true_ones_share_of_truthfulqa(folder):
  found = scores('truthfulqa_mc2', Knowing(' No'), data=folder)['acc']
  assert found == pytest.approx((1 + math.exp(-8)) / (1 + 2 * math.exp(-8)))


def test_long_texts(tmp_path):
  for name, doc, known, value in (
    ('hotpotqa', LONG, 'Ann', 1), ('qasper', LONG, 'Ann or Eve', 0.5), ('samsum', LONG | {'answers': ['Ann came home']}, 'Ann came', 0.8),
    ('trec', LONG | {'answers': ['City'], 'all_classes': ['City', 'Country', 'Other City']}, 'Type: City', 1),
    ('trec', LONG | {'answers': ['City'], 'all_classes': ['City', 'Country']}, 'City or Country', 0.5), ('triviaqa', LONG, 'Bob', 0),
  ):  # fmt: skip
    (tmp_path / f'{name}.jsonl').write_text(json.dumps(doc) + '\n')
    assert scores(name, Knowing(known), data=tmp_path)[evaluate.metric_of(name)] == pytest.approx(value), name


def test_texts(tmp_path):
  (tmp_path / 'text.jsonl').write_text(''.join(json.dumps({'text': 'é' * n}) + '\n' for n in (3, 5)))
  found = scores('text', Knowing(''), data=tmp_path)
  assert found['loss'] == pytest.approx(2) and found['perplexity'] == pytest.approx(math.exp(2))
  assert found['bits_per_byte'] == pytest.approx(1 / math.log(2)) and found['loss_stderr'] == pytest.approx(0)


def test_loss_by_position_is_over_windows_that_have_every_position(tmp_path):
  (tmp_path / 'text.jsonl').write_text(''.join(json.dumps({'text': 'é' * n}) + '\n' for n in (99, 10, 205)))
  found = scores('loss_by_position', Knowing(''), data=tmp_path, tokens=(20, 100))
  assert (found['samples'], found['loss'], found['loss_stderr']) == (2, 50, 0)  # of the third text; the model's loss falls from 99.5 by 1
  expected = {name: 100 - (int(name.split('-')[0]) + int(name.split('-')[1])) / 2 + 0.5 for name in found['by_position']}
  assert {name: bin['loss'] for name, bin in found['by_position'].items()} == pytest.approx(expected)
  assert list(expected) == ['1-1', '2-2', '3-3', '4-5', '6-7', '8-10', '11-15', '16-22', '23-31', '32-44', '45-63', '64-100']
  assert [position.bins(n)[-1] for n in (1, 2, 5, 64, 90)] == [(1, 1), (1, 2), (3, 5), (45, 64), (64, 90)]
  with pytest.raises(ConfigError, match='task loss_by_position: no text has 300 tokens, the longest has 205; give shorter'):
    scores('loss_by_position', Knowing(''), data=tmp_path, tokens=(300,), context=400)


def test_synthetic_tasks():
  class Reader(Knowing):
    def write(self, requests):
      return [self.read(request.context) for request in requests]

    def read(self, context):
      name = context.rpartition('The number of ')[2].removesuffix(' is')
      return f' {context.partition(f"{name}: ")[2][:7]}\nand more'.split('\n')[0]

  found = scores('phonebook', Reader(''), samples=10, tokens=(300, 900))
  assert (found['acc'], found['digits'], found['samples']) == (1, 1, 20)
  assert list(found['by_length']) == ['300', '900'] and found['by_length']['900']['samples'] == 10
  depths = [depth for of in found['by_length'].values() for depth in of['acc_by_depth'] if depth is not None]
  assert set(depths) == {1}
  nothing = scores('phonebook', Knowing(' 0000000'), samples=10, tokens=(300,))
  assert nothing['acc'] == 0 and nothing['digits'] < 0.5
  assert scores('niah_multivalue', Knowing('nothing'), samples=3, tokens=(900,))['acc'] == 0
  assert scores('copy', Knowing('x'), samples=3, tokens=(50,))['acc'] == 1  # which says that all is the likeliest
  assert set(synthetic.NAMES) <= set(evaluate.task_names())


def test_a_drawn_part_of_a_file_is_the_same_every_time(tmp_path):
  (tmp_path / 'text.jsonl').write_text(''.join(json.dumps({'text': 'x' * n}) + '\n' for n in range(1, 100)))
  first, again, other = (evaluate.prepare('text', Knowing(''), evaluate.Options(tmp_path, samples=10, seed=seed)) for seed in (0, 0, 1))
  assert [s.requests for s in first.samples] == [s.requests for s in again.samples] != [s.requests for s in other.samples]
  assert len({s.requests for s in first.samples}) == 10


def test_answers_come_in_the_order_of_the_requests():
  found = ask(Knowing('b'), [Writing('x'), Continuation('a', ' b'), Rolling('abc'), Continuation('a', ' c')])
  assert [getattr(answer, 'logp', answer) for answer in found] == ['b', -1.0, -6.0, -9.0]


@pytest.mark.parametrize(
  'content,message',
  [
    (None, r'no file .*piqa.jsonl; it is JSON lines with the columns goal, sol1, sol2, label'),
    ('', r'piqa.jsonl has no lines'),
    ('{', r'piqa.jsonl:1: not JSON'),
    ('[1]', r'piqa.jsonl:1: not an object; expected one with the columns goal'),
    ('{"goal": "x"}', r"piqa.jsonl:1: no column 'sol1'; expected goal, sol1"),
    ('\n{"goal": 1, "sol1": "", "sol2": "", "label": 0}', r"piqa.jsonl:2: column 'goal' is int, not str"),
    ('{"goal": "x", "sol1": "", "sol2": "", "label": 7}', r'piqa.jsonl: entry 1 cannot be asked: IndexError'),
  ],
)
def test_bad_files_are_one_line(tmp_path, content, message):
  if content is not None:
    (tmp_path / 'piqa.jsonl').write_text(content)
  with pytest.raises(ConfigError, match=message):
    scores('piqa', Knowing(''), data=tmp_path)


class Hub(types.ModuleType):
  """Stands for the package `datasets`, of which load_dataset is used."""

  def __init__(self, data):
    super().__init__('datasets')
    self.__spec__ = importlib.machinery.ModuleSpec('datasets', None)
    self.data, self.asked = data, []

  def load_dataset(self, path, config, split):
    self.asked.append((path, config, split))
    if path not in self.data:
      raise ConnectionError(f"Couldn't reach '{path}' on the Hub\nmore")
    return self.data[path]


def test_what_is_published_is_fetched_once(tmp_path, monkeypatch):
  hub = Hub({'cais/mmlu': [MMLU] * 2})
  monkeypatch.setitem(sys.modules, 'datasets', hub)
  options = {'cache': tmp_path, 'shots': 1}
  found = scores('mmlu', Knowing(' B'), **options)
  assert found['samples'] == 2 and hub.asked == [('cais/mmlu', 'all', 'test'), ('cais/mmlu', 'all', 'dev')]
  monkeypatch.setitem(sys.modules, 'datasets', None)  # it is there now
  assert scores('mmlu_cloze', Knowing(' B'), **options)['digest'] == found['digest'] and len(hub.asked) == 2
  assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob('*.jsonl')) == ['eval/mmlu/mmlu.jsonl', 'eval/mmlu_shots/mmlu_shots.jsonl']


def test_what_cannot_be_fetched_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'datasets', Hub({}))
  message = (r"task qa_2: the data set hotpotqa/hotpot_qa \(distractor, validation\) cannot be fetched \(ConnectionError: Couldn't reach "
             r"'hotpotqa/hotpot_qa' on the Hub\); get it where there is a network, as JSON lines in a file hotpot.jsonl, and give its folder as --data=FOLDER$")
  with pytest.raises(ConfigError, match=message):
    scores('qa_2', Knowing(''), cache=tmp_path)
  assert not list(tmp_path.rglob('*.jsonl')) and not (tmp_path / 'eval' / 'hotpot').exists()
  with pytest.raises(ConfigError, match='no file .*piqa.jsonl'):  # a folder is given: nothing is fetched
    scores('piqa', Knowing(''), data=tmp_path)


def test_every_file_of_a_task_has_a_published_name():
  files = {task.file for task in standard.TASKS.values()} | set(long.TASKS) | set(synthetic.QA_FILES.values())
  assert files == {name for name in fetching.PUBLISHED if not name.endswith('_shots')}


def test_bad_names_are_one_line(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(ConfigError, match="'arc' is no task; known: winogrande, piqa"):
    evaluate.check_tasks(['piqa', 'arc'], '--tasks')
  with pytest.raises(ConfigError, match='eval.tasks: none; give some of'):
    evaluate.check_tasks([], 'eval.tasks')
  with pytest.raises(ConfigError, match='task piqa: it is read from a folder; give it as --data=FOLDER'):
    scores('piqa', Knowing(''))
  with pytest.raises(ConfigError, match=r'task text: it is read from a folder; give it as --data=FOLDER \(or eval.data\)$'):
    scores('text', Knowing(''))
  with pytest.raises(ConfigError, match='task qa_2: no file .*hotpot.jsonl'):
    scores('qa_2', Knowing(''), data=tmp_path)
