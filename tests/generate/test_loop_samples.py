"""Sampling with caches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lmscale.config import MeshConfig
from lmscale.models import model
from lmscale.models.context import plain_context
from lmscale.models.stacking import make_stacking
from lmscale.train.program import Program
from lmscale.train.stored import canonical

SHORT = tiny.change(tiny.MODEL, pattern='M*m-')
MESHES = {'one': MeshConfig(1, 1, 1, 0), 'mesh': MeshConfig(1, 4, 2, 3), 'cut groups': MeshConfig(1, 2, 4, 1, True)}


@pytest.mark.parametrize('mesh', MESHES.values(), ids=MESHES)
def test_greedy_decoding_is_the_argmax_of_the_whole_sequence(mesh):
  program = Program(tiny.config(mesh, SHORT), jax.devices()[: mesh.size])
  state = program.init()
  prompt = [5, 9, 2]
  out = program.generate(state, prompt, 6, temperature=0.0, seed=0)
  params = jax.tree.map(np.asarray, canonical(program.stored(state), program.index)['params'])
  params['layers'] = [params['layers'][str(i)] for i in range(len(params['layers']))]
  tokens = jnp.asarray([prompt + out[:-1]])
  hidden, _ = jax.jit(lambda p, t: model.forward(SHORT, p, t, plain_context(t)))(params, tokens)
  assert out == jnp.argmax(model.logits(SHORT, params, hidden[0, 2:]), axis=-1).tolist()


def test_temperature_and_seed():
  program = Program(tiny.config(model=tiny.change(tiny.MODEL, pattern='-')), jax.devices()[:1])
  state = program.init()
  draws = {seed: program.generate(state, [1], 12, 5.0, seed) for seed in (0, 1)}
  assert draws[0] != draws[1]
  assert draws[0] == program.generate(state, [1], 12, 5.0, 0)
  assert all(0 <= token < 40 for token in draws[0])
  cold = program.generate(state, [1], 12, 1e-6, 0)
  assert cold == program.generate(state, [1], 12, 0.0, 7)


def test_ids_beyond_the_tokenizer_are_never_drawn():
  """The vocabulary may have more rows than the tokenizer has ids."""
  program = Program(tiny.config(model=tiny.change(tiny.MODEL, pattern='-')), jax.devices()[:1])
  state = program.init()
  assert max(program.generate(state, [1], 60, 9.0, 0)) >= 7
  assert max(program.generate(state, [1], 60, 9.0, 0, ids=7)) < 7
  state.params['head']['kernel'] = state.params['head']['kernel'].at[:, 7:].multiply(100.0)
  assert max(program.generate(state, [1], 12, 0.0, 0, ids=7)) < 7


@pytest.mark.parametrize('dtype', ['bfloat16', 'float64'])
def test_samples_are_drawn_in_the_trained_numerics(dtype):
  """Greedy tokens are the argmax of a pass in the compute dtype; what is held is in that dtype."""
  short = tiny.change(tiny.MODEL, pattern='M*')
  with jax.enable_x64(dtype == 'float64'):
    program = Program(tiny.config(MeshConfig(1, 2, 1, 1), short, compute_dtype=dtype), jax.devices()[:2])
    state = program.init()
    held = program._run(program._compute_copy, state.params)
    full = [leaf.dtype for leaf in jax.tree.leaves(held) if leaf.dtype != dtype]
    assert {str(d) for d in full} <= {'float32'} and len(full) < len(jax.tree.leaves(held)) / 2
    out = program.generate(state, [5, 9, 2], 6, temperature=0.0, seed=0)
    tokens = jnp.asarray([[5, 9, 2, *out[:-1]]])
    ctx = plain_context(tokens)
    stacking = make_stacking(short.layers, 'unrolled')
    hidden, _ = jax.jit(lambda p, t: model.forward(short, p, t, ctx, None, stacking))(held, tokens)
    scores = model.logits(short, held, hidden[0, 2:])
    chosen = jnp.take_along_axis(scores, jnp.asarray(out)[:, None], axis=-1)[:, 0]
    bound = 2.0**-6 if dtype == 'bfloat16' else 1e-12  # one token at a time rounds in other places
    assert jnp.all(chosen >= scores.max(-1) - bound * jnp.abs(scores).max())


def _gathered(jaxpr):
  """(dims, dtype) of all that an all-gather takes."""
  found = set()
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'all_gather':
      found |= {(v.aval.ndim, str(v.aval.dtype)) for v in equation.invars}
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, 'eqns')):
      value = getattr(value, 'jaxpr', value)
      found |= _gathered(value) if hasattr(value, 'eqns') else set()
  return found


def test_what_a_sampler_holds_is_cast_before_it_is_gathered():
  """No float32 matrix crosses the mesh, and no second copy is made beside the compute copy."""
  config = tiny.config(MeshConfig(1, 8, 1, 3), tiny.change(tiny.MODEL, pattern='M-M-M-*-', d_model=64), compute_dtype='bfloat16')
  program = Program(config)
  with jax.set_mesh(program.mesh):
    compiled = program._compute_copy.lower(program.abstract_state().params).compile()
    jaxpr = jax.make_jaxpr(program._compute_copy)(program.abstract_state().params)
  gathered = _gathered(getattr(jaxpr, 'jaxpr', jaxpr))
  assert max(ndim for ndim, dtype in gathered if dtype == 'bfloat16') == 3
  assert max(ndim for ndim, dtype in gathered if dtype == 'float32') == 2  # stacked norms and decays
  out = jax.eval_shape(program._compute_copy, program.abstract_state().params)
  sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(out)]
  assert compiled.memory_analysis().output_size_in_bytes <= 1.02 * sum(sizes) + 64 * len(sizes)
