"""How the processes of a run find each other.

Where a process reads how many there are, which one it is and where process 0 listens; the first that applies:

  flags          --coordinator=HOST:PORT --processes=N --process=I
  environment    JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES=N, JAX_PROCESS_ID=I, all also without `JAX_`;
                 in an Indexed Job or a JobSet of Kubernetes JOB_COMPLETION_INDEX is the process id
  Slurm          what srun sets (SLURM_JOB_ID, SLURM_STEP_NODELIST, SLURM_STEP_NUM_TASKS, SLURM_PROCID, ...)
  Cloud TPU      JAX asks the machine's metadata; on one host, too
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from lmscale.errors import ConfigError

SLURM_PORTS = range(61440, 65536)  # the job's number picks one, as in JAX
NAMES = {'coordinator': 'COORDINATOR_ADDRESS', 'processes': 'NUM_PROCESSES', 'process': 'PROCESS_ID'}


@dataclasses.dataclass(frozen=True)
class Cluster:
  """The processes of a run. coordinator: `host:port` of process 0. local_devices: this process's share of its host's."""

  coordinator: str
  processes: int
  process: int
  local_devices: tuple[int, ...] | None = None


def find_cluster(flags: Mapping[str, str | int | None], environ: Mapping[str, str]) -> Cluster | None:
  """What flags (`coordinator`, `processes`, `process`), environment variables or Slurm say; None for one process.

  Raises:
    ConfigError: only a part is given, or it makes no sense.
  """
  given = {f'--{name}': flags.get(name) for name in NAMES}
  if all(value is None for value in given.values()):
    found = {name: _variable(name, environ) for name in NAMES}
    if found['coordinator'][1] is None and found['processes'][1] is None:
      return _slurm(environ)
    given = dict(found.values())
  if missing := [name for name, value in given.items() if value is None]:
    have = ', '.join(f'{name}={value}' for name, value in given.items() if value is not None)
    raise ConfigError(f'{have}: given without {" and ".join(missing)}; several processes need all three')
  names = list(given)
  processes, process = (_number(name, given[name]) for name in names[1:])
  if processes < 1:
    raise ConfigError(f'{names[1]}: {processes} is less than 1')
  if not 0 <= process < processes:
    raise ConfigError(f'{names[2]}: {process} is not one of the {processes} processes 0..{processes - 1}')
  if not re.fullmatch(r'(\[[0-9a-fA-F:.]+\]|[^\s:]+):\d{1,5}', str(given[names[0]])):
    raise ConfigError(f'{names[0]}: {given[names[0]]!r} is not of the form HOST:PORT')
  return Cluster(str(given[names[0]]), processes, process) if processes > 1 else None


def _variable(name: str, environ: Mapping[str, str]) -> tuple[str, str | None]:
  candidates = [f'JAX_{NAMES[name]}', NAMES[name], *(['JOB_COMPLETION_INDEX'] if name == 'process' else [])]
  return next(((key, environ[key]) for key in candidates if environ.get(key)), (candidates[0], None))


def _number(name: str, value: Any) -> int:
  try:
    return int(value)
  except ValueError:
    raise ConfigError(f'{name}: {value!r} is not a whole number') from None


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
  """The processes of a Slurm job step, one per task. None outside of srun, and for one task.

  Several tasks of a node share its devices one each, unless Slurm has bound each to its own.
  """
  nodes, tasks = environ.get('SLURM_STEP_NODELIST'), environ.get('SLURM_STEP_NUM_TASKS', environ.get('SLURM_NTASKS'))
  if not nodes or not tasks or 'SLURM_PROCID' not in environ or _number('SLURM_STEP_NUM_TASKS', tasks) == 1:
    return None
  head, rest = re.match(r'([^,\[]+)\[?([^,\-\]]*)', nodes).groups()  # 'n[07-12,20],m3' -> 'n07'
  port = SLURM_PORTS[_number('SLURM_JOB_ID', environ.get('SLURM_JOB_ID', '0')) % len(SLURM_PORTS)]
  visible = environ.get('CUDA_VISIBLE_DEVICES', '').split(',')
  shares = _tasks_here(environ) > 1 and len(visible) > 1
  return Cluster(
    f'{head}{rest}:{environ.get("JAX_COORDINATOR_PORT", port)}',
    int(tasks),
    _number('SLURM_PROCID', environ['SLURM_PROCID']),
    (_number('SLURM_LOCALID', environ.get('SLURM_LOCALID', '0')),) if shares else None,
  )


def _tasks_here(environ: Mapping[str, str]) -> int:
  """Tasks of the step on this node, from SLURM_STEP_TASKS_PER_NODE such as `2(x3),1`."""
  counts = []
  for part in environ.get('SLURM_STEP_TASKS_PER_NODE', '1').split(','):
    count, _, times = part.partition('(x')
    counts += [int(count)] * int(times.rstrip(')') or 1)
  return counts[min(int(environ.get('SLURM_NODEID', '0')), len(counts) - 1)]
