"""Model FLOPs per token: what the mathematics needs, whatever the program recomputes.

A multiply-add is 2 FLOPs. Forward plus backward is 3 times forward, as in arXiv 2204.02311 and 2205.05198. Counted: every
matrix product (the logits too), the causal convolutions and the two scans. Not counted: embedding look-ups, norms,
activations, rotary positions, the optimizer, and any recomputation.
Each layer kind says its own, see `flops` of the classes in `models.layers`.
"""

from lmscale.config import ModelConfig
from lmscale.models.layers import LAYERS


def flops_per_token(model: ModelConfig, seq_len: int) -> int:
  """Forward + backward FLOPs per trained token, causal attention at half the square. Use this one for MFU."""
  return 3 * _forward(model, seq_len, causal=True)


def flops_per_token_paper(model: ModelConfig, seq_len: int) -> int:
  """The same with attention counted over the full square, as Megatron's papers do (arXiv 2104.04473, 2205.05198)."""
  return 3 * _forward(model, seq_len, causal=False)


def layer_flops(model: ModelConfig, seq_len: int, causal: bool = True) -> list[int]:
  """Forward FLOPs per token of each layer, in canonical order."""
  per_kind = {kind: LAYERS[kind].flops(model, seq_len, causal) for kind in set(model.layers)}
  return [per_kind[kind] for kind in model.layers]


def head_flops(model: ModelConfig) -> int:
  """Forward FLOPs per token of the logits."""
  return 2 * model.d_model * model.vocab


def _forward(model: ModelConfig, seq_len: int, causal: bool) -> int:
  return sum(layer_flops(model, seq_len, causal)) + head_flops(model)
