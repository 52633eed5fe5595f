"""Sampling from a model with caches: one prefill of the prompt, then one token at a time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lmscale.config import Config
from lmscale.models import model, stack
from lmscale.models.context import Context
from lmscale.parallel.rules import make_constrain, make_local, make_rules


def make_generate(
  config: Config, runs: stack.Plan, dtype: Any, prompt: int, steps: int, temperature: float
) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
  """(params stacked by `runs`, tokens int32 [b, prompt], key) -> int32 [b, steps], the tokens after the prompt.

  Attention reads a KV cache, Mamba layers carry their convolution window and state, so a step costs the same at any
  length in a Mamba layer. temperature 0 takes the most likely token, else the logits are divided by it. The layers are
  unrolled: without a gradient there is nothing to gain from stacking them. On a mesh it runs where the step does, inside a
  shard_map over all axes but `tensor`.
  """
  plan = stack.make_plan(config.model.layers, 'unrolled')
  # A prompt need not divide by `tensor`, and one token cannot be cut.
  config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, sequence_parallel=False))
  rules = make_rules(config)
  hooks = {'constrain': make_constrain(config, rules), 'local': make_local(config, rules), 'tensor': config.mesh.tensor}

  def used(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(jnp.float32, dtype))

  def generate(params: Any, tokens: jax.Array, key: jax.Array) -> jax.Array:
    layers = stack.from_layers(stack.to_layers(params['layers'], runs), plan)
    params = jax.tree.map(used, {**params, 'layers': layers})
    caches = model.empty_caches(config.model, plan, tokens.shape[0], prompt + steps, used(jnp.zeros(())).dtype)

    def advance(tokens: jax.Array, start: jax.Array | int, caches: Any, key: jax.Array) -> tuple[jax.Array, Any]:
      positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
      hidden, caches = model.forward(config.model, params, tokens, Context(positions, **hooks), caches, plan)
      return _pick(model.logits(config.model, params, hidden[:, -1]), temperature, key), caches

    def one(carry: tuple, i: jax.Array) -> tuple[tuple, jax.Array]:
      token, caches = carry
      new, caches = advance(token[:, None], prompt + i, caches, jax.random.fold_in(key, i + 1))
      return (new, caches), token

    first, caches = advance(tokens, 0, caches, jax.random.fold_in(key, 0))
    (last, _), out = jax.lax.scan(one, (first, caches), jnp.arange(steps - 1))
    return jnp.concatenate([out.T, last[:, None]], axis=1)

  return generate


def _pick(logits_BV: jax.Array, temperature: float, key: jax.Array) -> jax.Array:
  if temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  return jax.random.categorical(key, logits_BV / temperature).astype(jnp.int32)
