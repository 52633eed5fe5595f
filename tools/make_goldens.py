"""Makes the golden files that prove the models equal to Hugging Face transformers.

    python -m venv hf && hf/bin/pip install torch transformers safetensors numpy
    hf/bin/python tools/make_goldens.py --out=tests/goldens

Each golden is a folder with `config.json` and `model.safetensors` as transformers writes them (float32), and
`io.safetensors` with tokens int32 [2, t], logits float32 [2, t, vocab] and greedy int32 [2, 8], which transformers' `generate` puts
after the first t - 8 tokens. The models are tiny and odd in every size.
Every value is away from its initial one, so that a weight mapped to the wrong place shows. Before a golden is written
the tool checks that

* the logits have a standard deviation near 0.75 and agree with a float64 run;
* they do not depend on transformers' own chunk size;
* no dt reaches a limit at which transformers clamps it, or, where the golden is about limits, that they matter;
* no greedy choice is a close one;
* each single tensor of the file matters: exchanging its values changes the logits by much more than the tests allow.

The package itself never imports transformers or torch; versions used are printed and written to `made_with.json`.
"""

import argparse
import json
import math
import pathlib
from collections.abc import Callable

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

LOGIT_STD = 0.75
VOCAB = 97
GREEDY = 8  # tokens generated
LIMITS = (0.06, 0.3)  # of dt, both of which are reached
FLOOR = (0.06, math.inf)  # as NemotronH makes of time_step_min

# name: (configuration class, its arguments, tokens per row)
GOLDENS: dict[str, tuple[type, dict, int]] = {
  'nemotron': (
    transformers.NemotronConfig,
    {
      'hidden_size': 36,
      'intermediate_size': 53,
      'num_hidden_layers': 2,
      'num_attention_heads': 6,
      'num_key_value_heads': 2,
      'head_dim': 12,
      'norm_eps': 3e-3,
      'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000.0, 'partial_rotary_factor': 0.5},
    },
    29,
  ),
  'nemotron_bias': (
    transformers.NemotronConfig,
    {
      'hidden_size': 30,
      'intermediate_size': 41,
      'num_hidden_layers': 2,
      'num_attention_heads': 3,
      'num_key_value_heads': 3,
      'head_dim': 8,
      'hidden_act': 'gelu',
      'attention_bias': True,
      'mlp_bias': True,
      'tie_word_embeddings': True,
      'rope_parameters': {'rope_type': 'default', 'rope_theta': 300.0, 'partial_rotary_factor': 0.25},
    },
    17,
  ),
  'llama': (
    transformers.LlamaConfig,
    {
      'hidden_size': 36,
      'intermediate_size': 47,
      'num_hidden_layers': 2,
      'num_attention_heads': 6,
      'num_key_value_heads': 2,
      'head_dim': 10,
      'rms_norm_eps': 2e-3,
      'rope_parameters': {'rope_type': 'default', 'rope_theta': 500.0},
    },
    29,
  ),
  'nemotron_h': (
    transformers.NemotronHConfig,
    {
      'hidden_size': 28,
      'layers_block_type': ['linear_attention', 'mlp', 'full_attention', 'linear_attention', 'mlp'],
      'num_attention_heads': 4,
      'num_key_value_heads': 2,
      'head_dim': 10,
      'intermediate_size': 45,
      'mlp_hidden_act': 'relu2',
      'mamba_num_heads': 6,
      'mamba_head_dim': 5,
      'ssm_state_size': 7,
      'n_groups': 3,
      'conv_kernel': 4,
      'time_step_min': 1e-9,
      'chunk_size': 8,
      'layer_norm_epsilon': 3e-3,
    },
    37,
  ),
  'nemotron_h_gelu': (
    transformers.NemotronHConfig,
    {
      'hidden_size': 20,
      'layers_block_type': ['full_attention', 'linear_attention', 'linear_attention', 'mlp'],
      'num_attention_heads': 5,
      'num_key_value_heads': 1,
      'head_dim': 6,
      'intermediate_size': 33,
      'mlp_hidden_act': 'gelu',
      'mamba_num_heads': 4,
      'mamba_head_dim': 7,
      'ssm_state_size': 5,
      'n_groups': 4,
      'conv_kernel': 3,
      'time_step_min': 1e-9,
      'chunk_size': 16,
      'tie_word_embeddings': True,  # without effect in this family
    },
    21,
  ),
  'mamba2': (
    transformers.Mamba2Config,
    {
      'hidden_size': 27,
      'num_hidden_layers': 3,
      'expand': 2,
      'num_heads': 6,
      'head_dim': 9,
      'state_size': 11,
      'n_groups': 3,
      'conv_kernel': 4,
      'chunk_size': 8,
      'layer_norm_epsilon': 2e-3,
    },
    37,
  ),
  'mamba': (
    transformers.MambaConfig,
    {
      'hidden_size': 25,
      'num_hidden_layers': 3,
      'expand': 2,
      'state_size': 7,
      'conv_kernel': 3,
      'time_step_rank': 3,
      'layer_norm_epsilon': 2e-3,
    },
    37,
  ),
  'mamba_untied': (
    transformers.MambaConfig,
    {
      'hidden_size': 18,
      'num_hidden_layers': 2,
      'expand': 3,
      'state_size': 5,
      'conv_kernel': 4,
      'time_step_rank': 'auto',
      'tie_word_embeddings': False,
    },
    23,
  ),
  'mamba2_limits': (
    transformers.Mamba2Config,
    {
      'hidden_size': 16,
      'num_hidden_layers': 2,
      'num_heads': 4,
      'head_dim': 8,
      'state_size': 5,
      'n_groups': 1,
      'chunk_size': 8,
      'time_step_limit': LIMITS,
      'tie_word_embeddings': True,
    },
    21,
  ),
  'llama_scaled': (
    transformers.LlamaConfig,
    {
      'hidden_size': 24,
      'intermediate_size': 31,
      'num_hidden_layers': 2,
      'num_attention_heads': 3,
      'num_key_value_heads': 1,
      'head_dim': 16,
      'hidden_act': 'gelu',
      'tie_word_embeddings': True,
      'rope_parameters': {
        'rope_type': 'llama3',
        'rope_theta': 500.0,
        'factor': 8.0,
        'low_freq_factor': 1.0,
        'high_freq_factor': 4.0,
        'original_max_position_embeddings': 24,
      },
    },
    33,
  ),
  'bamba': (
    transformers.BambaConfig,
    {
      'hidden_size': 24,
      'intermediate_size': 37,
      'num_hidden_layers': 3,
      'attn_layer_indices': [1],
      'num_attention_heads': 3,
      'num_key_value_heads': 1,
      'mamba_n_heads': 6,
      'mamba_d_head': 8,
      'mamba_n_groups': 2,
      'mamba_d_state': 7,
      'mamba_d_conv': 4,
      'mamba_chunk_size': 8,
      'rms_norm_eps': 2e-3,
      'rope_parameters': {'rope_type': 'default', 'rope_theta': 300.0},
    },
    29,
  ),
  'bamba_limits': (
    transformers.BambaConfig,
    {
      'hidden_size': 20,
      'intermediate_size': 23,
      'num_hidden_layers': 2,
      'attn_layer_indices': [0],
      'num_attention_heads': 2,
      'num_key_value_heads': 2,
      'mamba_n_heads': 4,
      'mamba_d_head': 10,
      'mamba_n_groups': 1,
      'mamba_d_state': 5,
      'mamba_chunk_size': 16,
      'time_step_limit': LIMITS,
      'tie_word_embeddings': True,
      'attention_bias': True,
      'mlp_bias': True,
      'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000.0, 'partial_rotary_factor': 0.4},
    },
    21,
  ),
  'nemotron_h_floor': (
    transformers.NemotronHConfig,
    {
      'hidden_size': 16,
      'layers_block_type': ['linear_attention', 'mlp', 'full_attention', 'linear_attention'],
      'num_attention_heads': 2,
      'num_key_value_heads': 1,
      'head_dim': 8,
      'intermediate_size': 21,
      'mamba_num_heads': 4,
      'mamba_head_dim': 6,
      'ssm_state_size': 5,
      'n_groups': 1,
      'time_step_min': FLOOR[0],
      'chunk_size': 8,
    },
    21,
  ),
}


def perturb(name: str, shape: tuple[int, ...], centre_one: bool, rng: np.random.Generator) -> np.ndarray:
  """A value for parameter `name`, away from every family's initial value. centre_one: a norm's scale around 1."""
  leaf = name.rsplit('.', 2)[-2:]
  if leaf[-1] == 'A_log':
    return np.log(rng.uniform(0.5, 8.0, shape))
  if leaf[-1] == 'D':
    return 1.0 + 0.5 * rng.standard_normal(shape)
  if leaf[-1] == 'dt_bias' or leaf == ['dt_proj', 'bias']:
    dt = np.exp(rng.uniform(math.log(0.02), math.log(0.5), shape))
    return dt + np.log(-np.expm1(-dt))
  if leaf[-1] == 'bias':
    return 0.3 * rng.standard_normal(shape)
  if 'norm' in leaf[0]:
    return float(centre_one) + 0.3 * rng.standard_normal(shape)
  if leaf[0] in ('embeddings', 'embed_tokens'):
    return rng.standard_normal(shape)
  return rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))


def build(config: transformers.PreTrainedConfig, seed: int) -> torch.nn.Module:
  """A model with perturbed values and logits of standard deviation near LOGIT_STD on the golden's tokens."""
  config._attn_implementation = 'eager'
  model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
  rng = np.random.default_rng(seed)
  offset = config.model_type == 'nemotron'  # LayerNorm-1p stores the scale's offset from 1
  with torch.no_grad():
    for name, parameter in sorted(model.named_parameters()):
      value = perturb(name, tuple(parameter.shape), not offset, rng)
      parameter.copy_(torch.from_numpy(value))
  return model


def logits_of(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
  with torch.no_grad():
    return model(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()


def scale_logits(model: torch.nn.Module, tokens: np.ndarray) -> None:
  """Scales the head, or where it is tied the final norm, until the logits have the wanted spread."""
  ratio = LOGIT_STD / logits_of(model, tokens).std()
  base = model.base_model
  with torch.no_grad():
    if model.lm_head.weight is not model.get_input_embeddings().weight:
      model.lm_head.weight.mul_(ratio)
      return
    norm = next(getattr(base, name) for name in ('norm', 'norm_f', 'final_layernorm') if hasattr(base, name))
    one = float(model.config.model_type == 'nemotron')
    norm.weight.copy_((norm.weight + one) * ratio - one)
    if getattr(norm, 'bias', None) is not None:
      norm.bias.mul_(ratio)


def mamba2_mixers(model: torch.nn.Module) -> list[torch.nn.Module]:
  return [m for m in model.modules() if hasattr(m, 'dt_bias') and hasattr(m, 'chunk_size')]


def check_chunks(model: torch.nn.Module, tokens: np.ndarray, reference: np.ndarray) -> float:
  """The largest change of the logits over transformers' chunk sizes."""
  mixers = mamba2_mixers(model)
  before = [m.chunk_size for m in mixers]
  worst = 0.0
  for chunk in (4, 16, 64) if mixers else ():
    for mixer in mixers:
      mixer.chunk_size = chunk
    worst = max(worst, float(np.abs(logits_of(model, tokens) - reference).max()))
  for mixer, chunk in zip(mixers, before, strict=True):
    mixer.chunk_size = chunk
  require(worst < 1e-5, f'chunk size changes the logits by {worst}')
  return worst


def check_dt(model: torch.nn.Module, tokens: np.ndarray) -> float:
  """The smallest dt of the run."""
  smallest = [math.inf]

  def hook(mixer: torch.nn.Module) -> Callable:
    def seen(_module: torch.nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
      dt = torch.nn.functional.softplus(output[..., -mixer.num_heads :] + mixer.dt_bias)
      smallest[0] = min(smallest[0], dt.min().item())

    return seen

  handles = [mixer.in_proj.register_forward_hook(hook(mixer)) for mixer in mamba2_mixers(model)]
  logits_of(model, tokens)
  for handle in handles:
    handle.remove()
  given = {tuple(mixer.time_step_limit) for mixer in mamba2_mixers(model)}
  if given in ({LIMITS}, {FLOOR}):
    check_limits(model, tokens, *given)
  else:
    require(all(low < smallest[0] and high == math.inf for low, high in given), f'dt {smallest[0]}, limits {given}')
  return smallest[0]


def check_limits(model: torch.nn.Module, tokens: np.ndarray, given: tuple[float, float]) -> None:
  """Each limit of dt alone changes the logits by much more than the tests allow."""
  clamped = logits_of(model, tokens)
  for limits in {(0.0, given[1]), (given[0], math.inf)} - {given}:
    for mixer in mamba2_mixers(model):
      mixer.time_step_limit = limits
    change = float(np.abs(logits_of(model, tokens) - clamped).max())
    require(change > 5e-3, f'without one of its limits of dt the logits change by {change}')
  for mixer in mamba2_mixers(model):
    mixer.time_step_limit = given


def greedy_of(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
  """What `generate` puts after all but the last GREEDY tokens. Without the cache, whose single steps do not clamp dt."""
  prompt = torch.from_numpy(tokens[:, :-GREEDY]).long()
  options = {'do_sample': False, 'use_cache': False, 'max_new_tokens': GREEDY, 'min_new_tokens': GREEDY, 'pad_token_id': 0}
  with torch.no_grad():
    whole = model.generate(prompt, attention_mask=torch.ones_like(prompt), eos_token_id=None, **options).numpy().astype(np.int32)
  top = np.sort(logits_of(model, whole)[:, -GREEDY - 1 : -1], axis=-1)
  require((top[..., -1] - top[..., -2]).min() > 1e-3, 'a greedy choice is close')
  return np.ascontiguousarray(whole[:, -GREEDY:])  # safetensors writes a view wrongly


def check_tensors(model: torch.nn.Module, tokens: np.ndarray, reference: np.ndarray) -> float:
  """The smallest change of the logits when one tensor's values are rolled by one place."""
  least = math.inf
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      kept = parameter.detach().clone()
      parameter.copy_(kept.flatten().roll(1).view_as(kept))
      change = float(np.abs(logits_of(model, tokens) - reference).max())
      parameter.copy_(kept)
      require(change > 5e-3, f'{name} hardly matters: {change}')
      least = min(least, change)
  return least


def check_float64(model: torch.nn.Module, tokens: np.ndarray, reference: np.ndarray) -> float:
  """The rounding noise of the float32 logits. Parts that transformers casts to float32 stay so."""
  exact = logits_of(model.double(), tokens)
  model.float()
  worst = float(np.abs(exact - reference).max())
  require(worst < 2e-5, f'float64 differs by {worst}')
  return worst


def require(condition: bool, message: str) -> None:
  if not condition:
    raise SystemExit(f'golden rejected: {message}')


def make(name: str, out: pathlib.Path, seed: int) -> None:
  """Writes golden `name` under `out` after all checks."""
  config_class, arguments, length = GOLDENS[name]
  config = config_class(vocab_size=VOCAB, pad_token_id=None, **arguments)
  model = build(config, seed)
  tokens = np.random.default_rng(seed + 1).integers(0, VOCAB, (2, length), dtype=np.int32)
  scale_logits(model, tokens)
  logits = logits_of(model, tokens)
  require(0.5 < logits.std() < 1.0, f'logits have standard deviation {logits.std()}')
  report = {
    'std': float(logits.std()),
    'chunks': check_chunks(model, tokens, logits),
    'smallest_dt': check_dt(model, tokens),
    'least_effect': check_tensors(model, tokens, logits),
    'float64': check_float64(model, tokens, logits),
  }
  folder = out / name
  model.save_pretrained(folder)
  (folder / 'generation_config.json').unlink(missing_ok=True)
  io = {'tokens': tokens, 'logits': logits.astype(np.float32), 'greedy': greedy_of(model, tokens)}
  save_file(io, folder / 'io.safetensors')
  for path in folder.iterdir():
    path.chmod(0o644)
  size = sum(path.stat().st_size for path in folder.iterdir())
  require(size < 200_000, f'{name} takes {size} bytes')
  print(name, f'{size} bytes', ', '.join(f'{key} {value:.3g}' for key, value in report.items()))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--out', type=pathlib.Path, required=True, help='folder of the goldens, usually tests/goldens')
  parser.add_argument('--only', choices=sorted(GOLDENS), help='make this golden alone')
  arguments = parser.parse_args()
  torch.manual_seed(0)
  torch.set_num_threads(1)
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  for index, name in enumerate(GOLDENS):
    if arguments.only in (None, name):
      make(name, arguments.out, 1000 * (index + 1))
  versions = {'torch': torch.__version__, 'transformers': transformers.__version__, 'numpy': np.__version__}
  (arguments.out / 'made_with.json').write_text(json.dumps(versions, indent=2) + '\n')
  print(versions)


if __name__ == '__main__':
  main()
