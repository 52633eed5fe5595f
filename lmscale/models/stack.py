"""The stack of layers: a pattern string executed as runs of repeated units.

The pattern is cut into runs, for instance `M-M-M-*-*-` into (`M-`, 3) and (`*-`, 2). The parameters of a run are stacked
along a leading dim and the run is one `lax.scan`. `unrolled` is the same code with every run of length 1.
In memory: runs[i][j] is the dict of unit position j of run i, each leaf [repeats, ...]. The canonical order, one dict per
layer, is the only stored one; `to_layers` and `from_layers` are exact inverses.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lmscale.config import ModelConfig
from lmscale.models.context import Context
from lmscale.models.layers import LAYERS
from lmscale.models.params import ParamSpec, declared_specs

Run = tuple[str, int]
Plan = tuple[Run, ...]


@functools.cache
def find_runs(layers: str) -> Plan:
  """Cuts a pattern into (unit, repeats) with the fewest distinct layer bodies, then the fewest runs.

  Dynamic programming over prefixes: cost of a cut is the summed length of its units.
  """
  best: list[tuple[int, int, Plan]] = [(0, 0, ())]
  for end in range(1, len(layers) + 1):
    options = []
    for start in range(end):
      cost, count, runs = best[start]
      for length in range(1, end - start + 1):
        repeats, rest = divmod(end - start, length)
        if rest == 0 and layers[start:end] == layers[start : start + length] * repeats:
          options.append((cost + length, count + 1, runs + ((layers[start : start + length], repeats),)))
          break  # the shortest period is the cheapest
    best.append(min(options, key=lambda option: option[:2]))
  return best[-1][2]


def make_plan(layers: str, mode: str) -> Plan:
  """The runs of a pattern: mode 'runs', or 'unrolled' for one run per layer."""
  return find_runs(layers) if mode == 'runs' else tuple((kind, 1) for kind in layers)


@functools.cache
def layer_specs(config: ModelConfig, kind: str) -> dict[str, ParamSpec]:
  """The parameters of one layer of `kind`."""
  x = jnp.zeros((1, 1, config.d_model))
  context = Context(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
  return declared_specs(LAYERS[kind](config), x, context, None)


def run_indices(plan: Plan) -> list[list[range]]:
  """Canonical layer indices of every unit position of every run, in stacking order."""
  indices, start = [], 0
  for unit, repeats in plan:
    stop = start + len(unit) * repeats
    indices.append([range(start + j, stop, len(unit)) for j in range(len(unit))])
    start = stop
  return indices


def from_layers(layers: list[Any], plan: Plan) -> tuple:
  """Canonical order -> runs: stacks the layers of each unit position. Inverse of `to_layers`."""

  def stacked(indices: range) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[layers[i] for i in indices])

  return tuple(tuple(stacked(indices) for indices in units) for units in run_indices(plan))


def to_layers(runs: tuple, plan: Plan) -> list[Any]:
  """Runs -> canonical order, one tree per layer. Inverse of `from_layers`."""
  layers: dict[int, Any] = {}
  for units, stacks in zip(run_indices(plan), runs, strict=True):
    for indices, stack in zip(units, stacks, strict=True):
      for row, index in enumerate(indices):
        layers[index] = jax.tree.map(lambda leaf, row=row: leaf[row], stack)
  return [layers[i] for i in range(len(layers))]


def apply_layer(
  config: ModelConfig, kind: str, params: Any, x_BTD: jax.Array, ctx: Context, cache: Any
) -> tuple[jax.Array, Any]:
  """One layer: brings its parameters together (ZeRO 3), then runs the module."""
  if ctx.gather is not None:
    params = ctx.gather(kind, params)
  return LAYERS[kind](config).apply({'params': params}, x_BTD, ctx, cache)


def apply_stack(
  config: ModelConfig, plan: Plan, runs: tuple, x_BTD: jax.Array, ctx: Context, caches: tuple | None, remat: str
) -> tuple[jax.Array, tuple | None]:
  """All layers. x: [b, t, d_model]; caches: None, or per run and unit position, stacked like the parameters.

  remat: 'full' keeps the input of each layer and recomputes the rest in the backward pass; 'selective' keeps
  what the projections give and recomputes the rest: norms, activations, convolutions, attention and the scans, which
  take much memory and little time (arXiv 2205.05198, section 5); 'none' keeps what each operation's derivative needs.
  Returns (x, caches).
  """
  new_caches = []
  for i, (unit, repeats) in enumerate(plan):
    body = functools.partial(_unit_body, config, unit, ctx, remat, repeats)
    inputs = (runs[i], caches[i] if caches is not None else tuple(None for _ in unit))
    if repeats == 1:
      x_BTD, cache = body(x_BTD, jax.tree.map(lambda leaf: leaf[0], inputs))
      cache = jax.tree.map(lambda leaf: leaf[None], cache)
    else:
      x_BTD, cache = jax.lax.scan(body, x_BTD, inputs)
    new_caches.append(cache)
  return x_BTD, None if caches is None else tuple(new_caches)


def _unit_body(
  config: ModelConfig, unit: str, ctx: Context, remat: str, repeats: int, x_BTD: jax.Array, inputs: tuple
) -> tuple[jax.Array, tuple]:
  params, caches = inputs
  new_caches = []
  for kind, layer_params, cache in zip(unit, params, caches, strict=True):

    def run(p, x, c, kind=kind):
      return apply_layer(config, kind, p, x, ctx, c)

    x_BTD, cache = _rematerialised(run, ctx, remat, repeats)(layer_params, x_BTD, cache)
    new_caches.append(cache)
  return x_BTD, tuple(new_caches)


# Of all matmuls, those with parameters are the ones without batch dims.
SELECTIVE = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


def _rematerialised(run: Any, ctx: Context, remat: str, repeats: int) -> Any:
  # Inside a scan the loop already keeps XLA from merging the recomputation with the forward pass; the barrier that
  # prevent_cse adds makes the GPU compiler copy each layer's weights inside the loop.
  if remat == 'full':
    return jax.checkpoint(run, prevent_cse=repeats == 1)
  if remat == 'selective':
    return jax.checkpoint(run, prevent_cse=repeats == 1, policy=SELECTIVE)
  if ctx.gather is not None:
    policy = jax.checkpoint_policies.save_anything_except_these_names('gathered')
    return jax.checkpoint(run, prevent_cse=repeats == 1, policy=policy)
  return run
