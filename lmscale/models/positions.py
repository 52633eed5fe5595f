"""Rotary positions (RoPE, arXiv 2104.09864): how fast each pair of dimensions turns, also beyond the length that was trained."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lmscale.config import ModelConfig, RopeScalingConfig
from lmscale.models.norms import accumulator


def rope(config: ModelConfig, x_BTHP: jax.Array, positions_BT: jax.Array) -> jax.Array:
  """x rotated by its positions on the first `rope_fraction` of each head, halves against each other; x's dtype."""
  rotary = int(x_BTHP.shape[-1] * config.rope_fraction)
  acc = accumulator(x_BTHP.dtype)
  angle = positions_BT[..., None, None].astype(acc) * jnp.asarray(rope_frequencies(config, rotary), acc)
  longer = attention_factor(config.rope_scaling)
  cos, sin = longer * jnp.cos(angle), longer * jnp.sin(angle)
  first, second, rest = jnp.split(x_BTHP.astype(acc), [rotary // 2, rotary], axis=-1)
  rotated = [first * cos - second * sin, second * cos + first * sin, rest]
  return jnp.concatenate(rotated, axis=-1).astype(x_BTHP.dtype)


def rope_frequencies(config: ModelConfig, rotary: int) -> np.ndarray:
  """Radians per position, float64 [rotary / 2]: base^(-2i / rotary), made slower as `config.rope_scaling` says."""
  scaling = config.rope_scaling
  base = ntk_base(config.rope_base, scaling.factor, rotary) if scaling.kind == 'ntk' else config.rope_base
  plain = base ** (-np.arange(0, rotary, 2) / rotary)
  if scaling.kind == 'longrope':
    return plain / np.array(scaling.factors)
  if scaling.kind == 'linear':
    return plain / scaling.factor
  if scaling.kind in ('yarn', 'llama3'):
    kept = _kept_yarn(config, rotary) if scaling.kind == 'yarn' else _kept_llama3(scaling, plain)
    return plain * (kept + (1 - kept) / scaling.factor)
  return plain


def attention_factor(scaling: RopeScalingConfig) -> float:
  """What cosines and sines, and so queries and keys, are multiplied by: 1 but for YaRN (arXiv 2309.00071, equation 22) and
  LongRoPE (arXiv 2402.13753, as its authors' code has it)."""
  if scaling.kind == 'yarn':
    return 0.1 * math.log(scaling.factor) + 1
  if scaling.kind == 'longrope':
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.length))
  return 1.0


def ntk_base(base: float, factor: float, rotary: int) -> float:
  """The base with which the slowest rotation is `factor` times slower and the fastest as it was (YaRN's paper, section 3.1)."""
  return base * factor ** (rotary / (rotary - 2))


def _kept_llama3(scaling: RopeScalingConfig, plain: np.ndarray) -> np.ndarray:
  """Share in [0, 1] of each plain rotation: by its turns over the trained length (arXiv 2407.21783, section 3.2)."""
  low, high = scaling.turns
  turns = scaling.length * plain / (2 * math.pi)
  return np.clip((turns - low) / (high - low), 0, 1)


def _kept_yarn(config: ModelConfig, rotary: int) -> np.ndarray:
  """The same for YaRN (section 3.2), by number: linear between those that make `high` and `low` turns, rounded outwards."""
  scaling = config.rope_scaling
  low, high = scaling.turns

  def number(turns: float) -> float:
    return rotary * math.log(scaling.length / (2 * math.pi * turns)) / (2 * math.log(config.rope_base))

  first, last = max(math.floor(number(high)), 0), min(math.ceil(number(low)), rotary - 1)
  return 1 - np.clip((np.arange(rotary // 2) - first) / max(last - first, 1e-3), 0, 1)
