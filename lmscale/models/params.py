"""Parameters: shape, logical axes and initialiser of each are written once, in the layer; the rest is derived.

A layer declares a parameter with `weight`. Tracing the layer's `init` abstractly collects a `ParamSpec` per parameter;
shardings, initial values, counts and checkpoints all come from these specs.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from flax.core import meta

Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """One parameter: its shape, a logical axis name (or None) per dimension, and how it starts.

  init: (key, shape) -> float32 array. full_precision: never cast to the compute dtype (norms, decays, biases of dt).
  """

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  init: Initializer
  full_precision: bool = False

  def __post_init__(self):
    if len(self.shape) != len(self.axes):
      raise ValueError(f'shape {self.shape} and axes {self.axes} differ in length')

  @property
  def size(self) -> int:
    return math.prod(self.shape)


@struct.dataclass
class _Declared(meta.AxisMetadata):
  """Carries a ParamSpec out of an abstract `init`; layers see the bare array."""

  value: Any
  spec: ParamSpec = struct.field(pytree_node=False)

  def unbox(self) -> Any:
    return self.value

  def replace_boxed(self, val: Any) -> '_Declared':
    return self.replace(value=val)

  def add_axis(self, index: int, params: dict[Any, Any]) -> '_Declared':
    return self

  def remove_axis(self, index: int, params: dict[Any, Any]) -> '_Declared':
    return self


def weight(
  module: nn.Module,
  name: str,
  shape: tuple[int, ...],
  axes: tuple[str | None, ...],
  init: Initializer,
  full_precision: bool = False,
) -> jax.Array:
  """Declares parameter `name` of a Linen module and returns its array."""
  spec = ParamSpec(shape, axes, init, full_precision)
  return module.param(name, lambda key: _Declared(jnp.zeros(shape), spec))


def declared_specs(module: nn.Module, *args: Any) -> dict[str, ParamSpec]:
  """The specs of all parameters that `module` declares when called with `args`; computes nothing."""
  variables = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))
  boxes = jax.tree.map(lambda b: b.spec, variables['params'], is_leaf=lambda b: isinstance(b, _Declared))
  return dict(boxes)


def initial_value(spec: ParamSpec, seed: jax.Array | int, layer: jax.Array | int, name: str, dtype: Any) -> jax.Array:
  """The initial value of a parameter: a function of (seed, layer, name) alone.

  layer: the canonical layer index, or -1 for parameters outside the stack; may be traced (stacked initialisation).
  Values are drawn in float32 and then cast, so a float64 run starts where the float32 run does.
  """
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), layer + 1), zlib.crc32(name.encode()))
  return spec.init(key, spec.shape).astype(dtype)


def normal(std: float) -> Initializer:
  """Normal with standard deviation `std`."""
  return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def uniform(bound: float) -> Initializer:
  """Uniform in (-bound, bound)."""
  return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def fan_in_uniform(fan_in: int, scale: float = 1.0) -> Initializer:
  """Kaiming-uniform with a = sqrt(5), the default of PyTorch's linear and convolution layers: bound 1/sqrt(fan_in)."""
  return uniform(scale / math.sqrt(fan_in))


def constant(value: float) -> Initializer:
  """Every element equal to `value`."""
  return lambda key, shape: jnp.full(shape, value, jnp.float32)


def log_uniform_a(low: float, high: float) -> Initializer:
  """A_log with A uniform in (low, high): Mamba-2 (arXiv 2405.21060; Megatron-LM uses 1 to 16)."""
  return lambda key, shape: jnp.log(jax.random.uniform(key, shape, jnp.float32, low, high))


def s4d_real_a(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """A_log with A = 1..N in every channel: Mamba-1's S4D-real start (arXiv 2312.00752, section 3.6)."""
  return jnp.broadcast_to(np.log(np.arange(1, shape[-1] + 1)).astype(np.float32), shape)


def inverse_softplus_dt(low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4) -> Initializer:
  """dt_bias such that softplus(dt_bias) is log-uniform in (low, high), at least `floor` (arXiv 2312.00752, 3.6)."""

  def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    dt = jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(low), math.log(high)))
    dt = jnp.maximum(dt, floor)
    return dt + jnp.log(-jnp.expm1(-dt))

  return init
