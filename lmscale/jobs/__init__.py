"""What run.py can be asked to do: one module per job, each with `run(config, flags)`, which returns the exit code."""

import argparse
import dataclasses
import importlib
from collections.abc import Callable

from lmscale.config import Config


@dataclasses.dataclass(frozen=True)
class Job:
  """A job as the command line needs to know it. together: several processes make one run. json: it can print JSON.
  trained: it uses the model in --workdir, whose config is the default. flags: those that only this job has."""

  help: str
  together: bool = False
  json: bool = False
  trained: bool = False
  flags: tuple[str, ...] = ()


# The first is the default; the module `lmscale.jobs.<name>` does the work and is imported when it is asked for.
JOBS = {
  'train': Job('train, or go on with the run in --workdir (the default)', together=True),
  'plan': Job(
    'print parameters, FLOPs and bytes per device and allocate nothing; mesh.data counts as 1 where the config leaves it open',
    json=True,
    flags=('svg', 'hardware', 'compile', 'suggest'),
  ),
  'generate': Job(
    'continue --prompt=TEXT, or each line of --prompts=FILE, with the model in --workdir', trained=True, flags=('prompt', 'prompts', 'out')
  ),
  'eval': Job(
    'score the model in --workdir on --tasks', trained=True, flags=('tasks', 'data', 'lengths', 'haystack', 'samples', 'shots', 'context')
  ),
}


def find(name: str) -> Callable[[Config, argparse.Namespace], int]:
  """`run` of a job's module: called with the config and all flags, it returns the exit code."""
  return importlib.import_module(f'lmscale.jobs.{name}').run
