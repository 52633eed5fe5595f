"""The causal depthwise convolution in front of both Mamba mixers, as shifted multiply-adds (XLA fuses them)."""

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
    y [b, l, c] in x.dtype (sums and SiLU in promote_types(float32, x.dtype)), and the window [b, k - 1, c] in x.dtype
    with which the last document goes on: the k - 1 tokens up to the last real one, those of other documents and
    padding as zeros.

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
  acc = jnp.promote_types(jnp.float32, x.dtype)
  window = jnp.zeros((b, k - 1, c), x.dtype) if initial_window is None else initial_window.astype(x.dtype)
  tokens = jnp.concatenate([window, x], axis=1)
  document = usable = real = None
  if segment_ids is not None:
    document, real = segments.documents(segment_ids)
    document = jnp.pad(document, ((0, 0), (k - 1, 0)))
    usable = jnp.pad(real, ((0, 0), (k - 1, 0)), constant_values=True)
  y = jnp.zeros((b, l, c), acc) if bias is None else jnp.broadcast_to(bias.astype(acc), (b, l, c))
  for i in range(k):
    tap = tokens[:, i : i + l].astype(acc)
    if segment_ids is not None:
      same = (document[:, i : i + l] == document[:, k - 1 :]) & usable[:, i : i + l]
      tap = jnp.where(same[..., None], tap, 0)
    y = y + weight[i].astype(acc) * tap
  y = jax.nn.silu(y)
  if segment_ids is None:
    return y.astype(x.dtype), tokens[:, l:]
  y = jnp.where(real[..., None], y, 0)
  return y.astype(x.dtype), _final_window(tokens, document, usable, real, k)


def _final_window(tokens, document, usable, real, k):
  """[b, k - 1, c]: the k - 1 tokens that end at the last real token of each row, see `causal_conv`."""
  length = jnp.max(jnp.where(real, jnp.arange(1, real.shape[1] + 1), 0), axis=1)
  index = length[:, None] + jnp.arange(k - 1)
  last = document[:, -1:]  # padding has the number of the document before it
  keep = jnp.take_along_axis((document == last) & usable, index, axis=1)
  return jnp.where(keep[..., None], jnp.take_along_axis(tokens, index[..., None], axis=1), 0)
