"""Under which settings, and with which data, a run is the run that was started."""

import dataclasses
import json
import random

import pytest

from lmscale import config as config_lib
from lmscale.config import Config, OptimizerConfig, TrainConfig
from lmscale.errors import ConfigError
from lmscale.train.resume import about, check_config, check_identity, check_run
from lmscale.train.schedule import Schedule, first_difference
from lmscale.train.workdir import Workdir


def change(config, path, value):
  head, _, rest = path.partition('.')
  return dataclasses.replace(config, **{head: change(getattr(config, head), rest, value) if rest else value})


def changed(config, fields):
  for path, value in fields.items():
    config = change(config, path, value)
  return config


BASE = Config(
  train=TrainConfig(steps=1000, batch=8, seq_len=16),
  optimizer=OptimizerConfig(schedule='wsd', warmup_tokens=100 * 128, wsd_decay_tokens=200 * 128),
)


def refusal(path, value, base):
  with pytest.raises(ConfigError) as caught:
    check_config(base, change(base, path, value), 10, 'W')
  return str(caught.value).splitlines()


@pytest.mark.parametrize(
  ('path', 'value'),
  [
    ('seed', 7), ('model.pattern', 'MM'), ('model.mamba2.state', 8), ('train.batch', 16), ('train.seq_len', 128),
    ('optimizer.learning_rate', 1e-4), ('optimizer.beta2', 0.9), 
    ('train.compute_dtype', 'bfloat16'), ('train.grad_dtype', 'bfloat16'),
  ],
)  # fmt: skip
def test_what_the_run_computes_may_not_change(path, value):
  base = change(Config(), 'optimizer.decay_tokens', 10**9)
  old = base
  for part in path.split('.'):
    old = getattr(old, part)
  lines = refusal(path, value, base)
  used = [line for line in lines if line.startswith('  step 1 of the 10 taken: ')]
  assert len(used) == (path in ('train.batch', 'optimizer.learning_rate'))
  assert [line for line in lines if line not in used] == [lines[0], f'  {path}: {json.dumps(old)} -> {json.dumps(value)}']
  assert lines[0].startswith('workdir W holds a run with other settings')


@pytest.mark.parametrize(
  ('path', 'value'),
  [
    ('name', 'b'), ('emulate', 8), ('mesh.zero', 3), ('mesh.tensor', 2), ('loop.eval_every', 1), ('data.cache', '/c'),
    ('train.microbatch', 2), ('train.remat', 'none'), ('train.stack', 'unrolled'), ('train.loss_chunk', 8),
    ('train.nonfinite_budget', 9), ('train.spike_skip', 20.0), ('train.spike_budget', 9),
  ],
)  # fmt: skip
def test_how_it_runs_may_change(path, value):
  assert check_config(BASE, change(BASE, path, value), 1000, 'W') == []


def test_a_wsd_run_may_be_lengthened_in_its_stable_part():
  longer = change(BASE, 'train.steps', 5000)
  assert check_config(BASE, longer, 800, 'W') == [
    'from step 801 on: train.steps: 1000 -> 5000',
    'from step 801 on: optimizer.decay_tokens: 128000 -> 640000 (0 means the end of the run; keep it by optimizer.decay_tokens=128000)',
  ]
  with pytest.raises(ConfigError) as caught:
    check_config(BASE, longer, 801, 'W')
  text = str(caught.value)
  assert 'train.steps: 1000 -> 5000' in text and 'keep it by optimizer.decay_tokens=128000' in text
  assert 'step 801 of the 801 taken: samples 6400..6407, learning rate 0.0009955 -> samples 6400..6407, learning rate 0.001' in text


@pytest.mark.parametrize(
  ('fields', 'taken', 'allowed'),
  [
    ({'optimizer.wsd_decay_tokens': 300 * 128}, 700, True),
    ({'optimizer.wsd_decay_tokens': 300 * 128}, 701, False),
    ({'optimizer.min_learning_rate': 0.0}, 800, True),
    ({'optimizer.min_learning_rate': 0.0}, 801, False),
    ({'optimizer.schedule': 'constant'}, 800, True),
    ({'optimizer.schedule': 'constant'}, 801, False),
    ({'optimizer.schedule': 'cosine'}, 100, True),
    ({'optimizer.schedule': 'cosine'}, 101, False),
    ({'optimizer.learning_rate': 2e-3, 'optimizer.warmup_tokens': 200 * 128}, 99, True),  # exactly the same warm-up
    ({'optimizer.learning_rate': 2e-3, 'optimizer.warmup_tokens': 200 * 128}, 101, False),
    ({'train.batch': 16}, 1, False),
    ({'train.steps': 900, 'optimizer.decay_tokens': 128_000}, 1000, True),
    ({'train.ramp_start': 4, 'train.ramp_increment': 4, 'train.ramp_tokens': 1280}, 1, False),
    ({'optimizer.clip': 2.0}, 1, False),
    ({'train.seq_len': 32, 'train.batch': 4}, 1, False),  # the same tokens, otherwise cut
  ],
)  # fmt: skip
def test_the_schedule_may_change_where_it_has_not_been_used(fields, taken, allowed):
  new = changed(BASE, fields)
  if allowed:
    check_config(BASE, new, taken, 'W')
    return
  with pytest.raises(ConfigError, match='holds a run with other settings'):
    check_config(BASE, new, taken, 'W')


def test_a_ramp_may_be_changed_above_where_it_is():
  ramp = {'train.ramp_start': 2, 'train.ramp_increment': 2, 'train.ramp_tokens': 30 * 16 * 3, 'optimizer.schedule': 'constant'}
  before = changed(BASE, ramp)
  after = changed(before, {'train.batch': 12, 'train.ramp_tokens': 30 * 16 * 5})
  first = Schedule(before)
  level = next(step for step in range(1000) if first.inputs(step).batch == 8)
  check_config(before, after, level, 'W')
  check_config(before, after, level + 1, 'W')
  other = changed(before, {'train.ramp_tokens': 30 * 16 * 3 + 16 * 12})
  with pytest.raises(ConfigError, match='step .* taken: samples'):
    check_config(before, other, level + 1, 'W')


def random_schedule(rng):
  train = {'steps': rng.randint(1, 60), 'batch': rng.choice([4, 8]), 'seq_len': 16}
  if rng.random() < 0.3:
    train |= {'ramp_start': 2, 'ramp_increment': 2, 'ramp_tokens': rng.choice([400, 900])}
  end, warmup = rng.choice([0, 1000, 3000]), rng.choice([0, 128, 512, 1000])
  optimizer = {'schedule': rng.choice(['cosine', 'wsd', 'constant']), 'decay_tokens': end, 'warmup_tokens': warmup}
  optimizer |= {'wsd_decay_tokens': rng.choice([200, 500]), 'min_learning_rate': rng.choice([0.0, 1e-4, 1e-3])}
  optimizer |= {'learning_rate': 1e-3 * (1 if warmup != 1000 else 2)}
  return Config(train=TrainConfig(**train), optimizer=OptimizerConfig(**optimizer))


def valid_schedules(rng, count):
  while count:
    config = random_schedule(rng)
    try:
      config_lib.validate(config)
    except ConfigError:
      continue
    count -= 1
    yield Schedule(config)


def test_the_first_difference_is_the_one_that_a_walk_finds():
  rng, found = random.Random(0), []
  for a, b in zip(valid_schedules(rng, 600), valid_schedules(rng, 600), strict=True):
    steps = rng.randint(1, 80)
    walked = next((step for step in range(steps) if a.inputs(step) != b.inputs(step)), None)
    assert first_difference(a, b, steps) == walked
    assert first_difference(a, a, steps) is None
    found.append(walked)
  assert sum(at is None for at in found) > 20 and len(set(found)) > 15


def test_ten_million_steps_are_compared_at_once(monkeypatch):
  long = changed(BASE, {'train.steps': 10**7, 'optimizer.wsd_decay_tokens': 128})
  a, b = Schedule(long), Schedule(change(long, 'train.steps', 2 * 10**7))
  calls = []
  inputs = Schedule.inputs
  monkeypatch.setattr(Schedule, 'inputs', lambda self, step: calls.append(step) or inputs(self, step))
  assert first_difference(a, b, 10**7 - 1) is None and len(calls) < 100
  assert first_difference(a, b, 10**7) == 10**7 - 1 and len(calls) < 200


def test_another_length_does_not_bring_another_warm_up_in_silence():
  began = changed(Config(), {'optimizer.schedule': 'constant', 'optimizer.warmup_tokens': 6144})
  longer = changed(began, {'train.steps': 200, 'optimizer.warmup_tokens': 12288})
  with pytest.raises(ConfigError) as caught:
    check_config(began, longer, 1, 'W')
  line, step = str(caught.value).splitlines()[1:]
  assert line.startswith('  optimizer.warmup_tokens: 6144 -> 12288 (') and line.endswith('keep it by optimizer.warmup_tokens=6144)')
  assert step.startswith('  step 1 of the 1 taken: ')
  check_config(began, change(longer, 'optimizer.warmup_tokens', 6144), 1, 'W')


@pytest.mark.parametrize('other', ['wsd', 'cosine'])
def test_another_schedule_is_told_without_advice_about_the_field_that_only_one_reads(other):
  for pair in (('constant', other), (other, 'constant')):
    old, new = (change(BASE, 'optimizer.schedule', schedule) for schedule in pair)
    with pytest.raises(ConfigError) as caught:
      check_config(old, new, 1000, 'W')
    assert str(caught.value).splitlines()[1:-1] == [f'  optimizer.schedule: "{pair[0]}" -> "{pair[1]}"']


def test_data_identity():
  check_identity({'a': [1, {'b': 'x'}]}, {'a': (1, {'b': 'x'})}, 'W')
  with pytest.raises(ConfigError, match='other data') as caught:
    check_identity({'a': [1, {'b': 'x'}]}, {'a': [1, {'b': 'y'}]}, 'W')
  assert str(caught.value).splitlines()[1:] == ['  a.1.b: "x" -> "y"']
  with pytest.raises(ConfigError, match='identity: "x" -> "y"'):
    check_identity('x', 'y', 'W')


SOURCES = [{'name': 'a', 'weight': 0.75, 'content': 'aa'}, {'name': 'b', 'weight': 0.25, 'content': 'bb'}]
DATA = {'tokenizer': 'bytes-v1', 'sources': SOURCES, 'seq_len': 16, 'seed': 0}


def with_source(i, **fields):
  sources = [dict(source) for source in SOURCES]
  sources[i] |= fields
  return DATA | {'sources': sources}


def test_sources_may_be_called_something_else_and_lie_elsewhere():
  check_identity(DATA, with_source(1, name='moved'), 'W')
  check_identity(with_source(0, name='sources.0.name'), DATA, 'W')
  for other in (with_source(0, content='ab'), with_source(1, weight=0.3), DATA | {'sources': SOURCES[::-1]}, DATA | {'tokenizer': 'x'}):
    with pytest.raises(ConfigError, match='other data than it would read now'):
      check_identity(DATA, other, 'W')
  sources = tuple(config_lib.SourceConfig(name, 'text', f'{name}.txt') for name in 'ab')
  moved = tuple(config_lib.SourceConfig(f'{name}2', 'text', f'elsewhere/{name}.txt', weight=2.0) for name in 'ab')
  check_config(change(BASE, 'data.sources', sources), change(BASE, 'data.sources', moved), 10, 'W')
  with pytest.raises(ConfigError, match='data.validation'):
    check_config(BASE, change(BASE, 'data.validation', 0.5), 10, 'W')


def test_a_checkpoint_of_an_older_version_is_compared_with_the_schedule(tmp_path):
  plan, workdir = Schedule(BASE).inputs(3), Workdir(tmp_path, BASE)
  meta = about(BASE, plan, DATA)
  assert (meta['step'], meta['samples'], meta['tokens']) == (4, 32, 512)
  assert check_run(BASE, DATA, 4, meta, workdir) == [f'{tmp_path}/config.json is missing: the config kept in the checkpoint was used']
  del meta['config']
  assert check_run(BASE, DATA, 4, meta, workdir)[-1] == 'the settings could not be compared'
  with pytest.raises(ConfigError, match='with other batches:\n  samples: 32 -> 64\n  tokens: 512 -> 1024'):
    check_run(change(BASE, 'train.batch', 16), DATA, 4, meta, workdir)
  workdir.record()
  assert check_run(BASE, DATA, 4, meta, workdir) == []
  with pytest.raises(ConfigError, match='optimizer.beta2'):
    check_run(change(BASE, 'optimizer.beta2', 0.9), DATA, 4, meta, workdir)
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(ConfigError, match='config.json: written by another version of lmscale or damaged'):
    check_run(BASE, DATA, 4, meta, workdir)
