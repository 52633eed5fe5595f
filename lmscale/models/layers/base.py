"""What the layer kinds share: the contract (x, ctx, cache) -> (x, cache), and what a kind says of itself.

Each layer is a mixer with its own pre-norm and residual. x: [b, t, d_model] in the compute dtype. cache: None in training,
else a dict of arrays as `cache_specs` describes them.
Projections are separate matrices, so that heads and groups are cut over the mesh without reshuffling.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from lmscale.config import ModelConfig
from lmscale.kernels.linear import linear, projections
from lmscale.models.context import Axes, Context
from lmscale.models.norms import accumulator, norm
from lmscale.models.params import constant, weight

Cache = dict[str, jax.Array]
RESIDUAL = ('batch', 'seq', 'embed')  # the stream between mixers; `seq` is cut under sequence parallelism
HEADS = ('batch', 'length', 'heads')  # a number per token and head, or the channels of the heads one after another
PER_HEAD = ('batch', 'length', 'heads', None)  # a vector per token and head
TOKENS = ('batch', 'length')
MIXER_INPUT = ('batch', 'length', 'embed')  # inside a mixer every device sees the whole sequence
PROJECTION = 'projection'  # the name of what recomputation keeps of a mixer, see `stack`


@dataclasses.dataclass(frozen=True)
class CacheSpec:
  """One array that a layer keeps between tokens: its shape (batch first), dtype, and a logical axis or None per dim."""

  shape: tuple[int, ...]
  dtype: Any
  axes: Axes


class Layer(nn.Module):
  """Pre-norm, mixer, residual. A kind defines the class variables, `mix`, `cache_specs` and `flops`."""

  symbol: ClassVar[str]  # in model.pattern
  title: ClassVar[str]  # in messages
  section: ClassVar[str]  # the group of ModelConfig's fields that has its sizes, and the name of its parameters' count

  config: ModelConfig

  def mix(self, h_BTD: jax.Array, ctx: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
    """The mixer: normalised input [b, t, D], cut like the residual stream, -> output [b, t, D] and the new cache."""
    raise TypeError(f'{type(self).__name__} defines no mixer')

  @staticmethod
  def cache_specs(config: ModelConfig, batch: int, length: int, dtype: Any) -> dict[str, CacheSpec]:
    """What the layer keeps between tokens, for `length` tokens of `batch` rows; {} where it mixes none.

    Keys, values and windows are in `dtype`, states in at least float32. All start as zeros.
    """
    raise NotImplementedError

  @staticmethod
  def flops(config: ModelConfig, seq_len: int, causal: bool) -> int:
    """Forward FLOPs per token, see `models.flops` for what counts; causal: attention at half the square."""
    raise NotImplementedError

  @nn.compact
  def __call__(self, x_BTD: jax.Array, ctx: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
    h_BTD = ctx.constrain(norm(self, self.config, x_BTD), RESIDUAL)
    out_BTD, cache = self.mix(h_BTD, ctx, cache)
    return x_BTD + ctx.constrain(out_BTD, RESIDUAL), cache

  def output_std(self) -> float:
    """Initial std of the maps that write to the residual stream: init_std / sqrt(number of layers)."""
    return self.config.init_std / math.sqrt(len(self.config.layers))

  def project(
    self, h_BTD: jax.Array, ctx: Context, outputs: dict[str, tuple[int, str]], init: Any, bias: bool = False
  ) -> list[jax.Array]:
    """The mixer's input by one matrix <name>_kernel per output {name: (size, logical axis)}: [b, t, D] -> [b, t, size] each."""
    kernels = tuple(weight(self, f'{name}_kernel', (h_BTD.shape[-1], size), ('embed', axis), init)
                    for name, (size, axis) in outputs.items())  # fmt: skip
    ys = projections(functools.partial(ctx.constrain, axes=MIXER_INPUT), h_BTD, kernels)
    if bias:
      ys = [self._add_bias(name, y, axis) for (name, (_, axis)), y in zip(outputs.items(), ys, strict=True)]
    return [checkpoint_name(y, PROJECTION) for y in ys]

  def linear(self, name: str, x: jax.Array, size: int, axes: tuple[str, str], init: Any) -> jax.Array:
    """x @ <name>_kernel (+ <name>_bias where the model has biases). x: [..., in] -> [..., size]."""
    y = linear(x, weight(self, f'{name}_kernel', (x.shape[-1], size), axes, init))
    return self._add_bias(name, y, axes[1]) if self.config.bias else y

  def _add_bias(self, name: str, y: jax.Array, axis: str) -> jax.Array:
    acc = accumulator(y.dtype)  # in which the gradient of the bias is then summed over tokens
    bias = weight(self, f'{name}_bias', (y.shape[-1],), (axis,), constant(0.0))
    return (y.astype(acc) + bias.astype(acc)).astype(y.dtype)


def cut_groups(x_BTGN: jax.Array, ctx: Context) -> jax.Array:
  """Repeats groups (or KV heads) until the mesh can cut them: to lcm(groups, tensor). [b, t, g, n] -> [b, t, g', n].

  Each device then holds just the groups its heads read. Where `tensor` divides the groups nothing is repeated.
  """
  groups = x_BTGN.shape[2]
  repeats = math.lcm(groups, ctx.tensor) // groups
  if repeats > 1:
    x_BTGN = jnp.repeat(x_BTGN, repeats, axis=2)
  return ctx.constrain(x_BTGN, PER_HEAD)


def entering(kept: jax.Array, ctx: Context) -> jax.Array:
  """What a row's first token goes on from: `kept` [b, ...] of the cache, or zeros where that token begins a document."""
  if ctx.segment_ids is None:
    return kept
  begins_B = (ctx.positions[:, 0] == 0) & (ctx.segment_ids[:, 0] != 0)
  return jnp.where(begins_B.reshape(-1, *[1] * (kept.ndim - 1)), 0, kept)


def named(implementation: str) -> str | None:
  """The kernel that a config names; None leaves the choice to the operation."""
  return None if implementation == 'auto' else implementation
