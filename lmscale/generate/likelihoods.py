"""How likely given tokens are, from the hidden states before them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lmscale.config import Config
from lmscale.models import model

TOKENS_AT_A_TIME = 64  # of each row, whose logits exist together

Likelihoods = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def make_likelihoods(config: Config, ids: int, constrain: Callable[..., jax.Array]) -> Likelihoods:
  """(params, hidden [b, t, d_model], labels int32 [b, t]) -> (log-probability float32, whether none of the `ids` of the tokenizer is
  likelier) of each label, [b, t], some tokens at a time."""

  def some(params: Any, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    hidden, labels = inputs
    logits = constrain(model.logits(config.model, params, hidden), ('batch', None, None))
    logits = jnp.where(jnp.arange(logits.shape[-1]) < ids, logits, -jnp.inf)
    logps = jax.nn.log_softmax(logits, axis=-1)
    return jnp.take_along_axis(logps, labels[..., None], axis=-1)[..., 0], jnp.argmax(logits, axis=-1) == labels

  def likelihoods(params: Any, hidden_BTD: jax.Array, labels_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    b, t, d = hidden_BTD.shape
    size = min(TOKENS_AT_A_TIME, t)
    padded = -(-t // size) * size
    hidden = jnp.pad(hidden_BTD, ((0, 0), (0, padded - t), (0, 0))).reshape(b, -1, size, d).swapaxes(0, 1)
    labels = jnp.pad(labels_BT, ((0, 0), (0, padded - t))).reshape(b, -1, size).swapaxes(0, 1)
    found = jax.lax.map(lambda inputs: some(params, inputs), (hidden, labels))
    return tuple(part.swapaxes(0, 1).reshape(b, -1)[:, :t] for part in found)

  return likelihoods
