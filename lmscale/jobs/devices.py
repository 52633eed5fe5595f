"""JAX set up as a config asks."""

import contextlib

import jax

from lmscale import processes
from lmscale.config import Config
from lmscale.errors import ConfigError


def count_devices(config: Config) -> int:
  """The number of devices of all processes, after JAX is set up: float64 and emulated CPU devices where the config asks
  for them, shared out among the processes."""
  count = processes.count()
  if config.emulate % count:
    raise ConfigError(f'emulate: {config.emulate} devices cannot be shared equally by {count} processes')

  if config.train.compute_dtype == 'float64':
    jax.config.update('jax_enable_x64', True)
  if config.emulate:
    jax.config.update('jax_platforms', 'cpu')
    # A process that already runs on devices cannot change their number: the mesh check tells.
    with contextlib.suppress(RuntimeError):
      jax.config.update('jax_num_cpu_devices', config.emulate // count)
  try:
    return jax.device_count()
  except RuntimeError as error:
    raise ConfigError(f'JAX finds no device: {error}') from error
