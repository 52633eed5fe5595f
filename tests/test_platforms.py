"""The step is lowered for accelerators that are not there: every layer kind, ZeRO 0 to 3, with and without sequence parallelism.

Lowering runs every rule that is the platform's own, and leaves the compiler to the machine that has the device.
"""

import re

import pytest
import tiny
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from lmscale.config import Mamba2Config, MeshConfig
from lmscale.train.program import Program

KINDS = {'transformer': '*-', 'mamba': 'm', 'mamba2': 'M', 'hybrid': 'M*-'}
PLATFORMS = ('cuda', 'tpu')


def lower(kind, zero, sequence_parallel):
  """The lowered text of one bfloat16 step on data 2 * tensor 4, by platform."""
  model = tiny.change(tiny.MODEL, pattern=KINDS[kind])
  mesh = MeshConfig(pipe=1, data=2, tensor=4, zero=zero, sequence_parallel=sequence_parallel)
  program = Program(tiny.config(mesh, model, compute_dtype='bfloat16', batch=8, microbatch=2))
  return {platform: program.lower_step(platform).as_text() for platform in PLATFORMS}


def check(texts):
  for platform, text in texts.items():
    assert 'mhlo.num_partitions = 8' in text
    products = re.findall(r'stablehlo\.dot_general.*-> tensor<[^>]*x(\w+)>', text)
    assert 'bf16' in products  # the compute dtype reached the matrix units
    assert 'f64' not in text
    assert not re.search(r'custom_call @\w*(cpu|lapack|xla_python)', text), platform  # nothing of the host's


@pytest.mark.parametrize(
  ('kind', 'zero', 'sequence_parallel'),
  [('transformer', 0, False), ('mamba', 1, True), ('mamba2', 2, False), ('hybrid', 3, True)],
)
def test_the_step_is_lowered_for_gpu_and_tpu(kind, zero, sequence_parallel):
  check(lower(kind, zero, sequence_parallel))


def test_the_step_with_gpu_kernels_is_lowered_for_gpu(monkeypatch):
  """Mamba-2's own GPU kernels, forward and backward, cut over data and tensor: without a GPU nothing chooses them."""
  from jax._src.pallas.triton import pallas_call_registration

  if about_gpu := getattr(pallas_call_registration, 'gpu_info_lib', None):  # jax 0.11 asks which GPU it is
    with use_abstract_mesh(AbstractMesh((1,), ('x',), abstract_device=AbstractDevice('NVIDIA H200', 132, 'gpu'))):
      info = about_gpu.get_gpu_info()
    monkeypatch.setattr(about_gpu, 'get_gpu_info', lambda: info)
  mixer = Mamba2Config(heads=8, head_dim=16, groups=2, state=16, conv=4, implementation='pallas_triton')
  model = tiny.change(tiny.MODEL, pattern='M', mamba2=mixer)
  mesh = MeshConfig(pipe=1, data=2, tensor=4, zero=3, sequence_parallel=True)
  program = Program(tiny.config(mesh, model, compute_dtype='bfloat16', batch=8, microbatch=2))
  text = program.lower_step('cuda').as_text()
  check({'cuda': text})
  assert len(re.findall(r'custom_call @__gpu\$xla\.gpu\.triton', text)) >= 3


@pytest.mark.scale
@pytest.mark.parametrize('sequence_parallel', [False, True])
@pytest.mark.parametrize('zero', range(4))
@pytest.mark.parametrize('kind', KINDS)
def test_every_step_is_lowered_for_gpu_and_tpu(kind, zero, sequence_parallel):
  check(lower(kind, zero, sequence_parallel))
