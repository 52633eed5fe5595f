"""The loss of a large vocabulary without its logits: a few tokens at a time, gradients made on the way.

With p = softmax(h w), the gradient of the summed loss with respect to the logits is p - onehot(label). Once a chunk's
logits exist, both gradients cost one matmul each, so the differentiated call makes them in the forward pass (three
matmuls in all, nothing recomputed, no logits stored) and the backward pass only scales them by the scalar cotangent.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Constrain = Callable[[jax.Array, tuple[str, ...]], jax.Array]


def identity(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """The `constrain` of a program without a mesh."""
  del axes
  return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def total(x: jax.Array, axis: str) -> jax.Array:
  """The sum over a manual mesh axis of what its devices have. All go on with it alike: its gradient is that of each part."""
  return jax.lax.psum(x, axis)


total.defvjp(lambda x, axis: (jax.lax.psum(x, axis), None), lambda axis, _, ct: (ct,))


def cross_entropy(
  h: jax.Array,
  w: jax.Array,
  labels: jax.Array,
  *,
  chunk: int = 1024,
  constrain: Constrain = identity,
  axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Sums -log softmax(h w)[label] over the tokens whose label is not negative.

  The label is picked by comparing with an iota, so the vocabulary may be sharded. Differentiable once, in h and w.

  Args:
    h: [n, d]; the matmuls run in its dtype and accumulate in acc = promote_types(float32, h.dtype).
    w: [d, v]; its gradient is accumulated in acc and returned in w.dtype.
    labels: [n] integers below v; negative = ignored.
    chunk: at most so many tokens have logits at a time.
    constrain: called on the logits of a chunk and on their gradient with the logical axes ('tokens', 'vocab').
    axis: a manual mesh axis over which the columns of w are cut, in order; h, labels and what comes back are the same on all its
      devices, but for the gradient of w.

  Returns:
    The summed loss in nats, acc, shape (); the number of counted tokens, int32, shape ().

  Raises:
    ValueError: shapes that do not fit.
  """
  if h.ndim != 2 or w.ndim != 2 or h.shape[1] != w.shape[0] or labels.shape != h.shape[:1] or chunk < 1:
    raise ValueError(f'cross_entropy: h {h.shape}, w {w.shape}, labels {labels.shape} and chunk {chunk} do not fit')
  return _loss(h, w, labels, chunk, constrain, axis), jnp.sum(labels >= 0, dtype=jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _loss(h, w, labels, chunk, constrain, axis):
  acc = jnp.promote_types(jnp.float32, h.dtype)
  w = w.astype(h.dtype)

  def body(total, inputs):
    return total + _chunk_loss(*inputs, w, constrain, axis)[0], None

  return jax.lax.scan(body, jnp.zeros((), acc), _split(h, labels, chunk))[0]


def _loss_fwd(h, w, labels, chunk, constrain, axis):
  acc = jnp.promote_types(jnp.float32, h.dtype)
  w_cast = w.astype(h.dtype)

  def body(carry, inputs):
    total, dw = carry
    loss, dlogits = _chunk_loss(*inputs, w_cast, constrain, axis)
    dlogits = constrain(dlogits.astype(h.dtype), ('tokens', 'vocab'))
    dh = _sum(jnp.einsum('nv,dv->nd', dlogits, w_cast, preferred_element_type=acc), axis).astype(h.dtype)
    dw = dw + jnp.einsum('nd,nv->dv', inputs[0], dlogits, preferred_element_type=acc)
    return (total + loss, dw), dh

  start = (jnp.zeros((), acc), jnp.zeros(w.shape, acc))
  (total, dw), dh = jax.lax.scan(body, start, _split(h, labels, chunk))
  return total, (dh.reshape(-1, h.shape[1])[: h.shape[0]], dw, jnp.zeros((), w.dtype))


def _loss_bwd(chunk, constrain, axis, gradients, cotangent):
  del chunk, constrain, axis
  dh, dw, like_w = gradients
  return (cotangent * dh).astype(dh.dtype), (cotangent * dw).astype(like_w.dtype), None


_loss.defvjp(_loss_fwd, _loss_bwd)


def _split(h, labels, chunk):
  """[n, d] and [n] -> [chunks, m, d] and [chunks, m] with m <= chunk; rows that fill up have label -1."""
  n, d = h.shape
  chunks = -(-n // chunk)
  pad = -n % chunks
  h, labels = jnp.pad(h, ((0, pad), (0, 0))), jnp.pad(labels, (0, pad), constant_values=-1)
  return h.reshape(chunks, -1, d), labels.reshape(chunks, -1)


def _sum(x, axis):
  return x if axis is None else jax.lax.psum(x, axis)


def _chunk_loss(h, labels, w, constrain, axis):
  """The summed loss of one chunk and its gradient with respect to the logits [m, v], in acc."""
  acc = jnp.promote_types(jnp.float32, h.dtype)
  logits = constrain(jnp.einsum('nd,dv->nv', h, w, preferred_element_type=acc), ('tokens', 'vocab'))
  most = jnp.max(logits, axis=-1, keepdims=True)
  shifted = logits - (most if axis is None else jax.lax.pmax(most, axis))
  exp = jnp.exp(shifted)
  counted = labels >= 0
  mine = labels if axis is None else labels - jax.lax.axis_index(axis) * w.shape[1]
  picked = mine[:, None] == jax.lax.broadcasted_iota(labels.dtype, logits.shape, 1)
  sums = jnp.sum(exp, axis=-1), jnp.sum(jnp.where(picked, shifted, 0), axis=-1)
  norm, label_logit = sums if axis is None else jax.lax.psum(jnp.stack(sums), axis)
  loss = jnp.sum(jnp.where(counted, jnp.log(norm) - label_logit, 0))
  return loss, jnp.where(counted[:, None], exp / norm[:, None] - picked, 0)
