"""The causal depthwise convolution in front of both Mamba mixers, as shifted multiply-adds (XLA fuses them).

Between the passes only the inputs are kept, in their own dtypes: the backward pass makes the sums again, as SiLU's
derivative costs less than the memory of a float32 array per token and channel.
"""

import jax
import jax.numpy as jnp

from lmscale.kernels import segments


def causal_conv(
  x: jax.Array,
  weight: jax.Array,
  bias: jax.Array | None,
  *,
  initial_window: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """silu(bias + sum_i weight[i] x[t - (k - 1) + i]) over the taps in token t's document (arXiv 2312.00752, section 3.4).

  Args:
    x: [b, l, c].
    weight: [k, c]; weight[k - 1] multiplies the current token.
    bias: [c] or None.
    initial_window: [b, k - 1, c], the tokens before x, of the document of the first real token; zeros if None.
    segment_ids: [b, l], 0 = padding, which outputs zero and is never a tap.

  Returns:
    y [b, l, c] in x.dtype (sums and SiLU, and the sums of the gradients, in acc = promote_types(float32, x.dtype)),
    and the window [b, k - 1, c] in x.dtype with which the last document goes on: the k - 1 tokens up to the last real
    one, those of other documents and padding as zeros.

  Raises:
    ValueError: shapes that do not fit.
  """
  b, l, c = x.shape
  k = weight.shape[0]
  shapes = {'weight': (weight, (k, c)), 'bias': (bias, (c,)), 'initial_window': (initial_window, (b, k - 1, c)),
            'segment_ids': (segment_ids, (b, l))}  # fmt: skip
  for name, (value, shape) in shapes.items():
    if value is not None and value.shape != shape:
      raise ValueError(f'causal_conv: {name} has shape {value.shape}, but x {x.shape} needs {shape}')
  window = jnp.zeros((b, k - 1, c), x.dtype) if initial_window is None else initial_window.astype(x.dtype)
  return _conv(x, weight, bias, window, segment_ids), _final_window(x, window, segment_ids)


@jax.custom_vjp
def _conv(x, weight, bias, window, segment_ids):
  """y of `causal_conv`."""
  weight = _whole(weight)
  y = jax.nn.silu(_sums(_taps(x, weight, window, segment_ids), weight, bias))
  return _real(y, segment_ids).astype(x.dtype)


def _conv_fwd(*inputs):
  return _conv(*inputs), inputs


def _conv_bwd(inputs, dy):
  x, weight, bias, window, segment_ids = inputs
  k, dtype = len(weight), weight.dtype
  weight = _whole(weight)
  taps = _taps(x, weight, window, segment_ids)
  _, silu_vjp = jax.vjp(jax.nn.silu, _sums(taps, weight, bias))
  (dsum,) = silu_vjp(_real(dy.astype(taps[0].dtype), segment_ids))
  dtokens = 0
  for i, visible in enumerate(_visible(segment_ids, k)):
    dtap = weight[i].astype(dsum.dtype) * dsum
    dtap = dtap if visible is None else jnp.where(visible, dtap, 0)
    dtokens += jnp.pad(dtap, ((0, 0), (i, k - 1 - i), (0, 0)))
  dweight = jnp.stack([jnp.sum(dsum * tap, (0, 1)) for tap in taps]).astype(dtype)
  dbias = None if bias is None else jnp.sum(dsum, (0, 1)).astype(bias.dtype)
  dtokens = dtokens.astype(x.dtype)
  return dtokens[:, k - 1 :], dweight, dbias, dtokens[:, : k - 1], None


_conv.defvjp(_conv_fwd, _conv_bwd)


def _whole(weight):
  """The weight, unchanged, in acc, as a matrix product: in a loop over layers XLA for CPUs would cut it out of all layers'
  weights once more for every number it multiplies, which takes longer than the convolution."""
  acc = jnp.promote_types(jnp.float32, weight.dtype)
  identity = jnp.eye(len(weight), dtype=weight.dtype)
  return jnp.matmul(identity, weight, precision=jax.lax.Precision.HIGHEST, preferred_element_type=acc)


def _taps(x, weight, window, segment_ids):
  """k arrays [b, l, c] in acc: what weight[i] multiplies, zero where it is of another document or padding."""
  acc = jnp.promote_types(jnp.float32, x.dtype)
  tokens = jnp.concatenate([window, x], axis=1)
  taps = [tokens[:, i : i + x.shape[1]].astype(acc) for i in range(len(weight))]
  visible = _visible(segment_ids, len(weight))
  return [tap if mask is None else jnp.where(mask, tap, 0) for tap, mask in zip(taps, visible, strict=True)]


def _sums(taps, weight, bias):
  acc = taps[0].dtype
  start = jnp.zeros((), acc) if bias is None else bias.astype(acc)
  return sum((weight[i].astype(acc) * tap for i, tap in enumerate(taps)), start)


def _visible(segment_ids, k):
  """k masks [b, l, 1]: whether tap i of a token is of the token's document; None everywhere without segments."""
  if segment_ids is None:
    return [None] * k
  document, usable, _ = _tokens(segment_ids, k)
  l = segment_ids.shape[1]
  same = [(document[:, i : i + l] == document[:, k - 1 :]) & usable[:, i : i + l] for i in range(k)]
  return [mask[..., None] for mask in same]


def _tokens(segment_ids, k):
  """document and usable [b, k - 1 + l] of the window and x, and real [b, l]."""
  document, real = segments.documents(segment_ids)
  usable = jnp.pad(real, ((0, 0), (k - 1, 0)), constant_values=True)
  return jnp.pad(document, ((0, 0), (k - 1, 0))), usable, real


def _real(y, segment_ids):
  return y if segment_ids is None else jnp.where((segment_ids != 0)[..., None], y, 0)


def _final_window(x, window, segment_ids):
  """[b, k - 1, c]: the k - 1 tokens that end at the last real token of each row, see `causal_conv`."""
  tokens = jnp.concatenate([window, x], axis=1)
  if segment_ids is None:
    return tokens[:, x.shape[1] :]
  k = window.shape[1] + 1
  document, usable, real = _tokens(segment_ids, k)
  length = jnp.max(jnp.where(real, jnp.arange(1, real.shape[1] + 1), 0), axis=1)
  index = length[:, None] + jnp.arange(k - 1)
  last = document[:, -1:]  # padding has the number of the document before it
  keep = jnp.take_along_axis((document == last) & usable, index, axis=1)
  return jnp.where(keep[..., None], jnp.take_along_axis(tokens, index[..., None], axis=1), 0)
