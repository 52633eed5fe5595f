"""Sampling from a model with caches: one prefill of the prompt, then one token at a time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmscale.models import model
from lmscale.models.context import Context
from lmscale.models.stacking import from_layers, make_stacking, to_layers
from lmscale.parallel import zero
from lmscale.parallel.layout import map_layout
from lmscale.parallel.mesh import MANUAL
from lmscale.parallel.rules import make_constrain, make_local, make_rules
from lmscale.parallel.setup import Setup


def make_compute_copy(setup: Setup) -> Callable[[Any], Any]:
  """(params) -> the parameters that a sampler uses: in the compute dtype, cast before they are gathered over `data`.

  Layers are unrolled: without a gradient there is nothing to gain from stacking them. Those of all stages of a pipeline are
  brought together, so each device holds the whole model (its `tensor` share of it).
  """
  unrolled = make_stacking(setup.config.model.layers, 'unrolled')

  def copy(params: Any) -> Any:
    used = zero.gather_stages(setup.layout, zero.gather_once(setup.layout, params, setup.dtype))
    return {**used, 'layers': from_layers(to_layers(used['layers'], setup.stacking), unrolled)}

  return _over_mesh(setup, copy, (map_layout(lambda leaf: leaf.manual, setup.layout),))


def make_generate(
  setup: Setup, prompt: int, steps: int, temperature: float, ids: int | None = None
) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
  """(compute copy, tokens int32 [b, prompt], key) -> int32 [b, steps], the tokens after the prompt.

  Attention reads a KV cache, Mamba layers carry their convolution window and state, so a step costs the same at any
  length in a Mamba layer. temperature 0 takes the most likely token, else the logits are divided by it. ids: the
  tokenizer's size; the rows that the vocabulary has beyond it are never drawn. On a mesh it runs where the step does,
  inside a shard_map over all axes but `tensor`.
  """
  config = setup.config
  stacking = make_stacking(config.model.layers, 'unrolled')
  # A prompt need not divide by `tensor`, and one token cannot be cut.
  rules = make_rules(dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, sequence_parallel=False)))
  hooks = {'constrain': make_constrain(config, rules), 'local': make_local(config, rules), 'tensor': config.mesh.tensor}

  def generate(params: Any, tokens: jax.Array, key: jax.Array) -> jax.Array:
    caches = model.empty_caches(config.model, stacking, tokens.shape[0], prompt + steps, setup.dtype)

    def advance(tokens: jax.Array, start: jax.Array | int, caches: Any, key: jax.Array) -> tuple[jax.Array, Any]:
      positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
      ctx = Context(positions, slots=positions[:, 0], **hooks)
      hidden, caches = model.forward(config.model, params, tokens, ctx, caches, stacking)
      return _pick(model.logits(config.model, params, hidden[:, -1]), temperature, key, ids), caches

    def one(carry: tuple, i: jax.Array) -> tuple[tuple, jax.Array]:
      token, caches = carry
      new, caches = advance(token[:, None], prompt + i, caches, jax.random.fold_in(key, i + 1))
      return (new, caches), token

    first, caches = advance(tokens, 0, caches, jax.random.fold_in(key, 0))
    (last, _), out = jax.lax.scan(one, (first, caches), jnp.arange(steps - 1, dtype=jnp.int32))
    return jnp.concatenate([out.T, last[:, None]], axis=1)

  return _over_mesh(setup, generate, PartitionSpec())


def _pick(logits_BV: jax.Array, temperature: float, key: jax.Array, ids: int | None) -> jax.Array:
  logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < (ids or logits_BV.shape[-1]), logits_BV, -jnp.inf)
  if temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  return jax.random.categorical(key, logits_BV / temperature).astype(jnp.int32)


def _over_mesh(setup: Setup, function: Callable, in_specs: Any) -> Callable:
  return jax.shard_map(
    function, mesh=setup.mesh, in_specs=in_specs, out_specs=PartitionSpec(), axis_names=set(MANUAL), check_vma=False
  )
