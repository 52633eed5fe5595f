"""What people are told when memory runs out."""

import dataclasses

import pytest

from lmscale.config import Config, MeshConfig, TrainConfig
from lmscale.plan.advice import is_out_of_memory, memory_advice


def test_only_what_can_still_be_changed_is_named():
  all_of_it = memory_advice(Config(train=TrainConfig(microbatch=4, remat='none'), mesh=MeshConfig(data=8, tensor=2, zero=0)))
  for name in ('train.microbatch (now 4', 'train.loss_chunk', 'train.remat=selective or full', 'mesh.zero (now 0',
               'sequence_parallel', 'bfloat16', '--job=plan'):  # fmt: skip
    assert name in all_of_it
  config = Config(
    train=TrainConfig(loss_chunk=128, compute_dtype='bfloat16'),
    mesh=MeshConfig(data=8, tensor=2, zero=3, sequence_parallel=True),
  )
  assert memory_advice(config).startswith('use more devices')
  half = dataclasses.replace(config, train=dataclasses.replace(config.train, remat='selective'))
  assert memory_advice(half).startswith('set train.remat=full (now selective)')


@pytest.mark.parametrize(
  ('error', 'is_one'),
  [
    (MemoryError(), True), (RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes'), True),
    (RuntimeError('CUDA_ERROR_OUT_OF_MEMORY: out of memory'), True), (RuntimeError('INTERNAL: no'), False),
    (ValueError('RESOURCE_EXHAUSTED'), False),
  ],
)  # fmt: skip
def test_which_errors_are_about_memory(error, is_one):
  assert is_out_of_memory(error) == is_one
