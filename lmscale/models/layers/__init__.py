"""The layer kinds, each one class that says its symbol, parameters, cache and cost; `LAYERS` finds it by its symbol."""

from typing import Any

import jax.numpy as jnp

from lmscale.config import ModelConfig
from lmscale.models.layers.attention import Attention
from lmscale.models.layers.base import RESIDUAL, Cache, CacheSpec, Layer
from lmscale.models.layers.mamba import Mamba
from lmscale.models.layers.mamba2 import Mamba2
from lmscale.models.layers.mlp import MLP

__all__ = ['LAYERS', 'RESIDUAL', 'Cache', 'CacheSpec', 'Layer', 'empty_cache']

LAYERS: dict[str, type[Layer]] = {layer.symbol: layer for layer in (Attention, MLP, Mamba2, Mamba)}


def empty_cache(config: ModelConfig, kind: str, batch: int, length: int, dtype: Any) -> Cache:
  """The cache of one layer before the first token, see `Layer.cache_specs`."""
  specs = LAYERS[kind].cache_specs(config, batch, length, dtype)
  return {name: jnp.zeros(spec.shape, spec.dtype) for name, spec in specs.items()}
