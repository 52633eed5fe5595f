"""Every task at any length: the answer is in the text, the text fits, and the same arguments give the same text."""

import collections
import hashlib
import re

import pytest

from lmscale.data.synthetic import counting, needles, words
from lmscale.data.synthetic.dice import Dice
from lmscale.data.synthetic.example import Material
from lmscale.data.synthetic.tasks import TASKS, make_example
from lmscale.errors import ConfigError

TEXT = ' '.join(f'Sentence {i} of the essay says nothing of interest.' for i in range(4000))
QUESTIONS = [((f'In {i} the town of T{i} was founded by F{i}. ' * 3,), f'Who founded T{i}?', (f'F{i}', f'Mr F{i}')) for i in range(900)]
MATERIAL = Material(TEXT, {'qa_1': QUESTIONS, 'qa_2': [(own + QUESTIONS[0][0], q, a) for own, q, a in QUESTIONS[1:]]})
COUNTS = {'bytes': lambda text: len(text.encode()), 'words': lambda text: len(re.findall(r'\w+|[^\w\s]', text))}


def make(task, tokens, index=0, seed=0, count='bytes'):
  return make_example(task, seed, index, tokens, COUNTS[count], MATERIAL)


@pytest.mark.parametrize('count', COUNTS)
@pytest.mark.parametrize('task', TASKS)
def test_a_task_fits_its_length_and_nearly_fills_it(task, count):
  if (task, count) == ('copy', 'words'):
    return  # one word, however long
  for tokens in (2500, 9000):
    for index in range(3):
      example = make(task, tokens, index, count=count)
      used = COUNTS[count](f'{example.prompt} {example.answer}')
      assert 0.95 * tokens - 200 <= used <= tokens, (tokens, index)


@pytest.mark.parametrize('task', [name for name in TASKS if name not in ('copy', 'mqar', 'induction')])
def test_128k(task):
  if not task.startswith('qa_'):
    example = make(task, 131072)
    assert 0.95 * 131072 < len(example.prompt) < 131072


def test_the_same_arguments_give_the_same_text_and_others_do_not():
  for task in TASKS:
    texts = [make(task, 3000, index, seed).text for seed, index in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert texts[0] == texts[1] and len(set(texts)) == 3, task


def test_no_version_changes_what_is_drawn():
  """tasks.VERSION must be raised where this changes."""
  texts = ''.join(make(task, 3000).text for task in TASKS)
  assert hashlib.sha256(texts.encode()).hexdigest()[:16] == 'f4cdb39dd579a05a'


@pytest.mark.parametrize('task', needles.TASKS)
def test_needles(task):
  kind = needles.TASKS[task]
  for index in range(20):
    example = make(task, 4000, index)
    found = re.findall(r'The secret (?:number|code) of (\S+) is ([\w-]+)\.', example.prompt)
    of_key = collections.defaultdict(list)
    for key, value in found:
      of_key[key].append(value)
    asked = re.search(r' of (\S+(?:, \S+)*(?: and \S+)?) in this text', example.prompt)[1].replace(' and ', ', ').split(', ')
    assert len(asked) == kind.asked
    assert sorted(example.answers) == sorted(value for key in asked for value in of_key[key])  # and no second value of a key
    if kind.haystack != 'lines':
      assert len(found) == kind.keys * kind.values


def test_needles_are_at_all_depths():
  depths = [make('niah_single_2', 6000, index).facts['depth'] for index in range(200)]
  assert min(depths) < 0.05 and max(depths) > 0.95
  counts = collections.Counter(int(4 * min(depth, 0.999)) for depth in depths)
  assert all(30 < counts[quarter] < 70 for quarter in range(4))


def test_a_chain_is_followed():
  for index in range(10):
    example = make('vt', 2500, index)
    text = example.prompt.split('\n\n')[-2]
    value = re.search(r'Which names are (\d+)\?', example.prompt.split('\n\n')[-1])[1]
    names = re.findall(rf'Let (\w+) be {value}\.', text)
    for _ in range(4):
      names += re.findall(rf'Let (\w+) be what {names[-1]} is\.', text)
    assert tuple(names) == example.answers


def test_counted_words():
  for tokens, often, seldom in ((3000, *counting.SELDOM), (9000, *counting.OFTEN)):
    example = make('cwe', tokens)
    counts = collections.Counter(re.findall(r'\d+\. (\S+)', example.prompt.split('\n\n')[-2]))
    assert {word for word, count in counts.items() if count == often} == set(example.answers)
    assert {count for word, count in counts.items() if word not in example.answers} == {seldom}
  example = make('fwe', 9000)
  counts = collections.Counter(example.prompt.split('\n\n')[1].split())
  assert [word for word, _ in counts.most_common(4)] == [counting.NOISE, *example.answers]
  assert counts[counting.NOISE] / counts[example.answers[0]] == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize('task', ['phonebook', 'phonebook_reversed', 'phonebook_all'])
def test_phone_books(task):
  example = make(task, 4000)
  book = dict(re.findall(r'^(.+): (\d{7})$', example.prompt, re.MULTILINE))
  assert len(book) == example.facts['entries'] > 50
  *shown, (asked, _) = re.findall(r'The number of (.+?) is ?(\d{7})?$', example.prompt, re.MULTILINE)
  assert [book[name] for name, _ in shown] == [number for _, number in shown]
  assert len({name for name, _ in shown}) == len(shown) == (len(book) - 1 if task == 'phonebook_all' else 2)
  assert example.answers == (book[asked],) and asked not in dict(shown)
  assert (asked in example.prompt.split('\n\n')[0]) is (task == 'phonebook_reversed')


def test_recall():
  copied = make('copy', 100)
  assert copied.prompt == f'{copied.answers[0]} |'
  example = make('induction', 500)
  *before, last = example.prompt.split()
  assert before[before.index(last) + 1] == example.answers[0] and before.count(last) == 1
  pairs, queries = make('mqar', 3000).prompt.split(' | ')
  pairs, queries = pairs.split(), queries.split()
  known = dict(zip(pairs[::2], pairs[1::2], strict=True))
  assert len(known) == len(pairs) // 2 == make('mqar', 3000).facts['pairs']
  assert all(known[key] == value for key, value in zip(queries[:-1:2], queries[1::2], strict=True))
  assert known[queries[-1]] == make('mqar', 3000).answers[0]


def test_questions_are_answered_by_their_passage():
  example = make('qa_2', 5000)
  assert not example.every and any(answer in example.prompt for answer in example.answers)
  assert example.prompt.count('Passage ') == example.facts['passages'] > 10
  with pytest.raises(ConfigError, match=r'task qa_1: 1000000 tokens are asked for and all 900 passages have \d+; give more'):
    make('qa_1', 1_000_000)


def test_what_cannot_be_is_said():
  with pytest.raises(ConfigError, match=r'task cwe: 300 tokens are too few: its shortest prompt and answer need \d{4}'):
    make('cwe', 300)
  for task in TASKS:
    if task not in ('copy', 'induction', 'mqar'):
      with pytest.raises(ConfigError, match=f'task {task}: 60 tokens are too few'):
        make(task, 60)
  with pytest.raises(ConfigError, match='task niah_single_2: it hides sentences in a text and there is none'):
    make_example('niah_single_2', 0, 0, 4000, len, Material())
  with pytest.raises(ConfigError, match='task qa_1: it needs questions with passages'):
    make_example('qa_1', 0, 0, 4000, len, Material())
  with pytest.raises(ConfigError, match="task 'niah': unknown; known: niah_single_1, "):
    make_example('niah', 0, 0, 4000, len, Material())


def test_words_and_names_are_different():
  assert len(set(words.pairs(Dice(0), 30_000))) == 30_000
  assert len(set(words.names(Dice(0), 50_000))) == 50_000


def test_dice():
  dice = Dice('a', 1)
  drawn = [dice.below(6) for _ in range(6000)]
  assert all(850 < drawn.count(side) < 1150 for side in range(6))
  assert sorted(dice.shuffled(range(50))) == list(range(50)) != dice.shuffled(range(50))
  for n, sides in ((5, 5), (3, 1000), (0, 3)):
    found = dice.distinct(n, sides)
    assert len(set(found)) == n and all(0 <= i < sides for i in found)
  assert re.fullmatch(r'[1-9]\d{6}', dice.number(7))
  assert Dice('a', 1).split('b').below(1 << 40) == Dice('a', 1, 'b').below(1 << 40) != Dice('a', 1).below(1 << 40)
