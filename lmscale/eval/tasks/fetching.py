"""Data sets by the names under which they are published, for tasks whose folder is not given. Needs the extra `eval`, and a network once."""

import importlib.util
import json
import pathlib
from typing import NamedTuple

from lmscale.data import atomic_folder
from lmscale.errors import ConfigError

FOLDER = 'eval'  # in the cache


class Published(NamedTuple):
  """Where a data set is on the Hugging Face hub, in the columns that its task reads. shots: the split that examples are shown of."""

  path: str
  config: str | None
  split: str
  shots: str = ''

  def __str__(self) -> str:
    return f'{self.path} ({", ".join(filter(None, (self.config, self.split)))})'


LONG = ('narrativeqa', 'qasper', 'multifieldqa_en', 'hotpotqa', '2wikimqa', 'musique', 'trec', 'triviaqa', 'samsum')
PUBLISHED = {
  'winogrande': Published('allenai/winogrande', 'winogrande_xl', 'validation', 'train'),
  'piqa': Published('baber/piqa', None, 'validation', 'train'),
  'hellaswag': Published('Rowan/hellaswag', None, 'validation', 'train'),
  'arc_easy': Published('allenai/ai2_arc', 'ARC-Easy', 'test', 'train'),
  'arc_challenge': Published('allenai/ai2_arc', 'ARC-Challenge', 'test', 'train'),
  'openbookqa': Published('allenai/openbookqa', 'main', 'test', 'train'),
  'mmlu': Published('cais/mmlu', 'all', 'test', 'dev'),
  'truthfulqa': Published('truthfulqa/truthful_qa', 'multiple_choice', 'validation'),
  'pubmedqa': Published('bigbio/pubmed_qa', 'pubmed_qa_labeled_fold0_source', 'test', 'train'),
  'race': Published('ehovy/race', 'high', 'test', 'train'),
  'nq_open': Published('google-research-datasets/nq_open', None, 'validation', 'train'),
  'squad_v2': Published('rajpurkar/squad_v2', None, 'validation', 'train'),
  'hotpot': Published('hotpotqa/hotpot_qa', 'distractor', 'validation'),
  **{name: Published('Xnhyacinth/LongBench', name, 'test') for name in LONG},
}
PUBLISHED |= {f'{name}_shots': of._replace(split=of.shots) for name, of in PUBLISHED.items() if of.shots}


def fetched(name: str, task: str, cache: pathlib.Path) -> pathlib.Path:
  """The folder that has NAME.jsonl: in the cache, where it is put once, whole.

  Raises:
    ConfigError: nobody publishes it, the package `datasets` is not installed, or it cannot be fetched.
  """
  give = f'task {task}: it is read from a folder; give it as --data=FOLDER (or eval.data)'
  if name not in PUBLISHED:
    raise ConfigError(give)
  folder, source = cache / FOLDER / name, PUBLISHED[name]
  if not folder.is_dir() and importlib.util.find_spec('datasets') is None:
    raise ConfigError(f"{give}, or have {source} fetched: pip install -e '.[eval]'")

  def build(empty: pathlib.Path) -> None:
    try:
      _fetch(source, empty / f'{name}.jsonl')
    except Exception as error:  # of whatever kind: the network's, the hub's, the data set's
      reason = (str(error).splitlines() or [''])[0][:200]
      raise ConfigError(
        f'task {task}: the data set {source} cannot be fetched ({type(error).__name__}: {reason}); get it where there is a network, '
        f'as JSON lines in a file {name}.jsonl, and give its folder as --data=FOLDER'
      ) from error

  return atomic_folder.ensure(folder, build, lambda built: (built / f'{name}.jsonl').open('rb').close() or built)


def _fetch(source: Published, path: pathlib.Path) -> None:
  import datasets  # slow to import

  rows = datasets.load_dataset(source.path, source.config, split=source.split)
  with path.open('w', encoding='utf-8') as file:
    file.writelines(json.dumps(row) + '\n' for row in rows)
