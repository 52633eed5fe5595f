"""Two linear maps around an activation; SwiGLU and GEGLU gate with a third."""

from typing import Any

import jax
import jax.numpy as jnp

from lmscale.config import ModelConfig
from lmscale.models.context import Context
from lmscale.models.layers.base import Cache, CacheSpec, Layer
from lmscale.models.norms import accumulator, keep_inputs
from lmscale.models.params import normal

ACTIVATIONS = {
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
  'relu2': lambda x: jnp.square(jax.nn.relu(x)),
}
GATED = {'swiglu': jax.nn.silu, 'geglu': lambda x: jax.nn.gelu(x, approximate=False)}


class MLP(Layer):
  """down(activation(up(h))), or down(activation(gate(h)) * up(h)). Activations are computed in at least float32."""

  symbol, title, section = '-', 'MLP', 'mlp'

  def mix(self, h_BTD: jax.Array, ctx: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
    config, d_ff = self.config, self.config.mlp.d_ff
    names = ('up', 'gate') if config.mlp.activation in GATED else ('up',)
    inputs = self.project(h_BTD, ctx, dict.fromkeys(names, (d_ff, 'ff')), normal(config.init_std), config.bias)
    a_BTF = keep_inputs(lambda *inputs: activate(config.mlp.activation, *inputs))(*inputs)
    a_BTF = ctx.constrain(a_BTF, ('batch', 'length', 'ff'))
    return self.linear('down', a_BTF, config.d_model, ('ff', 'embed'), normal(self.output_std())), cache

  @staticmethod
  def cache_specs(config: ModelConfig, batch: int, length: int, dtype: Any) -> dict[str, CacheSpec]:
    return {}

  @staticmethod
  def flops(config: ModelConfig, seq_len: int, causal: bool) -> int:
    matrices = 3 if config.mlp.activation in GATED else 2
    return 2 * matrices * config.d_model * config.mlp.d_ff


def activate(name: str, up: jax.Array, gate: jax.Array | None = None) -> jax.Array:
  """The activation called `name` of `up`, or of `gate` times `up`: in at least float32, rounded once to up's dtype."""
  acc = accumulator(up.dtype)
  if gate is None:
    return ACTIVATIONS[name](up.astype(acc)).astype(up.dtype)
  return (GATED[name](gate.astype(acc)) * up.astype(acc)).astype(up.dtype)
