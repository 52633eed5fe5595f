"""Packages that only some data needs."""

import importlib
import types

from lmscale.errors import ConfigError


def need(package: str, field: str) -> types.ModuleType:
  """The imported `package`. Raises ConfigError that names `field` and the extra where it is not installed."""
  try:
    return importlib.import_module(package)
  except ModuleNotFoundError as error:
    if error.name != package:
      raise
    raise ConfigError(f"{field}: needs the package {package}; install it with: pip install -e '.[data]'") from error
