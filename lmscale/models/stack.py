"""The stack of layers, executed run by run: a run is one `lax.scan` over the rows of its stacks (see `stacking`).

`unrolled` is the same code with every run of one row.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

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
  return declared_specs(LAYERS[kind](_by_xla(config)), x, context, None)


def _by_xla(config: ModelConfig) -> ModelConfig:
  """With kernels that take any shape and dtype: parameters do not depend on them."""
  sections = {layer.section: getattr(config, layer.section) for layer in LAYERS.values()}
  named = {name: dataclasses.replace(section, implementation='xla') for name, section in sections.items() if hasattr(section, 'implementation')}
  return dataclasses.replace(config, **named)


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

  remat: 'full' keeps the input of each block (see `blocks`) and recomputes the rest in the backward pass; 'selective' keeps the
  input of each layer, what the projections into its mixer give and what attention gives, and recomputes the rest: norms,
  activations, convolutions and scans, which take much memory and few FLOPs (arXiv 2205.05198, section 5, where attention is
  among them: its scores, which no kernel here keeps); 'none' keeps what each operation's derivative needs.
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


def blocks(unit: str, remat: str) -> list[str]:
  """The layers of a run's unit in the parts that are recomputed as one. Under `full` an MLP goes with the mixer beside it, as in
  a Transformer's block: one input is kept for both."""
  found: list[str] = []
  for kind in unit:
    if remat == 'full' and found and len(found[-1]) == 1 and (kind == '-') != (found[-1] == '-'):
      found[-1] += kind
    else:
      found.append(kind)
  return found


def _unit_body(
  config: ModelConfig, run: Run, ctx: Context, remat: str, rows: int, x_BTD: jax.Array, inputs: tuple
) -> tuple[jax.Array, tuple]:
  params, caches = inputs
  new_caches: tuple = ()
  for kinds in blocks(''.join(stack.kind for stack in run), remat):
    part = slice(len(new_caches), len(new_caches) + len(kinds))
    block = functools.partial(_apply_block, config, kinds, ctx)
    x_BTD, block_caches = _rematerialised(block, ctx, remat, rows)(params[part], x_BTD, caches[part])
    new_caches += block_caches
  return x_BTD, new_caches


def _apply_block(
  config: ModelConfig, kinds: str, ctx: Context, params: tuple, x_BTD: jax.Array, caches: tuple
) -> tuple[jax.Array, tuple]:
  new_caches = []
  for kind, layer_params, cache in zip(kinds, params, caches, strict=True):
    x_BTD, cache = apply_layer(config, kind, layer_params, x_BTD, ctx, cache)
    new_caches.append(cache)
  return x_BTD, tuple(new_caches)


CUDNN = 'dot_product_attention_fwd_wrapper'  # JAX's primitive: its result, and the sums its own backward pass needs
SELECTIVE = jax.checkpoint_policies.save_from_both_policies(
  jax.checkpoint_policies.save_only_these_names(PROJECTION, 'attention'),
  lambda primitive, *_, **__: primitive.name == CUDNN,
)


def _rematerialised(block: Any, ctx: Context, remat: str, rows: int) -> Any:
  # Inside a scan the loop already keeps XLA from merging the recomputation with the forward pass; the barrier that
  # prevent_cse adds makes the GPU compiler copy each layer's weights inside the loop.
  if remat == 'full':
    return jax.checkpoint(block, prevent_cse=rows == 1)
  if remat == 'selective':
    return jax.checkpoint(block, prevent_cse=rows == 1, policy=SELECTIVE)
  if ctx.gather is not None:
    return jax.checkpoint(block, prevent_cse=rows == 1, policy=_all_but_gathered)
  return block


def _all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
  """Keeps everything but the parameters that ZeRO 3 has brought together: neither what is named so nor what it is the name of."""
  return params.get('name') != 'gathered' and not _gathers(params)


def _gathers(params: dict[str, Any]) -> bool:
  """Whether an operation with these parameters calls a function that gathers over the mesh."""
  inner = (equation for jaxpr in core.jaxprs_in_params(params) for equation in jaxpr.eqns)
  return any(equation.primitive.name == 'all_gather' or _gathers(equation.params) for equation in inner)
