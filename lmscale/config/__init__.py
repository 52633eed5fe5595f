"""The typed, validated view of a config.

A recipe in `configs/` is an `ml_collections.ConfigDict` made from the dataclasses of `fields.py` (`to_config_dict`),
changed, and overridden on the command line. `from_dict` turns it back into frozen dataclasses and rejects nonsense
before any work is done: each mistake is one `ConfigError` line that names the field and shows the arithmetic. One field follows
others: a recipe's optimizer.warmup_tokens, where the command line makes the run shorter than the recipe's (`recipes.load`).

`fields` <- `checks` <- `parse` <- `recipes`; everybody else imports the names from here. Neither JAX nor Flax is imported.
"""

from lmscale.config.checks import (
  FIELD_KINDS,
  SOURCE_KINDS,
  USES,
  check_mesh,
  check_tensor,
  fill_data,
  resolve_mesh,
  validate,
)
from lmscale.config.fields import (
  AttentionConfig,
  Config,
  DataConfig,
  EvalConfig,
  GenerateConfig,
  LoopConfig,
  Mamba2Config,
  MambaConfig,
  MeshConfig,
  MLPConfig,
  ModelConfig,
  OptimizerConfig,
  RopeScalingConfig,
  SourceConfig,
  TrainConfig,
)
from lmscale.config.parse import (
  element,
  field_types,
  flatten,
  from_dict,
  plain_dict,
  to_config_dict,
  to_dict,
  unknown_field,
)
from lmscale.config.pattern import LAYER_KINDS, hybrid_pattern
from lmscale.config.ramp import batch_segments, run_tokens
from lmscale.config.recipes import arguments
from lmscale.errors import ConfigError

__all__ = [
  'FIELD_KINDS', 'LAYER_KINDS', 'SOURCE_KINDS', 'USES', 'AttentionConfig', 'Config', 'ConfigError', 'DataConfig', 'EvalConfig',
  'GenerateConfig', 'LoopConfig', 'MLPConfig', 'Mamba2Config', 'MambaConfig', 'MeshConfig', 'ModelConfig', 'OptimizerConfig', 'RopeScalingConfig',
  'SourceConfig', 'TrainConfig',
  'arguments', 'batch_segments', 'check_mesh', 'check_tensor', 'element', 'field_types', 'fill_data', 'flatten', 'from_dict',
  'hybrid_pattern', 'plain_dict', 'resolve_mesh', 'run_tokens', 'to_config_dict', 'to_dict', 'unknown_field',
  'validate',
]  # fmt: skip
