"""Model FLOPs per token: what the mathematics needs, whatever the program recomputes.

A multiply-add is 2 FLOPs. Forward plus backward is 3 times forward, as in arXiv 2204.02311 and 2205.05198. Counted: every
matrix product (the logits too), the causal convolutions and the two scans. Not counted: embedding look-ups, norms,
activations, rotary positions, the optimizer, and any recomputation.

The SSD is counted as its chunked algorithm computes it (arXiv 2405.21060, section 6), so it depends on the chunk q.
Per token, with h heads of p channels, g groups and state n:
  C B^T within the chunk, once per group     2 q n g
  its masked product with x                  2 q p h    (the whole square: masking saves a matrix unit nothing)
  the chunk's state, and its use by C        2 n p h + 2 n p h
The selective scan of Mamba-1 has no matrix form: 9 elementwise FLOPs per channel and state, d * n of them per token.
"""

from lmscale.config import LAYER_KINDS, ModelConfig

CHUNK = 64  # of the SSD where the config leaves it to the kernel
SCAN_FLOPS = 9  # of Mamba-1's recurrence, per token, channel and state: exp's argument, decay, input, output


def flops_per_token(model: ModelConfig, seq_len: int) -> int:
  """Forward + backward FLOPs per trained token, causal attention at half the square. Use this one for MFU."""
  return 3 * _forward(model, seq_len, causal=True)


def flops_per_token_paper(model: ModelConfig, seq_len: int) -> int:
  """The same with attention counted over the full square, as Megatron's papers do (arXiv 2104.04473, 2205.05198)."""
  return 3 * _forward(model, seq_len, causal=False)


def _forward(model: ModelConfig, seq_len: int, causal: bool) -> int:
  per_layer = {kind: _layer(model, kind, seq_len, causal) for kind in LAYER_KINDS if kind in model.layers}
  return sum(per_layer[kind] for kind in model.layers) + 2 * model.d_model * model.vocab


def _layer(model: ModelConfig, kind: str, seq_len: int, causal: bool) -> int:
  if kind == '*':
    return _attention(model, seq_len, causal)
  if kind == '-':
    matrices = 3 if model.mlp.activation in ('swiglu', 'geglu') else 2
    return 2 * matrices * model.d_model * model.mlp.d_ff
  return _mamba2(model, seq_len) if kind == 'M' else _mamba(model)


def _attention(model: ModelConfig, seq_len: int, causal: bool) -> int:
  c = model.attention
  projections = 2 * model.d_model * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
  core = 4 * seq_len * c.heads * c.head_dim  # scores, and their product with the values
  return projections + (core // 2 if causal else core)


def _mamba2(model: ModelConfig, seq_len: int) -> int:
  c = model.mamba2
  inner, grouped, q = c.heads * c.head_dim, c.groups * c.state, min(c.chunk or CHUNK, seq_len)
  projections = 2 * model.d_model * (3 * inner + 2 * grouped + c.heads)
  convolutions = 2 * c.conv * (inner + 2 * grouped)
  ssd = 2 * q * grouped + 2 * q * inner + 4 * c.state * inner
  return projections + convolutions + ssd


def _mamba(model: ModelConfig) -> int:
  c = model.mamba
  outer = 2 * model.d_model * 3 * c.d_inner
  inner = 2 * c.d_inner * (2 * c.dt_rank + 2 * c.state)  # x to (dt, B, C), and dt up again
  return outer + inner + 2 * c.conv * c.d_inner + SCAN_FLOPS * c.d_inner * c.state
