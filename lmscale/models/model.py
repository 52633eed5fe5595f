"""The language model: embedding, stack of layers, final norm, head.

Parameter tree: embed/tokens [V, D] (embed/positions [S, D]), layers, final_norm/norm_scale, head/kernel [D, V] (absent
where the head is the transposed embedding). `layers` is a list with one dict per layer in canonical form, and a tuple of
runs (see `stacking`) in memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmscale.config import ModelConfig
from lmscale.kernels.cross_entropy import cross_entropy, total
from lmscale.models import stack
from lmscale.models.context import Context, padding_last
from lmscale.models.layers import RESIDUAL, empty_cache
from lmscale.models.norms import norm
from lmscale.models.params import ParamSpec, declared_specs, initial_value, normal
from lmscale.models.stacking import FILLER, Stack, Stacking, from_layers, make_stacking, map_stacks

Params = dict[str, Any]
# (params, of which the head is read; hidden states [b, t, d_model] behind the final norm; microbatch of [b, t]; context)
# -> (summed loss, how many were counted): what a training run minimises the mean of.
HeadLoss = Callable[[Params, jax.Array, dict[str, jax.Array], Context], tuple[jax.Array, jax.Array]]


class _FinalNorm(nn.Module):
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    return norm(self, self.config, x_BTD)


@functools.cache
def outer_specs(config: ModelConfig) -> dict[str, dict[str, ParamSpec]]:
  """The parameters outside the layers: {part: {name: spec}}."""
  d = config.d_model
  embed = {'tokens': ParamSpec((config.vocab, d), ('vocab', 'embed'), normal(config.init_std))}
  if config.positions == 'learned':
    embed['positions'] = ParamSpec((config.max_positions, d), (None, 'embed'), normal(config.init_std))
  specs = {'embed': embed, 'final_norm': declared_specs(_FinalNorm(config), jnp.zeros((1, 1, d)))}
  if not config.tied:
    specs['head'] = {'kernel': ParamSpec((d, config.vocab), ('embed', 'vocab'), normal(config.init_std))}
  return specs


def param_specs(config: ModelConfig) -> Params:
  """The canonical tree of ParamSpec, `layers` a list with one dict per layer. Allocates nothing."""
  outer = outer_specs(config)
  return {**outer, 'layers': [stack.layer_specs(config, kind) for kind in config.layers]}


def init_layers(config: ModelConfig, seed: int, dtype: Any = jnp.float32) -> Params:
  """The canonical tree of initial values. A leaf depends on (seed, layer index, name) alone."""
  outer = _init_outer(config, seed, dtype)
  layers = [
    {name: initial_value(spec, seed, index, name, dtype) for name, spec in stack.layer_specs(config, kind).items()}
    for index, kind in enumerate(config.layers)
  ]
  return {**outer, 'layers': layers}


def init_runs(config: ModelConfig, stacking: Stacking, seed: int, dtype: Any = jnp.float32) -> Params:
  """The same values as `init_layers`, born stacked."""

  def stacked(place: Stack) -> dict[str, jax.Array]:
    rows = jnp.asarray(place.layers)

    def row(i: jax.Array, name: str, spec: ParamSpec) -> jax.Array:
      value = initial_value(spec, seed, i, name, dtype)
      return jnp.where(i == FILLER, 0, value) if FILLER in place.layers else value

    specs = stack.layer_specs(config, place.kind)
    return {name: jax.vmap(functools.partial(row, name=name, spec=spec))(rows) for name, spec in specs.items()}

  return {**_init_outer(config, seed, dtype), 'layers': map_stacks(stacked, stacking)}


def _init_outer(config: ModelConfig, seed: int, dtype: Any) -> Params:
  return {
    part: {name: initial_value(spec, seed, -1, f'{part}/{name}', dtype) for name, spec in specs.items()}
    for part, specs in outer_specs(config).items()
  }


def embed(config: ModelConfig, params: dict[str, jax.Array], tokens_BT: jax.Array, ctx: Context) -> jax.Array:
  """Token (and learned position) embeddings: tokens int32 [b, t] -> [b, t, d_model]."""
  x_BTD = _look_up(params['tokens'], tokens_BT, ctx.vocab_axis)
  if config.positions == 'learned':
    x_BTD = x_BTD + _look_up(params['positions'], ctx.positions)
  return ctx.constrain(x_BTD, RESIDUAL)


def _look_up(table_VD: jax.Array, index_BT: jax.Array, axis: str | None = None) -> jax.Array:
  """Rows of a table. axis: a mesh axis over which its rows are cut; each device looks among its own."""
  # The gradient adds up all uses of a row. In bfloat16 a sum of equal terms stops growing at 256 of them.
  acc = jnp.promote_types(jnp.float32, table_VD.dtype)
  if axis is None:
    return jnp.take(table_VD.astype(acc), index_BT, axis=0).astype(table_VD.dtype)
  rows = table_VD.shape[0]
  index_BT = index_BT - jax.lax.axis_index(axis) * rows
  mine_BT1 = ((index_BT >= 0) & (index_BT < rows))[..., None]
  found_BTD = jnp.take(table_VD.astype(acc), jnp.clip(index_BT, 0, rows - 1), axis=0)
  return total(jnp.where(mine_BT1, found_BTD, 0).astype(table_VD.dtype), axis)


def final_norm(config: ModelConfig, params: dict[str, jax.Array], x_BTD: jax.Array) -> jax.Array:
  """The norm before the head. [b, t, d_model] -> same."""
  return _FinalNorm(config).apply({'params': params}, x_BTD)


def forward(
  config: ModelConfig,
  params: Params,
  tokens_BT: jax.Array,
  ctx: Context,
  caches: tuple | None = None,
  stacking: Stacking | None = None,
  remat: str = 'none',
) -> tuple[jax.Array, tuple | None]:
  """Tokens to the hidden states that the head reads.

  tokens: int32 [b, t]. params: canonical (then `stacking` is None) or stacked. caches: None, or `empty_caches`, which then
  hold ctx.slots tokens of each row.
  Returns (hidden [b, t, d_model], caches). The compute dtype is that of the embedding.
  """
  layers = params['layers']
  if stacking is None:
    stacking = make_stacking(config.layers, 'unrolled')
    layers = from_layers(layers, stacking)
  tokens_BT, ctx, undo = (tokens_BT, ctx, None) if caches is None else padding_last(tokens_BT, ctx)
  x_BTD = embed(config, params['embed'], tokens_BT, ctx)
  x_BTD, caches = stack.apply_stack(config, stacking, layers, x_BTD, ctx, caches, remat)
  hidden_BTD = final_norm(config, params['final_norm'], x_BTD)
  return hidden_BTD if undo is None else undo(hidden_BTD), caches


def head_kernel(params: Params) -> jax.Array:
  """The head's matrix [d_model, vocab]: its own, or the transposed embedding where they are tied."""
  return params['head']['kernel'] if 'head' in params else params['embed']['tokens'].T


def logits(config: ModelConfig, params: Params, hidden_BTD: jax.Array) -> jax.Array:
  """Hidden states [..., d_model] -> logits [..., vocab], at least float32."""
  acc = jnp.promote_types(jnp.float32, hidden_BTD.dtype)
  return jnp.matmul(hidden_BTD, head_kernel(params), preferred_element_type=acc)


def next_token_loss(config: ModelConfig, chunk: int) -> HeadLoss:
  """The loss of a language model: -log p(label) summed over the labels that are not negative, in nats.

  chunk: at most so many tokens have logits at a time.
  """

  def loss(params: Params, hidden_BTD: jax.Array, batch: dict[str, jax.Array], ctx: Context) -> tuple[jax.Array, jax.Array]:
    hidden_ND = ctx.constrain(hidden_BTD, ('batch', 'length', 'embed')).reshape(-1, config.d_model)
    kernel_DV = ctx.constrain(head_kernel(params), ('embed', 'vocab'))
    return cross_entropy(hidden_ND, kernel_DV, batch['labels'].reshape(-1), chunk=chunk, constrain=ctx.constrain, axis=ctx.vocab_axis)

  return loss


def empty_caches(config: ModelConfig, stacking: Stacking, batch: int, length: int, dtype: Any) -> tuple:
  """Decode caches for `length` tokens, stacked like the parameters."""

  def stacked(layers: Stack) -> dict[str, jax.Array]:
    cache = empty_cache(config, layers.kind, batch, length, dtype)
    return {name: jnp.broadcast_to(leaf, (len(layers.layers), *leaf.shape)) for name, leaf in cache.items()}

  return map_stacks(stacked, stacking)
