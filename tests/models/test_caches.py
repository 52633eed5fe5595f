"""Caches: any cut of packed rows into chunks, padded anywhere, gives what one pass over the rows gives, row by row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lmscale.config import LAYER_KINDS, MeshConfig
from lmscale.config.checks import USES
from lmscale.models import model, stack
from lmscale.models.context import Context
from lmscale.models.layers import LAYERS
from lmscale.models.stacking import from_layers, make_stacking
from lmscale.parallel.rules import make_rules, partition

DOCUMENTS = [(5, 9), (3, 1, 10), (14,), (1, 2, 11)]  # lengths; the last of each row goes on while others decode
# Where the padding is: per chunk its width (2 and 1 are shorter than the convolution) and how many tokens each row gets.
CUTS = {
  'right': [(6, (6, 3, 4, 1)), (6, (5, 6, 1, 3)), (1, (1, 1, 1, 1)), (1, (1, 1, 1, 1))],
  'left': [(6, (5, 3, 6, 2)), (6, (4, 6, 2, 5)), (1, (1, 1, 1, 1)), (1, (1, 1, 1, 1))],
  'anywhere': [(6, (5, 1, 4, 3)), (2, (0, 2, 1, 2)), (6, (6, 3, 0, 4)), (2, (1, 2, 1, 0)), (1, (1, 1, 1, 1))],
}
LENGTH = 16


def _config(kind):
  return tiny.change(tiny.MODEL, pattern=kind, positions='rope')


@functools.cache
def _setup(kind):
  """(params, forward of chunks, tokens, positions, segments, hidden states of one pass without a cache), in float64."""
  config = _config(kind)
  plan = make_stacking(config.layers, 'unrolled')
  params = model.init_layers(config, 0, jnp.float64)
  params['layers'] = from_layers(params['layers'], plan)
  tokens = np.random.default_rng(0).integers(0, config.vocab, (4, 14)).astype(np.int32)
  segments = np.stack([np.repeat(np.arange(1, len(row) + 1), row) for row in DOCUMENTS])
  positions = np.stack([np.concatenate([np.arange(n) for n in row]) for row in DOCUMENTS])

  @jax.jit
  def forward(tokens, positions, segments, slots, caches):
    return model.forward(config, params, tokens, Context(positions, segments, slots), caches, plan)

  whole, _ = forward(tokens, positions, segments, None, None)
  return config, plan, forward, (tokens, positions, segments), np.asarray(whole)


def _places(padding, width, count, rng):
  """Where in a row of `width` its `count` tokens stand."""
  if padding == 'anywhere':
    return np.sort(rng.permutation(width)[:count])
  return np.arange(count) + (width - count if padding == 'left' else 0)


@pytest.mark.parametrize('kind', 'Mm*')
def test_chunks_with_padding_equal_one_pass(kind):
  with jax.enable_x64(True):
    config, plan, forward, rows, whole = _setup(kind)
    for padding, chunks in CUTS.items():
      rng = np.random.default_rng(1)
      caches = model.empty_caches(config, plan, 4, LENGTH, jnp.float64)
      done = np.zeros(4, np.int32)
      for width, counts in chunks:
        # Padding is of no token, not even a valid one's number.
        tokens, positions, segments = np.full((4, width), 7, np.int32), np.zeros((4, width), int), np.zeros((4, width), int)
        at = [_places(padding, width, count, rng) for count in counts]
        for row, places in enumerate(at):
          for chunk, values in zip((tokens, positions, segments), rows, strict=True):
            chunk[row, places] = values[row, done[row] : done[row] + len(places)]
        decoding = width == 1
        hidden, caches = forward(tokens, positions, None if decoding else segments, done, caches)
        for row, places in enumerate(at):
          want = whole[row, done[row] : done[row] + len(places)]
          np.testing.assert_allclose(hidden[row, places], want, atol=1e-10, err_msg=f'{padding}, row {row} at {done[row]}')
          done[row] += len(places)


def test_a_full_cache_is_never_overwritten():
  with jax.enable_x64(True):
    config, plan, forward, (tokens, *_), _ = _setup('*')
    plain = np.arange(14, dtype=np.int32)[None].repeat(4, 0)
    whole, full = forward(tokens, plain, np.ones_like(plain), np.zeros(4, int), model.empty_caches(config, plan, 4, 14, jnp.float64))
    start = np.array([10, 12, 13, 14], np.int32)  # 4, 2, 1 and 0 of the 4 tokens have a place
    part = np.stack([np.pad(tokens[row, s:], (0, 4 - (14 - s)))[:4] for row, s in enumerate(start)])
    hidden, caches = forward(part, start[:, None] + np.arange(4), None, start, full)
    for row, s in enumerate(start):
      np.testing.assert_allclose(hidden[row, : 14 - s], whole[row, s:], atol=1e-10)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-10), caches, full)
    with pytest.raises(ValueError, match='14 tokens at a time do not fit in a cache for 8'):
      forward(tokens, plain, None, start, model.empty_caches(config, plan, 4, 8, jnp.float64))
    with pytest.raises(ValueError, match='a cache needs Context.slots'):
      forward(tokens, plain, None, None, full)


def test_a_kind_is_one_class_that_agrees_with_the_config():
  assert {symbol: layer.title for symbol, layer in LAYERS.items()} == LAYER_KINDS
  assert {f'model.{layer.section}': symbol for symbol, layer in LAYERS.items()} == USES
  assert all(hasattr(tiny.MODEL, layer.section) for layer in LAYERS.values())


def specs_as_arrays(specs):
  return {name: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for name, spec in specs.items()}


@pytest.mark.parametrize('kind', LAYER_KINDS)
def test_cache_specs_describe_the_caches(kind):
  for dtype, acc in (('bfloat16', 'float32'), ('float32', 'float32')):
    config = _config(kind)
    specs = LAYERS[kind].cache_specs(config, 3, 8, jnp.dtype(dtype))
    params = {
      name: jax.ShapeDtypeStruct(spec.shape, acc if spec.full_precision else dtype)
      for name, spec in stack.layer_specs(config, kind).items()
    }
    x = jax.ShapeDtypeStruct((3, 2, 16), dtype)
    ctx = Context(jnp.zeros((3, 2), jnp.int32), slots=jnp.zeros(3, jnp.int32))
    _, cache = jax.eval_shape(functools.partial(stack.apply_layer, config, kind), params, x, ctx, specs_as_arrays(specs))
    cache = cache or {}
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in cache.items()} == {
      name: (spec.shape, spec.dtype) for name, spec in specs.items()
    }
    for name, spec in specs.items():
      assert spec.axes[0] == 'batch' and spec.shape[0] == 3 and len(spec.axes) == len(spec.shape), name
      for tensor in (1, 2, 4, 8):  # two groups and two KV heads: cut by 2, whole where 4 and 8 do not divide them
        cut = partition(spec.axes, make_rules(tiny.config(MeshConfig(1, 1, tensor, 0), config)))
        assert all(size % (tensor if axis == 'tensor' else 1) == 0 for size, axis in zip(spec.shape, cut, strict=True)), name
