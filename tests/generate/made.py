"""Engines of tiny models with random weights, and what they must give by one pass over the whole sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from jax.sharding import NamedSharding

from lmscale.config import MeshConfig
from lmscale.generate.choose import Sampling, make_choose, row_keys
from lmscale.generate.engine import Engine
from lmscale.generate.weights import generation_setup
from lmscale.models import model
from lmscale.models.context import plain_context
from lmscale.models.stacking import from_layers, make_stacking
from lmscale.parallel.layout import map_layout

PATTERNS = {'transformer': '*-', 'mamba': 'mm', 'mamba2': 'MM', 'hybrid': 'M*m-'}
ONE = MeshConfig(1, 1, 1, 0)
LONGEST = 32


def config(arch, mesh=ONE, dtype='float64', **fields):
  return tiny.config(mesh, tiny.change(tiny.MODEL, pattern=PATTERNS[arch], **fields), compute_dtype=dtype)


@functools.cache
def canonical(arch, dtype='float64'):
  return model.init_layers(config(arch).model, 0, jnp.dtype(dtype))


@functools.cache
def engine(arch, mesh=ONE, dtype='float64'):
  """The same weights on any mesh."""
  setup = generation_setup(config(arch, mesh, dtype), jax.devices()[: mesh.size])
  params = canonical(arch, dtype)
  params = {**params, 'layers': from_layers(params['layers'], setup.stacking)}
  return Engine(setup, map_layout(lambda leaf, x: jax.device_put(x, NamedSharding(setup.mesh, leaf.stored)), setup.layout, params))


@functools.cache
def whole_pass(arch):
  """(tokens int32 [LONGEST], how many are read) -> logits [LONGEST, vocab], the caches after them: one pass, one row."""
  c = config(arch).model
  stacking = make_stacking(c.layers, 'unrolled')
  params = {**canonical(arch), 'layers': from_layers(canonical(arch)['layers'], stacking)}

  @jax.jit
  def run(tokens, count):
    ctx = plain_context(tokens[None], (jnp.arange(LONGEST) < count).astype(jnp.int32)[None])
    caches = model.empty_caches(c, stacking, 1, LONGEST, jnp.float64)
    hidden, caches = model.forward(c, params, tokens[None], ctx.replace(slots=jnp.zeros(1, jnp.int32)), caches, stacking)
    return model.logits(c, params, hidden[0]), jax.tree.map(lambda leaf: leaf[0], caches)

  return run


def oracle(arch, prompt, sampling, count, index=0, seed=0, ids=None, end=None):
  """The tokens after `prompt`, each from one pass over all tokens before it."""
  choose, found = jax.jit(make_choose(sampling, ids or 40)), []
  for number in range(count):
    tokens = np.array([*prompt, *found], np.int32)
    logits, _ = whole_pass(arch)(np.pad(tokens, (0, LONGEST - len(tokens))), len(tokens))
    keys = row_keys(jnp.int32(seed), jnp.array([index]), jnp.array([number]))
    found.append(int(choose(logits[len(tokens) - 1][None], keys)[0]))
    if found[-1] == end:
      break
  return found


GREEDY, DRAWN = Sampling(0.0), Sampling(1.5, 20, 0.9)
