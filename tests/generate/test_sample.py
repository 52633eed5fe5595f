"""Sampling with caches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lmscale.config import MeshConfig
from lmscale.models import model
from lmscale.models.context import plain_context
from lmscale.train.program import Program
from lmscale.train.stored import canonical

MESHES = {'one': MeshConfig(1, 1, 1, 0), 'mesh': MeshConfig(1, 4, 2, 3), 'cut groups': MeshConfig(1, 2, 4, 1, True)}


@pytest.mark.parametrize('mesh', MESHES.values(), ids=MESHES)
def test_greedy_decoding_is_the_argmax_of_the_whole_sequence(mesh):
  program = Program(tiny.config(mesh), jax.devices()[: mesh.size])
  state = program.init()
  prompt = [5, 9, 2]
  out = program.generate(state, prompt, 6, temperature=0.0, seed=0)
  params = jax.tree.map(np.asarray, canonical(program.stored(state), program.index)['params'])
  params['layers'] = [params['layers'][str(i)] for i in range(len(params['layers']))]
  tokens = jnp.asarray([prompt + out[:-1]])
  hidden, _ = jax.jit(lambda p, t: model.forward(tiny.MODEL, p, t, plain_context(t)))(params, tokens)
  assert out == jnp.argmax(model.logits(tiny.MODEL, params, hidden[0, 2:]), axis=-1).tolist()


def test_temperature_and_seed():
  program = Program(tiny.config(model=tiny.change(tiny.MODEL, pattern='-')), jax.devices()[:1])
  state = program.init()
  draws = {seed: program.generate(state, [1], 12, 5.0, seed) for seed in (0, 1)}
  assert draws[0] != draws[1]
  assert draws[0] == program.generate(state, [1], 12, 5.0, 0)
  assert all(0 <= token < 40 for token in draws[0])
  cold = program.generate(state, [1], 12, 1e-6, 0)
  assert cold == program.generate(state, [1], 12, 0.0, 7)
