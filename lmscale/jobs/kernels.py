"""Which kernels a run takes: settled before it traces anything, by one process for all."""

import jax

from lmscale import processes
from lmscale.config import Config, ConfigError
from lmscale.kernels import proof
from lmscale.kernels.choice import Choice
from lmscale.models.layers import LAYERS
from lmscale.plan.activations import GPU_ONLY, check_kernels


def settle_kernels(config: Config) -> list[Choice]:
  """The choices of a config on the devices here. Kernels of which nothing is known yet are tried, see `kernels.proof`.

  Raises:
    ConfigError: a kernel that the config names cannot do it, or computes something else here.
  """
  backend = jax.default_backend()
  if not processes.is_first():
    proof.adopt(processes.share('kernels', {}))
  chosen = check_kernels(config, backend)
  for choice in chosen:
    if choice.named and choice.name in GPU_ONLY and (reason := proof.verdict(choice.op, choice.name, choice.dtype).why_not):
      raise ConfigError(f'{_field(config, choice.name)}: {choice.name} is not to be trusted on this {jax.devices()[0].device_kind}: {reason}; set auto')
  if processes.is_first():
    processes.share('kernels', proof.known())
  return chosen


def _field(config: Config, name: str) -> str:
  sections = {LAYERS[kind].section for kind in config.model.layers}
  named = (section for section in sections if getattr(getattr(config.model, section), 'implementation', '') == name)
  return f'model.{next(named)}.implementation'
