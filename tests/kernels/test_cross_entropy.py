"""Cross-entropy against full-logits log_softmax: value, gradients, memory, sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmscale.kernels.cross_entropy import cross_entropy

N, D, V = 21, 5, 11


def make(dtype=np.float64, n=N, d=D, v=V):
  rng = np.random.default_rng(0)
  labels = rng.integers(0, v, n)
  labels[rng.random(n) < 0.2] = -1
  return jnp.asarray(rng.normal(size=(n, d)), dtype), jnp.asarray(rng.normal(size=(d, v)), dtype), labels


def full(h, w, labels):
  """The definition, with all logits."""
  log_p = jax.nn.log_softmax(h @ w)
  return -jnp.sum(jnp.where(labels >= 0, jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0], 0))


@pytest.mark.parametrize('chunk', [1, 4, 7, 1000])
def test_matches_full_logits(chunk, assert_close):
  with jax.enable_x64(True):
    h, w, labels = make()

    def ours(h, w):
      loss, count = cross_entropy(h, w, labels, chunk=chunk)
      return 0.7 * loss, count

    want = jax.value_and_grad(lambda h, w: 0.7 * full(h, w, labels), (0, 1))(h, w)
    (loss, count), grad = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(h, w)
    assert_close((loss, grad), want, 1e-12)
    assert_close(ours(h, w)[0], want[0], 1e-13)
    assert count == np.sum(labels >= 0)
    assert count.dtype == np.int32
    assert np.all(np.asarray(grad[0])[labels < 0] == 0)


def test_float32_with_large_logits(assert_close):
  h, w, labels = make(np.float32)
  h = 100 * h
  got = jax.value_and_grad(lambda h, w: cross_entropy(h, w, labels, chunk=4)[0], (0, 1))(h, w)
  with jax.enable_x64(True):
    h, w = (jnp.asarray(a, jnp.float64) for a in (h, w))
    want = jax.value_and_grad(full, (0, 1))(h, w, labels)
  assert_close(got, want, 1e-5)


def test_all_labels_ignored():
  h, w, _ = make(np.float32)
  labels = np.full(N, -1)
  assert cross_entropy(h, w, labels, chunk=4) == (0, 0)
  for grad in jax.grad(lambda h, w: cross_entropy(h, w, labels, chunk=4)[0], (0, 1))(h, w):
    assert np.all(np.asarray(grad) == 0)


@pytest.mark.parametrize('w_dtype', [jnp.bfloat16, jnp.float32])
def test_bfloat16(w_dtype, assert_close):
  h, w, labels = make(jnp.bfloat16, n=64)
  w = w.astype(w_dtype)
  loss, grad = jax.value_and_grad(lambda h, w: cross_entropy(h, w, labels, chunk=16)[0], (0, 1))(h, w)
  assert (loss.dtype, grad[0].dtype, grad[1].dtype) == (jnp.float32, jnp.bfloat16, w_dtype)
  with jax.enable_x64(True):
    h, w = (jnp.asarray(a, jnp.float64) for a in (h, w))
    want = jax.value_and_grad(full, (0, 1))(h, w, labels)
  assert_close((loss, grad), want, 1e-2)


def test_never_holds_all_logits(largest_array):
  h, w, labels = make(np.float32, n=64, d=4, v=32)

  def size(function):
    return largest_array(jax.value_and_grad(function, (0, 1)), h, w, labels)

  assert size(lambda h, w, labels: cross_entropy(h, w, labels, chunk=16)[0]) < 64 * 32
  assert size(full) >= 64 * 32  # the check can fail


def test_value_alone_makes_no_gradients():
  """One matmul without differentiation, three with."""
  h, w, labels = make(np.float32)

  def matmuls(function):
    return str(jax.make_jaxpr(function)(h, w)).count('dot_general[')

  def loss(h, w):
    return cross_entropy(h, w, labels, chunk=4)[0]

  assert matmuls(loss) == 1
  assert matmuls(jax.grad(loss, (0, 1))) == 3


def test_constrains_the_logits_of_either_call():
  h, w, labels = make(np.float32)
  calls = []

  def constrain(x, axes):
    calls.append((x.shape, axes))
    return x

  def loss(h):
    return cross_entropy(h, w, labels, chunk=7, constrain=constrain)[0]

  jax.make_jaxpr(loss)(h)
  assert set(calls) == {((7, V), ('tokens', 'vocab'))}
  calls.clear()
  jax.make_jaxpr(jax.grad(loss))(h)
  assert len(calls) >= 2  # the logits and their gradient
  assert set(calls) == {((7, V), ('tokens', 'vocab'))}


def test_inside_loops_and_shard_map(assert_close):
  """As the training step uses it: manual over `data`, vocabulary on `tensor` by the compiler, in a loop."""
  mesh = jax.make_mesh((2, 4), ('data', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  h, w, labels = make(np.float32, n=48, d=8, v=64)

  def constrain(x, axes):
    assert axes == ('tokens', 'vocab')
    return jax.lax.with_sharding_constraint(x, P(None, 'tensor'))

  def local(w, h, labels):
    def body(total, microbatch):
      loss, grad = jax.value_and_grad(
        lambda w: cross_entropy(microbatch[0], w, microbatch[1], chunk=4, constrain=constrain)[0]
      )(w)
      return (total[0] + loss, total[1] + grad), None

    parts = h.reshape(3, -1, 8), labels.reshape(3, -1)
    total, _ = jax.lax.scan(body, (jnp.zeros(()), jnp.zeros_like(w)), parts)
    return jax.lax.psum(total, 'data')

  step = jax.jit(
    jax.shard_map(local, mesh=mesh, axis_names={'data'}, check_vma=False,
                  in_specs=(P(), P('data'), P('data')), out_specs=(P(), P())),
    out_shardings=(NamedSharding(mesh, P()), NamedSharding(mesh, P(None, 'tensor'))),
  )  # fmt: skip
  placed = [jax.device_put(a, NamedSharding(mesh, spec))
            for a, spec in ((w, P(None, 'tensor')), (h, P('data')), (labels, P('data')))]  # fmt: skip
  with jax.set_mesh(mesh):
    compiled = step.lower(*placed).compile()
    got = compiled(*placed)
  want = jax.value_and_grad(lambda w: full(h, w, labels))(w)
  assert_close(got, want, 1e-5)
  text = compiled.as_text()
  assert 'all-gather' not in text and 'all-to-all' not in text
  assert 'f32[8,64]' not in text, 'the gradient of w is not sharded'
  assert 'f32[8,16]' in text


def test_shapes_that_do_not_fit_are_one_clear_line():
  h, w, labels = make(np.float32)
  with pytest.raises(ValueError, match='cross_entropy: h .* do not fit'):
    cross_entropy(h, w.T, labels)
