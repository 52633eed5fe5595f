"""The commands of docs/clusters.md: what can be said of them without a cluster."""

import pathlib
import re
import shlex
import subprocess

import pytest
import yaml

import run
from lmscale.exit_codes import AGAIN, USER_ERROR
from lmscale.processes.cluster import Cluster, find_cluster

TEXT = (pathlib.Path(__file__).parents[1] / 'docs' / 'clusters.md').read_text()
SCRIPTS = re.findall(r'```sh\n(.*?)```', TEXT, re.DOTALL)
JOBSET = yaml.safe_load(re.search(r'```yaml\n(.*?)```', TEXT, re.DOTALL)[1])


@pytest.mark.parametrize('script', SCRIPTS)
def test_scripts_parse_and_their_run_py_flags_exist(script):
  subprocess.run(['bash', '-n'], input=script, text=True, check=True)
  commands = re.findall(r'run\.py((?:\\\n|[^\n"&])*)', script)
  assert commands
  for command in commands:
    flags, overrides = run.parse_flags(shlex.split(command.replace('$i', '1').replace('\\\n', ' ')))
    run.recipes.load(str(run.DEFAULT_CONFIG.parents[1] / (flags.config or run.DEFAULT_CONFIG)), overrides)


def test_the_jobset_starts_the_processes_it_says():
  (job,) = JOBSET['spec']['replicatedJobs']
  indexed = job['template']['spec']
  (container,) = indexed['template']['spec']['containers']
  flags, overrides = run.parse_flags(container['args'])
  run.recipes.load(str(run.DEFAULT_CONFIG.parents[1] / (flags.config or run.DEFAULT_CONFIG)), overrides)
  environ = {entry['name']: entry['value'] for entry in container['env']} | {'JOB_COMPLETION_INDEX': '3'}
  name = JOBSET['metadata']['name']
  assert find_cluster(vars(flags), environ) == Cluster(f'{name}-{job["name"]}-0-0.{name}:7777', 4, 3)
  assert indexed['completions'] == indexed['parallelism'] == 4 and indexed['completionMode'] == 'Indexed'
  never_again = indexed['podFailurePolicy']['rules'][0]['onExitCodes']['values']
  assert USER_ERROR in never_again and AGAIN not in never_again
