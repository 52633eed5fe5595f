"""Bytes of activations that one layer keeps for its backward pass, read off its own derivative.

`jax.vjp` of a layer returns a function whose leaves are what it saved. Traced on shapes alone this needs no memory and
follows every change of a layer. (The papers' counts, 34 s b h for a Transformer layer in arXiv 2205.05198, section 4, are
of hand-written kernels; automatic differentiation keeps more: float32 insides of norms and activations.) The compiler may
keep less by computing cheap things again. While a layer runs it holds more than it keeps: `layer_working`.
"""

import functools
import math

import jax
import jax.numpy as jnp

from lmscale.config import Config, ConfigError, ModelConfig
from lmscale.models import stack
from lmscale.models.context import Context
from lmscale.models.layers import LAYERS
from lmscale.plan.working import working_bytes


def layer_activations(config: Config, kind: str, remat: str) -> int:
  """Bytes that one layer of `kind` keeps per sequence on one device; remat `none` or `selective`.

  What has width d_model lies in the residual stream: it is cut over `tensor` under sequence parallelism, except the input
  of the mixer, and whole otherwise. The rest is inside the mixer and cut by `tensor`.
  """
  model, train, mesh = config.model, config.train, config.mesh
  stream, inside = _saved(model, kind, train.seq_len, train.compute_dtype, remat == 'selective')
  if not mesh.sequence_parallel:
    return stream + inside // mesh.tensor
  mixer_input = model.d_model * train.seq_len * jnp.dtype(train.compute_dtype).itemsize
  return mixer_input + (stream - mixer_input + inside) // mesh.tensor


GPU_ONLY = ('pallas_triton', 'pallas_mosaic', 'cudnn')


def check_kernels(config: Config, backend: str | None = None) -> None:
  """Asks the layers, on shapes alone, whether the kernels that the config names can do it.

  backend: where the kernels are to run (jax.default_backend()); None: not here.

  Raises:
    ConfigError: they cannot, and why.
  """
  for kind in set(config.model.layers):
    section = LAYERS[kind].section
    field, name = f'model.{section}.implementation', getattr(getattr(config.model, section), 'implementation', None)
    if name is None:
      continue  # a kind without a kernel
    if name in GPU_ONLY and backend not in (None, 'gpu'):
      raise ConfigError(f'{field}: {name} runs on an NVIDIA GPU, and the devices here are of kind {backend!r}; set auto')
    try:
      layer_activations(config, kind, 'none')
    except ValueError as error:
      raise ConfigError(f'{field}: {error}') from error


def layer_working(config: Config, kind: str) -> int:
  """Bytes that one layer of `kind` holds per sequence on one device while its forward and backward pass run."""
  train = config.train
  return _peak(config.model, kind, train.seq_len, train.compute_dtype) // config.mesh.tensor


@functools.cache
def _saved(model: ModelConfig, kind: str, seq_len: int, dtype: str, selective: bool) -> tuple[int, int]:
  """Bytes saved per sequence: (of width d_model, other), parameters left out."""
  with jax.enable_x64(dtype == 'float64'):
    shapes = _shapes(model, kind, seq_len, dtype)
    saved = jax.tree.leaves(jax.eval_shape(functools.partial(_derivative, model, kind, selective), *shapes))
  params, x = shapes[:2]
  weights = {(spec.shape, jnp.dtype(spec.dtype)) for spec in params.values()}
  saved = [leaf for leaf in saved if (leaf.shape, leaf.dtype) not in weights]
  stream = sum(_bytes(leaf) for leaf in saved if leaf.shape == x.shape)
  return stream, sum(map(_bytes, saved)) - stream


@functools.cache
def _peak(model: ModelConfig, kind: str, seq_len: int, dtype: str) -> int:
  def both_passes(params: dict, x: jax.Array, *ids: jax.Array) -> jax.Array:
    return _derivative(model, kind, False, params, x, *ids)(x)[1]  # x stands for the cotangent

  with jax.enable_x64(dtype == 'float64'):
    return working_bytes(both_passes, *_shapes(model, kind, seq_len, dtype))


def _derivative(
  model: ModelConfig, kind: str, selective: bool, params: dict, x: jax.Array, positions: jax.Array, segment_ids: jax.Array
) -> jax.tree_util.Partial:
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
