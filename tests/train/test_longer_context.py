"""A tiny model is extended to four times its context, as docs/long_context.md says; its numbers stand there."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
BASE, LONG = 128, 512  # tokens
YARN = {'kind': 'yarn', 'factor': '4', 'length': str(BASE), 'turns': '[1, 32]'}


def run(*argv: str) -> None:
  # conftest's XLA_FLAGS trade speed for compile time.
  environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
  done = subprocess.run([sys.executable, *argv], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]


def train(folder: pathlib.Path, *flags: str) -> None:
  loop = ['--config.loop.eval_every=0', '--config.data.validation=0.02', f'--config.data.tokenizer={folder.parent / "tokenizer.json"}']
  run('run.py', '--config=configs/small_study.py:arch=rope', f'--workdir={folder}', *loop, *flags)


def books(size: str) -> str:
  return f'--config.data.sources={json.dumps([{"name": "books", "kind": "synthetic", "path": f"phonebook_all:{size}:20000"}])}'


def right(folder: pathlib.Path, *flags: str) -> dict[str, float]:
  """{tokens: share of the numbers that are right}"""
  run('run.py', '--job=eval', f'--workdir={folder}', '--tasks=phonebook_all', f'--lengths={BASE},{LONG}', '--samples=200', *flags)
  (found,) = folder.glob('eval/*/results.json')
  lengths = json.loads(found.read_text())['tasks']['phonebook_all']['by_length']
  return {n: of['acc'] for n, of in lengths.items()}


@pytest.mark.slow
def test_a_model_with_rope_finds_numbers_in_books_of_four_times_the_length_after_a_short_training(tmp_path):
  run('tools/train_tokenizer.py', '--input=stdlib:prose', '--input=synthetic:phonebook:256-1024:2000', '--vocab=1024', f'--out={tmp_path / "tokenizer.json"}')
  train(tmp_path / 'base', books('230-320'), f'--config.train.seq_len={BASE}', '--config.train.batch=2', '--config.train.microbatch=2',
        '--config.train.steps=8000')  # fmt: skip
  before = right(tmp_path / 'base')
  scaling = [f'--config.model.rope_scaling.{name}={value}' for name, value in YARN.items()]
  train(tmp_path / 'long', books('900-1280'), f'--config.train.seq_len={LONG}', '--config.train.steps=700', '--config.optimizer.learning_rate=1e-3',
        '--config.optimizer.min_learning_rate=1e-4', f'--config.train.init_from={tmp_path / "base"}', *scaling)  # fmt: skip
  after = right(tmp_path / 'long')
  print(before, after)
  assert before[str(BASE)] > 0.5 and after[str(LONG)] > before[str(LONG)] + 0.2
