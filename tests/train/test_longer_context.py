"""A tiny hybrid is extended to four times its context, as docs/long_context.md says; its numbers stand there."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
BASE, LONG = 256, 1024  # tokens of a context
ASKED = 128, 512  # tokens of a book: of those that are trained first, and of four times as many


def run(*argv: str) -> None:
  # conftest's XLA_FLAGS trade speed for compile time.
  environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
  done = subprocess.run([sys.executable, *argv], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]


def train(folder: pathlib.Path, size: str, *flags: str) -> None:
  """On books of so many bytes."""
  sources = json.dumps([{'name': 'books', 'kind': 'synthetic', 'path': f'phonebook_all:{size}:20000'}])
  data = [f'--config.data.tokenizer={folder.parent / "tokenizer.json"}', '--config.data.validation=0.02', f'--config.data.sources={sources}']
  model = ['--config=configs/small_study.py:arch=hybrid', '--config.model.pattern=M-M-M*-M-M-', '--config.loop.eval_every=0']
  run('run.py', f'--workdir={folder}', *model, *data, *flags)


def right(folder: pathlib.Path) -> dict[int, float]:
  """{tokens of the book: share of the numbers that are right}"""
  run('run.py', '--job=eval', f'--workdir={folder}', '--tasks=phonebook_all', f'--lengths={",".join(map(str, ASKED))}', '--samples=100')
  (found,) = folder.glob('eval/*/results.json')
  lengths = json.loads(found.read_text())['tasks']['phonebook_all']['by_length']
  return {int(n): of['acc'] for n, of in lengths.items()}


@pytest.mark.slow
def test_numbers_are_found_in_books_of_four_times_the_length_after_a_short_training(tmp_path):
  inputs = ('--input=stdlib:prose', '--input=synthetic:phonebook:256-1024:2000')
  run('tools/train_tokenizer.py', *inputs, '--vocab=1024', f'--out={tmp_path / "tokenizer.json"}')
  train(tmp_path / 'base', '230-320', f'--config.train.seq_len={BASE}', '--config.train.steps=7000', '--config.optimizer.warmup_tokens=12800')
  before = right(tmp_path / 'base')
  train(tmp_path / 'long', '900-1280', f'--config.train.seq_len={LONG}', '--config.train.steps=300', '--config.optimizer.learning_rate=1e-3',
        '--config.optimizer.min_learning_rate=1e-4', f'--config.train.init_from={tmp_path / "base"}')  # fmt: skip
  after = right(tmp_path / 'long')
  print(before, after)
  assert before[ASKED[0]] > 0.5 and after[ASKED[1]] > before[ASKED[1]] + 0.1
