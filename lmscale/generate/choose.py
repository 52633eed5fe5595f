"""Which token comes next: the most likely one, or a draw."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# (logits [b, vocab], keys [b]) -> int32 [b]
Choose = Callable[[jax.Array, jax.Array], jax.Array]


class Sampling(NamedTuple):
  """What `config.GenerateConfig` says about the choice of a token."""

  temperature: float
  top_k: int = 0
  top_p: float = 1.0


def make_choose(sampling: Sampling, ids: int) -> Choose:
  """How `sampling` picks a token from logits of at least float32; rows of the vocabulary from `ids` on are never picked.

  temperature 0 takes the most likely token, the first of equals. Else logits are divided by it; of the result top_k keeps
  the k largest (the first of equals), and top_p of those, made to sum to 1, the fewest that reach p together: the most
  likely token always stays (arXiv 1904.09751, section 3.1). What is left is drawn from in proportion.
  """

  def choose(logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < ids, logits_BV, -jnp.inf)
    if sampling.temperature == 0:
      return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # The largest is 0: divided by a small temperature the others go to -inf, and not all to infinity.
    scores_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1:
      return _draw(keys_B, scores_BV)
    scores_BK, found_BK = jax.lax.top_k(scores_BV, min(sampling.top_k or ids, ids))
    drawn_B = _draw(keys_B, keep_top_p(scores_BK, sampling.top_p))
    return jnp.take_along_axis(found_BK, drawn_B[:, None], axis=1)[:, 0].astype(jnp.int32)

  return choose


def keep_top_p(scores_BK: jax.Array, p: float) -> jax.Array:
  """Scores in falling order with -inf behind the first ones whose probabilities reach p together."""
  share_BK = jax.nn.softmax(scores_BK, axis=-1)
  before_BK = jnp.cumsum(share_BK, axis=-1) - share_BK
  kept_BK = (before_BK < p).at[:, 0].set(True)
  return jnp.where(kept_BK, scores_BK, -jnp.inf)


def row_keys(seed: jax.Array, prompts_B: jax.Array, numbers_B: jax.Array) -> jax.Array:
  """A key for each row's next token: a function of the seed, the prompt's index and the token's number alone."""
  key = jax.random.key(seed)
  return jax.vmap(lambda prompt, number: jax.random.fold_in(jax.random.fold_in(key, prompt), number))(prompts_B, numbers_B)


def _draw(keys_B: jax.Array, scores_BK: jax.Array) -> jax.Array:
  return jax.vmap(jax.random.categorical)(keys_B, scores_BK).astype(jnp.int32)
