"""What the kernels' choice of implementation asks about the machine."""

import jax


def nvidia() -> bool:
  """Whether programs run on an NVIDIA GPU; those before Ampere have other names and no kernels of ours."""
  return jax.default_backend() == 'gpu' and jax.devices()[0].device_kind.startswith('NVIDIA')
