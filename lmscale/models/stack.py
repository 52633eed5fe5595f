"""The stack of layers, executed run by run: a run is one `lax.scan` over the rows of its stacks (see `stacking`).

`unrolled` is the same code with every run of one row.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lmscale.config import ModelConfig
from lmscale.models.context import Context
from lmscale.models.layers import LAYERS
from lmscale.models.layers.base import PROJECTION
from lmscale.models.params import ParamSpec, declared_specs
from lmscale.models.stacking import Run, Stacking


@functools.cache
def layer_specs(config: ModelConfig, kind: str) -> dict[str, ParamSpec]:
  """The parameters of one layer of `kind`."""
  x = jnp.zeros((1, 1, config.d_model))
  context = Context(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
  return declared_specs(LAYERS[kind](config), x, context, None)


def apply_layer(
  config: ModelConfig, kind: str, params: Any, x_BTD: jax.Array, ctx: Context, cache: Any
) -> tuple[jax.Array, Any]:
  """One layer: brings its parameters together (ZeRO 3), then runs the module."""
  if ctx.gather is not None:
    params = ctx.gather(kind, params)
  return LAYERS[kind](config).apply({'params': params}, x_BTD, ctx, cache)


def apply_stack(
  config: ModelConfig, stacking: Stacking, runs: tuple, x_BTD: jax.Array, ctx: Context, caches: tuple | None, remat: str
) -> tuple[jax.Array, tuple | None]:
  """All layers. x: [b, t, d_model]; runs: the parameters, runs[i][j] of the stack stacking[i][j], each leaf [rows, ...];
  caches: None, or stacked like the parameters.

  remat: 'full' keeps the input of each layer and recomputes the rest in the backward pass; 'selective' keeps
  what the projections give and recomputes the rest: norms, activations, convolutions, attention and the scans, which
  take much memory and little time (arXiv 2205.05198, section 5); 'none' keeps what each operation's derivative needs.
  Returns (x, caches).
  """
  new_caches = []
  for i, run in enumerate(stacking):
    rows = len(run[0].layers)
    body = functools.partial(_unit_body, config, run, ctx, remat, rows)
    inputs = (runs[i], caches[i] if caches is not None else tuple(None for _ in run))
    if rows == 1:
      x_BTD, cache = body(x_BTD, jax.tree.map(lambda leaf: leaf[0], inputs))
      cache = jax.tree.map(lambda leaf: leaf[None], cache)
    else:
      x_BTD, cache = jax.lax.scan(body, x_BTD, inputs)
    new_caches.append(cache)
  return x_BTD, None if caches is None else tuple(new_caches)


def _unit_body(
  config: ModelConfig, run: Run, ctx: Context, remat: str, rows: int, x_BTD: jax.Array, inputs: tuple
) -> tuple[jax.Array, tuple]:
  params, caches = inputs
  new_caches = []
  for stack, layer_params, cache in zip(run, params, caches, strict=True):

    def layer(p, x, c, kind=stack.kind):
      return apply_layer(config, kind, p, x, ctx, c)

    x_BTD, cache = _rematerialised(layer, ctx, remat, rows)(layer_params, x_BTD, cache)
    new_caches.append(cache)
  return x_BTD, tuple(new_caches)


CUDNN = 'dot_product_attention_fwd_wrapper'  # JAX's primitive: its result, and the sums its own backward pass needs
SELECTIVE = jax.checkpoint_policies.save_from_both_policies(
  jax.checkpoint_policies.save_only_these_names(PROJECTION, 'attention'),
  lambda primitive, *_, **__: primitive.name == CUDNN,
)


def _rematerialised(layer: Any, ctx: Context, remat: str, rows: int) -> Any:
  # Inside a scan the loop already keeps XLA from merging the recomputation with the forward pass; the barrier that
  # prevent_cse adds makes the GPU compiler copy each layer's weights inside the loop.
  if remat == 'full':
    return jax.checkpoint(layer, prevent_cse=rows == 1)
  if remat == 'selective':
    return jax.checkpoint(layer, prevent_cse=rows == 1, policy=SELECTIVE)
  if ctx.gather is not None:
    policy = jax.checkpoint_policies.save_anything_except_these_names('gathered')
    return jax.checkpoint(layer, prevent_cse=rows == 1, policy=policy)
  return layer
