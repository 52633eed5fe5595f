"""FLOPs that a step executes: those of the model (`flops`), and what its backward passes compute again."""

from lmscale.config import Config, ModelConfig
from lmscale.models import stack
from lmscale.models.flops import head_flops, layer_flops


def executed_flops(config: Config, causal: bool = True) -> int:
  """Forward, backward and recomputation, per trained token. The logits are never computed again."""
  return sum(layer_executed_flops(config, causal)) + 3 * head_flops(config.model)


def layer_executed_flops(config: Config, causal: bool = True) -> list[int]:
  """The same of each layer, in canonical order.

  A backward pass computes again, under `full`, the layer's forward pass, under `selective` what is no projection of it: attention's
  core, convolutions and scans.
  """
  model = config.model
  again = {kind: _projections(model, kind) for kind in set(model.layers)} if config.train.remat == 'selective' else {}
  times = 3 if config.train.remat == 'none' else 4
  forward = layer_flops(model, config.train.seq_len, causal)
  return [times * flops - again.get(kind, 0) for kind, flops in zip(model.layers, forward, strict=True)]


def _projections(model: ModelConfig, kind: str) -> int:
  """Forward FLOPs per token of a layer's matrix products with parameters."""
  specs = stack.layer_specs(model, kind)
  return 2 * sum(spec.size for name, spec in specs.items() if name.endswith('_kernel') and None not in spec.axes)
