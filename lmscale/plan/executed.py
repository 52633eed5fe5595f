"""FLOPs that a step executes: those of the model (`flops`), and what its backward passes compute again."""

from lmscale.config import Config, ModelConfig
from lmscale.models import stack
from lmscale.plan.flops import layer_flops


def executed_flops(config: Config, causal: bool = True) -> int:
  """Forward, backward and recomputation, per trained token. The logits are never computed again."""
  model, seq_len = config.model, config.train.seq_len
  head = 3 * 2 * model.d_model * model.vocab
  layers = sum(layer_flops(model, seq_len, causal))
  return head + 3 * layers + recomputed_flops(config, causal)


def recomputed_flops(config: Config, causal: bool = True) -> int:
  """What the backward passes of all layers compute again, per token: under `full` each layer's forward pass, under
  `selective` what is no projection: attention's core, convolutions and scans."""
  model, remat = config.model, config.train.remat
  if remat == 'none':
    return 0
  layers = sum(layer_flops(model, config.train.seq_len, causal))
  return layers - (sum(_projections(model, kind) for kind in model.layers) if remat == 'selective' else 0)


def _projections(model: ModelConfig, kind: str) -> int:
  """Forward FLOPs per token of a layer's matrix products with parameters."""
  specs = stack.layer_specs(model, kind)
  return 2 * sum(spec.size for name, spec in specs.items() if name.endswith('_kernel') and None not in spec.axes)
