"""The batch ramp and the learning rate against figures worked out by hand and a plain loop."""

import dataclasses
import random

import pytest

from lmscale.config import Config, OptimizerConfig, TrainConfig
from lmscale.train.schedule import Schedule, StepInputs, learning_rate

MT_NLG = Config(
  train=TrainConfig(steps=80000, batch=1920, seq_len=2048, ramp_start=32, ramp_increment=32, ramp_tokens=12 * 10**9),
  optimizer=OptimizerConfig(
    schedule='cosine',
    learning_rate=5e-5,
    min_learning_rate=5e-6,
    warmup_tokens=10**9,
    decay_tokens=340 * 10**9,
  ),
)


def config(train=None, **optimizer):
  return Config(train=TrainConfig(**(train or {})), optimizer=OptimizerConfig(**optimizer))


def test_no_ramp_counts_samples_and_tokens():
  schedule = Schedule(config({'steps': 10, 'batch': 8, 'seq_len': 256}, learning_rate=1.0, schedule='constant'))
  assert schedule.inputs(3) == StepInputs(step=3, first_sample=24, batch=8, tokens=24 * 256, learning_rate=1.0)
  assert (schedule.steps, schedule.total_samples, schedule.total_tokens) == (10, 80, 80 * 256)


def test_mt_nlg_ramp_by_hand():
  """59 levels of 12e9 / 59 / 2048 = 99311.4 samples: 3104 steps at 32, the next level crosses at 198622.9."""
  schedule = Schedule(MT_NLG)
  assert schedule.inputs(0) == StepInputs(0, 0, 32, 0, pytest.approx(5e-5 * 32 * 2048 / 1e9))
  assert (schedule.inputs(3103).batch, schedule.inputs(3104).batch) == (32, 64)
  assert schedule.inputs(3104).first_sample == 3104 * 32 == 99328
  second = -(-(198623 - 99328) // 64)  # 1552 steps of 64
  assert (schedule.inputs(3104 + second - 1).batch, schedule.inputs(3104 + second).batch) == (64, 96)
  sizes = {schedule.inputs(step).batch for step in range(20000)}
  assert sizes == set(range(32, 1921, 32))
  full = next(step for step in range(20000) if schedule.inputs(step).batch == 1920)
  tokens = schedule.inputs(full).tokens
  assert 12e9 <= tokens < 12e9 + 1888 * 2048
  assert 14450 < full < 14550  # 3103.5 * (1 + 1/2 + ... + 1/59) = 14472, and about half a step per level
  assert schedule.inputs(79999).batch == 1920


def test_ramp_equals_a_plain_loop_in_any_order():
  """The Megatron rule, step by step in Python: level = consumed * levels // ramp."""
  rng = random.Random(0)
  for _ in range(50):
    start, increment, levels = rng.randint(1, 9), rng.randint(1, 7), rng.randint(1, 12)
    seq_len, ramp = rng.randint(1, 33), rng.randint(1, 20000)
    train = TrainConfig(steps=300, batch=start + increment * levels, seq_len=seq_len, ramp_start=start,
                        ramp_increment=increment, ramp_tokens=ramp)  # fmt: skip
    schedule = Schedule(Config(train=train))
    expected, sample = [], 0
    for _ in range(300):
      level = min(levels, sample * seq_len * levels // ramp)
      expected.append((sample, start + level * increment, sample * seq_len))
      sample += start + level * increment
    steps = list(range(300))
    rng.shuffle(steps)
    for step in steps:
      plan = schedule.inputs(step)
      assert (plan.first_sample, plan.batch, plan.tokens) == expected[step]
    assert schedule.total_samples == sample


def test_warm_up_and_cosine_by_hand():
  schedule = config(schedule='cosine', learning_rate=1.0, min_learning_rate=0.1, warmup_tokens=100).optimizer
  rate = {tokens: learning_rate(schedule, tokens, 1100) for tokens in (1, 50, 100, 350, 600, 850, 1100, 5000)}
  half = 0.5**0.5
  assert rate == {
    1: 0.01,
    50: 0.5,
    100: 1.0,
    350: pytest.approx(0.55 + 0.45 * half),
    600: pytest.approx(0.55),  # halfway between peak and minimum at mid-cosine
    850: pytest.approx(0.55 - 0.45 * half),
    1100: 0.1,
    5000: 0.1,
  }


def test_mt_nlg_learning_rate():
  optimizer = MT_NLG.optimizer
  assert learning_rate(optimizer, 5 * 10**8, 0) == pytest.approx(2.5e-5)
  assert learning_rate(optimizer, 10**9, 0) == 5e-5
  assert learning_rate(optimizer, 1705 * 10**8, 0) == pytest.approx(2.75e-5)  # the middle of 1B .. 340B
  assert learning_rate(optimizer, 340 * 10**9, 0) == 5e-6


def test_wsd_is_stable_then_linear():
  optimizer = config(schedule='wsd', learning_rate=1.0, min_learning_rate=0.2, warmup_tokens=10, decay_tokens=1000,
                     wsd_decay_tokens=400).optimizer  # fmt: skip
  rate = [learning_rate(optimizer, tokens, 9999) for tokens in (5, 10, 300, 600, 700, 800, 1000, 2000)]
  assert rate == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.8, 0.6, 0.2, 0.2])


def test_constant_only_warms_up():
  optimizer = config(schedule='constant', learning_rate=3.0, min_learning_rate=0.1, warmup_tokens=4).optimizer
  assert [learning_rate(optimizer, tokens, 8) for tokens in (2, 4, 8, 100)] == [1.5, 3.0, 3.0, 3.0]


def test_rate_is_that_of_the_tokens_after_the_step_and_ends_at_the_minimum():
  base = config({'steps': 4, 'batch': 1, 'seq_len': 25}, schedule='cosine', learning_rate=1.0, min_learning_rate=0.0,
                warmup_tokens=50)  # fmt: skip
  rates = [Schedule(base).inputs(step).learning_rate for step in range(4)]
  assert rates == pytest.approx([0.5, 1.0, 0.5, 0.0])
  longer = dataclasses.replace(base, train=dataclasses.replace(base.train, steps=6))
  assert Schedule(longer).inputs(3).learning_rate == pytest.approx(0.5)
