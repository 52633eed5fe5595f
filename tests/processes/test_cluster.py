"""How processes find each other."""

import pytest

from lmscale.errors import ConfigError
from lmscale.processes.cluster import Cluster, find_cluster

SLURM = {
  'SLURM_JOB_ID': '70001', 'SLURM_STEP_NODELIST': 'node[007-008,020],login1', 'SLURM_STEP_NUM_TASKS': '4',
  'SLURM_PROCID': '3', 'SLURM_LOCALID': '1', 'SLURM_NODEID': '1', 'SLURM_STEP_TASKS_PER_NODE': '2(x2)',
}  # fmt: skip
ENVIRONMENT = {'JAX_COORDINATOR_ADDRESS': 'host:1234', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '1'}


def flags(coordinator=None, processes=None, process=None):
  return {'coordinator': coordinator, 'processes': processes, 'process': process, 'job': 'train'}


@pytest.mark.parametrize(
  ('given', 'environ', 'found'),
  [
    (flags(), {}, None),
    (flags('h:1', 2, 1), {**ENVIRONMENT, **SLURM}, Cluster('h:1', 2, 1)),  # flags come first
    (flags('[::1]:80', 2, 0), {}, Cluster('[::1]:80', 2, 0)),
    (flags('h:1', 1, 0), {}, None),
    (flags(), {**ENVIRONMENT, **SLURM}, Cluster('host:1234', 2, 1)),  # then variables
    (flags(), {'COORDINATOR_ADDRESS': 'h:1', 'NUM_PROCESSES': '3', 'PROCESS_ID': '0'}, Cluster('h:1', 3, 0)),
    (flags(), {'COORDINATOR_ADDRESS': 'h:1', 'NUM_PROCESSES': '3', 'JOB_COMPLETION_INDEX': '2'}, Cluster('h:1', 3, 2)),
    (flags(), {'JOB_COMPLETION_INDEX': '2'}, None),  # any Indexed Job
  ],
)
def test_flags_and_variables(given, environ, found):
  assert find_cluster(given, environ) == found


@pytest.mark.parametrize(
  ('change', 'found'),
  [
    ({}, Cluster('node007:61809', 4, 3)),
    ({'CUDA_VISIBLE_DEVICES': '0,1'}, Cluster('node007:61809', 4, 3, (1,))),  # two tasks share a node's devices
    ({'CUDA_VISIBLE_DEVICES': '1'}, Cluster('node007:61809', 4, 3)),  # Slurm has shared them out
    ({'CUDA_VISIBLE_DEVICES': '0,1', 'SLURM_STEP_TASKS_PER_NODE': '3,1'}, Cluster('node007:61809', 4, 3)),
    ({'SLURM_STEP_NODELIST': 'a1,b2'}, Cluster('a1:61809', 4, 3)),
    ({'SLURM_STEP_NODELIST': 'gpu-4'}, Cluster('gpu-4:61809', 4, 3)),
    ({'SLURM_STEP_NODELIST': 'n[1,3-4]'}, Cluster('n1:61809', 4, 3)),
    ({'JAX_COORDINATOR_PORT': '99'}, Cluster('node007:99', 4, 3)),
    ({'SLURM_STEP_NUM_TASKS': '1'}, None),
    ({'SLURM_STEP_NODELIST': ''}, None),  # in the batch script, outside of srun
  ],
)
def test_slurm(change, found):
  assert find_cluster(flags(), {**SLURM, **change}) == found


@pytest.mark.parametrize(
  ('given', 'environ', 'words'),
  [
    (flags('h:1'), {}, ['--coordinator=h:1', 'without --processes and --process']),
    (flags(processes=2, process=1), {}, ['--processes=2', 'without --coordinator']),
    (flags('h:1', 2, 2), {}, ['--process: 2', '0..1']),
    (flags('h:1', 0, 0), {}, ['--processes: 0']),
    (flags('h', 2, 0), {}, ['--coordinator', "'h'", 'HOST:PORT']),
    (flags(), {'JAX_COORDINATOR_ADDRESS': 'h:1'}, ['without JAX_NUM_PROCESSES and JAX_PROCESS_ID']),
    (flags(), {'NUM_PROCESSES': '2', 'PROCESS_ID': '0'}, ['NUM_PROCESSES=2', 'without JAX_COORDINATOR_ADDRESS']),
    (flags(), {**ENVIRONMENT, 'JAX_NUM_PROCESSES': 'two'}, ['JAX_NUM_PROCESSES', "'two'"]),
    (flags(), {**SLURM, 'SLURM_PROCID': 'x'}, ['SLURM_PROCID', "'x'"]),
  ],
)
def test_half_given_settings(given, environ, words):
  with pytest.raises(ConfigError) as caught:
    find_cluster(given, environ)
  for word in words:
    assert word in str(caught.value)
