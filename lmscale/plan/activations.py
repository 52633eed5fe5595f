"""Bytes of activations that one layer keeps for its backward pass, read off its own derivative.

`jax.vjp` of a layer returns a function whose leaves are what it saved. Traced on shapes alone this needs no memory and
follows every change of a layer. The compiler may keep less by computing cheap things again. While a layer runs it holds more than it keeps: `layer_working`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from lmscale.config import Config, ConfigError, ModelConfig
from lmscale.kernels.choice import Choice, recording
from lmscale.models import stack
from lmscale.models.context import Context
from lmscale.models.layers import LAYERS
from lmscale.plan.working import working_bytes


def layer_activations(config: Config, kind: str, remat: str) -> int:
  """Bytes that one layer of `kind` keeps per sequence on one device; remat `none` or `selective`.

  In the residual stream lie the layer's input and, under `none`, the normalised one: cut over `tensor` under sequence
  parallelism, whole otherwise. The rest is inside the mixer, counted for the heads and channels of one device. What all layers
  share, the masks of packed documents, is left out.
  """
  train, mesh = config.train, config.mesh
  selective = remat == 'selective'
  saved = _saved(_local(config), kind, train.seq_len, train.compute_dtype, selective)
  stream = (1 if selective else 2) * config.model.d_model * train.seq_len * jnp.dtype(train.compute_dtype).itemsize
  return saved - stream + (stream // mesh.tensor if mesh.sequence_parallel else stream)


def _local(config: Config) -> ModelConfig:
  """The model with the heads, groups and channels that one device has."""
  model, tensor = config.model, config.mesh.tensor
  attention, mamba2 = model.attention, model.mamba2
  replace = dataclasses.replace
  return replace(
    model,
    attention=replace(attention, heads=attention.heads // tensor, kv_heads=math.lcm(attention.kv_heads, tensor) // tensor),
    mlp=replace(model.mlp, d_ff=model.mlp.d_ff // tensor),
    mamba2=replace(mamba2, heads=mamba2.heads // tensor, groups=math.lcm(mamba2.groups, tensor) // tensor),
    mamba=replace(model.mamba, d_inner=model.mamba.d_inner // tensor),
  )


GPU_ONLY = ('pallas_triton', 'pallas_mosaic', 'cudnn')


def check_kernels(config: Config, backend: str | None = None) -> list[Choice]:
  """Asks the layers, on shapes alone, which kernels they take, in training and for one token, and whether those that are named can do it.

  backend: where the kernels are to run (jax.default_backend()); None: not here.

  Raises:
    ConfigError: they cannot, and why.
  """
  kinds = sorted(set(config.model.layers))
  for kind in kinds:
    stack.layer_specs(config.model, kind)  # which is asked once, of layers whose kernels run nowhere
  with recording() as chosen:
    for kind in kinds:
      _check_kernel(config, kind, backend)
  return chosen


def _check_kernel(config: Config, kind: str, backend: str | None) -> None:
  section = LAYERS[kind].section
  field, name = f'model.{section}.implementation', getattr(getattr(config.model, section), 'implementation', None)
  if name is None:
    return  # a kind without a kernel
  if name in GPU_ONLY and backend not in (None, 'gpu'):
    raise ConfigError(f'{field}: {name} runs on an NVIDIA GPU, and the devices here are of kind {backend!r}; set auto')
  try:
    dtype = config.train.compute_dtype
    shapes = _shapes(config.model, kind, config.train.seq_len, dtype)
    jax.eval_shape(functools.partial(_derivative, config.model, kind, False), *shapes)
    if kind != '*':  # whose one token looks at a cache, always by XLA
      jax.eval_shape(functools.partial(_one_token, config.model, kind), *_shapes(config.model, kind, 1, dtype)[:3])
  except ValueError as error:
    raise ConfigError(f'{field}: {error}') from error
  except RuntimeError as error:
    if 'cuDNN' not in str(error):
      raise
    raise ConfigError(f'{field}: {name} needs cuDNN, even to be planned, and it is not installed here; set auto') from error


def _one_token(model: ModelConfig, kind: str, params: dict, x: jax.Array, positions: jax.Array) -> jax.Array:
  return LAYERS[kind](model).apply({'params': params}, x, Context(positions), None)[0]


def layer_working(config: Config, kind: str) -> int:
  """Bytes that one layer of `kind` holds per sequence on one device while its forward and backward pass run."""
  train = config.train
  return _peak(config.model, kind, train.seq_len, train.compute_dtype) // config.mesh.tensor


@functools.cache
def _saved(model: ModelConfig, kind: str, seq_len: int, dtype: str, selective: bool) -> int:
  """Bytes saved per sequence, parameters left out."""
  with jax.enable_x64(dtype == 'float64'):
    params, x, positions, _ = _shapes(model, kind, seq_len, dtype)
    saved = jax.tree.leaves(jax.eval_shape(functools.partial(_derivative, model, kind, selective), params, x, positions))
  weights = {(spec.shape, jnp.dtype(spec.dtype)) for spec in params.values()}
  return sum(_bytes(leaf) for leaf in saved if (leaf.shape, leaf.dtype) not in weights)


@functools.cache
def _peak(model: ModelConfig, kind: str, seq_len: int, dtype: str) -> int:
  def both_passes(params: dict, x: jax.Array, *ids: jax.Array) -> jax.Array:
    return _derivative(model, kind, False, params, x, *ids)(x)[1]  # x stands for the cotangent

  with jax.enable_x64(dtype == 'float64'):
    return working_bytes(both_passes, *_shapes(model, kind, seq_len, dtype))


def _derivative(
  model: ModelConfig, kind: str, selective: bool, params: dict, x: jax.Array, positions: jax.Array,
  segment_ids: jax.Array | None = None,
) -> jax.tree_util.Partial:  # fmt: skip
  ctx = Context(positions, segment_ids)

  def layer(p: dict, x: jax.Array) -> jax.Array:
    return LAYERS[kind](model).apply({'params': p}, x, ctx, None)[0]

  return jax.vjp(jax.checkpoint(layer, policy=stack.SELECTIVE) if selective else layer, params, x)[1]


def _shapes(model: ModelConfig, kind: str, seq_len: int, dtype: str) -> tuple:
  acc = jnp.promote_types(jnp.float32, dtype)
  specs = stack.layer_specs(model, kind)
  params = {n: jax.ShapeDtypeStruct(s.shape, acc if s.full_precision else dtype) for n, s in specs.items()}
  x = jax.ShapeDtypeStruct((1, seq_len, model.d_model), dtype)
  ids = jax.ShapeDtypeStruct((1, seq_len), jnp.int32)
  return params, x, ids, ids


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
  return math.prod(leaf.shape) * leaf.dtype.itemsize
