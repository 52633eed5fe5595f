"""Formulas as the papers print them. The plan's own figures, which follow the code, are held against these."""


def activation_bytes(
  layers: int, heads: int, hidden: int, seq_len: int, rows: int, tensor: int = 1, sequence_parallel: bool = False,
  remat: str = 'none',
) -> float:  # fmt: skip
  """Bytes of activations on a device of the first 1F1B stage, for `layers` Transformer blocks in the whole model.

  arXiv 2205.05198, table 2 and section 4.2.3: 16 bit activations with dropout masks of a byte; a stage holds as many
  microbatches of `rows` sequences as there are stages, so the number of stages cancels.
  """
  sbh = seq_len * rows * hidden
  if remat == 'full':
    return 2 * sbh * layers
  core = 5 * heads * seq_len / hidden if remat == 'none' else 0
  stream, mixer = (0, 34) if sequence_parallel or tensor == 1 else (10, 24)
  return sbh * layers * (stream + (mixer + core) / tensor)


def iteration_flops(layers: int, hidden: int, vocab: int, seq_len: int, batch: int, remat: str) -> float:
  """FLOPs that a step of `batch` sequences executes, attention in full, the logits once.

  `full` is arXiv 2104.04473, section 5.1, `none` and `selective` arXiv 2205.05198, equations 7 and 8.
  """
  B, s, h, V = batch, seq_len, hidden, vocab
  if remat == 'full':
    return 96 * B * s * layers * h**2 * (1 + s / (6 * h) + V / (16 * layers * h))
  core = s / (6 * h) if remat == 'none' else s / (3 * h)
  return 72 * B * s * layers * h**2 * (1 + core + V / (12 * layers * h))


def block_activations(tokens: int, hidden: int, tensor: int = 1, sequence_parallel: bool = False, remat: str = 'none') -> float:
  """Bytes that a Transformer block keeps of `tokens`, without dropout and without the scores of attention.

  arXiv 2205.05198, table 2, of whose 34 s b h two are the masks of dropout, a byte per token and channel behind attention and behind
  the MLP; both lie in the residual stream, so 10 + 24 / t becomes 8 + 24 / t. Of its core, 5 a s^2 b, the softmax is 2 and its
  dropout 3; a fused attention keeps none of it, so that `none` is what the paper calls selective.
  """
  if remat == 'full':
    return 2 * tokens * hidden / (tensor if sequence_parallel else 1)
  stream, mixer = (0, 32) if sequence_parallel or tensor == 1 else (8, 24)
  return tokens * hidden * (stream + mixer / tensor)
