"""Suggested meshes: what is known to be sensible, and that each can be had by its flags."""

import dataclasses
import pathlib

import pytest

import run
from lmscale.config import Config, ConfigError, check_mesh, fill_data, recipes
from lmscale.parallel.pipeline.layout import done_again
from lmscale.plan.hardware import HARDWARE
from lmscale.plan.rough import Rough
from lmscale.plan.suggest import EFFICIENCY, USABLE, estimate, format_suggestions, layouts, suggest

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


def load(spec: str, *flags: str) -> Config:
  return recipes.load(f'{CONFIGS}/{spec}', [tuple(flag.removeprefix('--config.').split('=')) for flag in flags])


def mesh(flags: list[str]) -> dict[str, int]:
  return {name: int(next(f for f in flags if f.startswith(f'--config.mesh.{name}=')).split('=')[1]) for name in ('pipe', 'data', 'tensor')}


def test_one_node_needs_no_pipeline():
  spec, h100 = 'mamba_study.py:arch=hybrid,size=8b', HARDWARE['H100']
  found = suggest(load(spec), h100, 8)
  assert mesh(found[0]['flags'])['pipe'] == 1
  assert [f['seconds'] for f in found] == sorted(f['seconds'] for f in found)
  assert len({tuple(mesh(f['flags']).values()) for f in found}) == len(found) > 1
  for suggestion in found:
    config = fill_data(load(spec, *suggestion['flags']), 8)
    check_mesh(config)
    assert config.mesh.size == 8
    assert estimate(config, h100) == {name: value for name, value in suggestion.items() if name != 'flags'}
    assert suggestion['bytes'] <= USABLE * h100.memory
    assert suggestion['seconds'] == pytest.approx(sum(suggestion['parts'].values())) and suggestion['mfu'] < EFFICIENCY
  text = format_suggestions(load(spec), h100, 8, found)
  assert '1. ' in text and ' '.join(found[0]['flags']) in text and 'within 90% of 80 GB' in text


def test_gpt3_on_a_thousand():
  """arXiv 2104.04473, section 5.1 trains it on 1,024 A100 with tensor 8 in a node, and a pipeline."""
  found = suggest(load('megatron_gpt.py:size=175b', '--config.train.batch=1536'), HARDWARE['A100'], 1024)
  meshes = [mesh(f['flags']) for f in found[:3]]
  assert meshes[0] == {'pipe': 8, 'data': 16, 'tensor': 8} and {'pipe': 4, 'data': 32, 'tensor': 8} in meshes
  assert found[2]['seconds'] < 1.02 * found[0]['seconds']
  assert all('--config.mesh.vocab_on_pipe=true' in f['flags'] for f in found)  # a head of 51,200 in one stage of eight costs more
  assert all(mesh(f['flags'])['tensor'] <= 8 for f in found)  # never across nodes


def test_where_memory_is_short_some_microbatches_are_stored():
  """530B on the 280 A100 of arXiv 2205.05198, table 5: with `tensor` 4 not all microbatches in flight fit as `selective` keeps them."""
  spec = 'megatron_gpt.py:size=530b', '--config.train.batch=280'
  a100 = HARDWARE['A100']
  flags = '--config.mesh.tensor=4', '--config.mesh.sequence_parallel=true'
  none = fill_data(load(*spec, *flags), 280)
  stored = Rough(none, a100, EFFICIENCY).stored(none, USABLE * a100.memory)
  some, more = (dataclasses.replace(none, train=dataclasses.replace(none.train, stored_microbatches=n)) for n in (stored, stored + 12))
  found = [estimate(config, a100) for config in (none, some, more)]
  assert found[0]['seconds'] > 1.05 * found[1]['seconds']
  assert found[1]['bytes'] <= USABLE * a100.memory < found[2]['bytes']
  assert 0 < done_again(some) < 1 == done_again(none)


def test_a_small_model_is_cut_by_data_alone():
  found = suggest(load('mamba_study.py:arch=transformer,size=130m'), HARDWARE['H200'], 16)
  assert mesh(found[0]['flags']) == {'pipe': 1, 'data': 16, 'tensor': 1}


def test_every_layout_is_allowed():
  tried = list(layouts(load('mamba_study.py:arch=mamba2,size=130m'), 12))
  assert len(tried) > 100 and len(set(tried)) == len(tried)
  for config in tried[::50]:
    check_mesh(config)
    assert config.mesh.size == 12


def test_what_cannot_be_is_said():
  h100 = HARDWARE['H100']
  with pytest.raises(ConfigError, match='does not fit on 8 H100: the smallest layout needs about .* GB'):
    suggest(load('megatron_gpt.py:size=1t'), h100, 8)
  with pytest.raises(ConfigError, match='no mesh of 67 devices divides .*train.batch: 256'):
    suggest(load('mamba_study.py:arch=mamba2,size=130m'), h100, 67)
  with pytest.raises(ConfigError, match='train.compute_dtype is float32'):
    suggest(load('quickstart.py'), h100, 8)
  with pytest.raises(ConfigError, match='--suggest: 0 devices'):
    suggest(load('quickstart.py'), h100, 0)


def test_a_plan_that_does_not_fit_says_what_would(capsys):
  flags = ['tensor=1', 'data=8', 'sequence_parallel=false', 'zero=0']
  config = f'--config={CONFIGS}/mamba_study.py:arch=hybrid,size=8b'
  assert run.main(['--job=plan', '--hardware=H100', config, *(f'--config.mesh.{flag}' for flag in flags)]) == 0
  assert 'does not fit in 80 GB\nThis does not fit. ' in (out := capsys.readouterr().out)
  assert ' GB a device with --config.mesh.pipe=1 --config.mesh.data=' in out
