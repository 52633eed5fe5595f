"""FLOPs that a step executes: those of the model (`flops`), and what its backward passes compute again."""

from lmscale.config import Config
from lmscale.models import stack
from lmscale.models.flops import head_flops, layer_flops
from lmscale.models.layers import LAYERS
from lmscale.parallel.pipeline.layout import done_again


def executed_flops(config: Config, causal: bool = True) -> int:
  """Forward, backward and recomputation, per trained token. The logits are never computed again."""
  return sum(layer_executed_flops(config, causal)) + 3 * head_flops(config.model)


def layer_executed_flops(config: Config, causal: bool = True) -> list[int]:
  """The same of each layer, in canonical order.

  A backward pass computes again, under `full`, the layer's forward pass, under `selective` (and of the microbatches that
  train.stored_microbatches stores) convolutions and scans. (Attention's scores, which its kernels make again under every policy,
  are not counted.)
  """
  model = config.model
  kept = {kind: _kept(config, kind, causal) for kind in set(model.layers)} if config.train.remat != 'none' else {}
  times, stored = 3 if config.train.remat == 'none' else 4, 1 - done_again(config)
  forward = layer_flops(model, config.train.seq_len, causal)
  return [times * flops - round(stored * kept.get(kind, 0)) for kind, flops in zip(model.layers, forward, strict=True)]


def _kept(config: Config, kind: str, causal: bool) -> int:
  """Forward FLOPs per token of what `selective` does not compute again: attention, and products with parameters."""
  model = config.model
  if kind == '*':
    return LAYERS[kind].flops(model, config.train.seq_len, causal)
  specs = stack.layer_specs(model, kind)
  names = [name for name in specs if name.endswith('_kernel') and not name.startswith('conv')]
  return 2 * sum(specs[name].size for name in names if name != 'dt_kernel' or kind != 'm')
