"""Connecting the processes of a run: who waits for whom, and what is said when one does not come."""

import glob
import importlib.util
import os
import socket
import sys
import time

from lmscale.errors import ConfigError
from lmscale.exit_codes import USER_ERROR
from lmscale.processes import peers
from lmscale.processes.cluster import Cluster
from lmscale.processes.exits import exit_on_abort

WAIT = 300.0  # seconds that processes may start after each other
HEARTBEAT = 6  # seconds without one after which a process counts as lost


def start(cluster: Cluster | None, wait: float = WAIT, tpu: bool = True) -> None:
  """Connects this process with the others; to be called before JAX is asked for devices.

  cluster: as `find_cluster` gives it. wait: seconds. tpu: whether, without a cluster, a Cloud TPU is looked for.

  Raises:
    ConfigError: process 0 cannot be reached, or its port is taken. Where some of the others do not come in time, the
    process ends with exit code 2.
  """
  import jax  # not before a command line was understood

  options = {'heartbeat_timeout_seconds': HEARTBEAT, 'shutdown_timeout_seconds': 60}
  jax.config.update('jax_enable_preemption_service', False)  # it would take SIGTERM away from the loop
  if cluster is None:
    if not (tpu and _on_tpu()):
      return
    jax.distributed.initialize(initialization_timeout=int(wait), **options)
    if jax.process_count() > 1:
      peers.join(jax.process_count(), jax.process_index())
    return
  _hide_native_output()
  deadline = time.monotonic() + wait
  (_check_port if cluster.process == 0 else _wait_for)(cluster.coordinator, deadline)
  left = max(1, int(deadline - time.monotonic()))
  state = f'not all of {cluster.processes} processes came to {cluster.coordinator} within {wait:.0f} seconds'
  exit_on_abort(lambda: (USER_ERROR, f'error: {_who(cluster)}{state}; start every process, or raise --wait'))
  try:
    jax.distributed.initialize(
      cluster.coordinator, cluster.processes, cluster.process, cluster.local_devices,
      cluster_detection_method='deactivate', initialization_timeout=left, **options,
    )  # fmt: skip
  except RuntimeError as error:
    raise ConfigError(f'{cluster.coordinator}: {state} ({str(error).splitlines()[0]})') from error
  peers.join(cluster.processes, cluster.process)


def _on_tpu() -> bool:
  return bool(importlib.util.find_spec('libtpu') and (glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*')))


def _hide_native_output() -> None:
  """Leaves standard output to Python: Gloo, between CPU devices, prints every connection that it makes there."""
  sys.stdout.flush()
  sys.stdout = open(os.dup(1), 'w', buffering=1, encoding=sys.stdout.encoding, errors='backslashreplace')  # noqa: SIM115
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 1)
  os.close(nowhere)


def _check_port(coordinator: str, deadline: float) -> None:
  port = int(coordinator.rpartition(':')[2])
  with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind(('', port))
    except (OSError, OverflowError) as error:
      raise ConfigError(f'{coordinator}: process 0 cannot listen on port {port} ({error}); choose another') from error


def _wait_for(coordinator: str, deadline: float) -> None:
  """Returns once something listens at `host:port`."""
  host, _, port = coordinator.rpartition(':')
  while True:
    try:
      socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
      return
    except (OSError, OverflowError) as error:
      if time.monotonic() > deadline:
        raise ConfigError(
          f'{coordinator}: process 0 cannot be reached ({error}); start it, check the address, or raise --wait'
        ) from error
    time.sleep(0.2)


def _who(cluster: Cluster) -> str:
  return f'process {cluster.process} of {cluster.processes}: ' if cluster.process else ''
