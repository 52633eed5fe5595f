"""Times a training step of the tiny Mamba-2 and the tiny hybrid beside the same models in transformers, on this CPU.

  pip install -c constraints/python3.12.txt -e '.[hf]'
  python tools/bench_step.py                          # both models; taskset -c 0-3 before it gives both sides four cores

A step is forward, backward and AdamW with clipping, in float32, on the same tokens, with the same number of threads.
The models are those of configs/mamba_study.py at size=tiny. Ours starts from the weights of theirs, and both have to
report the same loss before anything is timed. transformers runs eagerly with its plain PyTorch path, as it does on a
CPU, and with the fastest of the SSD chunk sizes in --chunks. The two take turns; printed are medians and their ratio.
"""

import argparse
import json
import os
import pathlib
import platform
import runpy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from lmscale.config import Config, ModelConfig, OptimizerConfig, from_dict

ARCHITECTURES = ('mamba2', 'hybrid')
SAME_LOSS = 1e-4
LEARNING_RATE = 1e-4


class NotPossible(Exception):
  """Why there is nothing to time, in one line."""


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--arch', choices=ARCHITECTURES, help='default: both')
  parser.add_argument('--batch', type=int, default=4, help='sequences per step, one microbatch')
  parser.add_argument('--seq_len', type=int, default=256)
  parser.add_argument('--repeats', type=int, default=20)
  parser.add_argument('--chunks', default='32,64,128,256', help="transformers' chunk sizes to choose from")
  parser.add_argument('--out', type=pathlib.Path, help='also write the figures as JSON')
  options = parser.parse_args(argv)
  try:
    report = run(options)
  except NotPossible as reason:
    print(f'error: {reason}', file=sys.stderr)
    return 2
  print(markdown(report))
  if options.out:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + '\n')
  return 0


def run(options: argparse.Namespace) -> dict:
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['HF_HUB_OFFLINE'] = '1'
  try:
    import torch
    import transformers
  except ImportError as error:
    raise NotPossible(f"{error.name} is not installed here; install the extra `hf`: pip install -e '.[hf]'") from error
  import jax

  if jax.device_count() > 1:
    raise NotPossible('the CPU is cut into emulated devices, which distorts timings: unset XLA_FLAGS')
  threads = len(os.sched_getaffinity(0))  # what XLA takes
  torch.set_num_threads(threads)
  torch.manual_seed(0)
  transformers.logging.set_verbosity_error()
  rows = [compare(arch, options) for arch in ([options.arch] if options.arch else ARCHITECTURES)]
  versions = {'python': platform.python_version(), 'jax': jax.__version__, 'torch': torch.__version__,
              'transformers': transformers.__version__}  # fmt: skip
  return {'threads': threads, 'load': round(os.getloadavg()[0], 1), 'machine': platform.machine(), 'versions': versions,
          'command': ' '.join(sys.argv), 'batch': options.batch, 'seq_len': options.seq_len, 'repeats': options.repeats,
          'rows': rows}  # fmt: skip


def compare(arch: str, options: argparse.Namespace) -> dict:
  """Median seconds of a step of both, and what was needed to believe that they do the same."""
  config = our_config(arch, options.batch, options.seq_len)
  tokens = np.random.default_rng(0).integers(0, config.model.vocab, (options.batch, options.seq_len + 1))
  theirs = their_model(config.model)
  ours = our_step(config, theirs, tokens)
  steps = {int(chunk): their_step(theirs, config.optimizer, tokens, int(chunk)) for chunk in options.chunks.split(',')}
  their_loss, our_loss = next(iter(steps.values()))(), ours()  # the loss of a step is that of the weights before it
  if abs(our_loss - their_loss) > SAME_LOSS:
    raise NotPossible(f'{arch}: the losses differ, {our_loss:.6f} and {their_loss:.6f}: these are not the same models')
  tries = {chunk: min(timed(step) for _ in range(4)) for chunk, step in steps.items()}
  chunk = min(tries, key=tries.get)
  samples: dict[str, list[float]] = {'lmscale': [], 'transformers': []}
  timed(ours)
  for _ in range(options.repeats):
    samples['lmscale'].append(timed(ours))
    samples['transformers'].append(timed(steps[chunk]))
  return {'arch': arch, 'parameters': sum(p.numel() for p in theirs.parameters()), 'losses': [our_loss, their_loss],
          'chunk': chunk, 'seconds': {name: statistics.median(s) for name, s in samples.items()},
          'samples': samples}  # fmt: skip


def timed(step: Callable[[], float]) -> float:
  start = time.perf_counter()
  step()
  return time.perf_counter() - start


def our_config(arch: str, batch: int, seq_len: int) -> Config:
  """The recipe on one device, the whole batch in one microbatch."""
  path = pathlib.Path(__file__).parent.parent / 'configs' / 'mamba_study.py'
  recipe = runpy.run_path(str(path))['get_config'](f'arch={arch},size=tiny')
  recipe.train.update(batch=batch, microbatch=batch, seq_len=seq_len)
  recipe.optimizer.update(warmup_tokens=0, decay_tokens=0)  # the benchmark gives each step its rate
  recipe.mesh.update(pipe=1, data=1, tensor=1, zero=0)
  return from_dict(recipe)


def our_step(config: Config, theirs: Any, tokens: np.ndarray) -> Callable[[], float]:
  """One call is one step of `lmscale.train`, started from the weights of `theirs`; it returns the loss."""
  import jax

  from lmscale.interop.huggingface import load_weights
  from lmscale.models.stacking import from_layers
  from lmscale.train.program import Program

  weights = {name: tensor.detach().numpy().copy() for name, tensor in theirs.state_dict().items()}
  _, params = load_weights(weights, theirs.config.to_dict())
  program = Program(config, jax.devices()[:1])
  stacked = jax.device_put({**params, 'layers': from_layers(params['layers'], program.setup.stacking)})
  state = [program.init().replace(params=stacked)]
  positions = np.broadcast_to(np.arange(tokens.shape[1] - 1), tokens[:, 1:].shape)
  rows = {'tokens': tokens[:, :-1], 'labels': tokens[:, 1:], 'segment_ids': np.ones_like(positions), 'positions': positions}
  batch = {name: jax.device_put(values[None].astype(np.int32)) for name, values in rows.items()}
  batch |= {'microbatches': jax.device_put(np.int32(1)), 'learning_rate': jax.device_put(np.float32(LEARNING_RATE))}

  def step() -> float:
    state[0], metrics = program.step(state[0], batch)
    jax.block_until_ready(state[0])
    return float(metrics['loss'])

  return step


def their_model(model: ModelConfig) -> Any:
  """The transformers model of the same sizes, with weights of its own."""
  import transformers

  c = model.mamba2
  common = {'hidden_size': model.d_model, 'vocab_size': model.vocab, 'conv_kernel': c.conv, 'n_groups': c.groups,
            'chunk_size': c.chunk, 'layer_norm_epsilon': model.norm_eps, 'tie_word_embeddings': False,
            'pad_token_id': None}  # fmt: skip
  if set(model.layers) == {'M'}:
    config = transformers.Mamba2Config(
      num_hidden_layers=len(model.layers), expand=c.heads * c.head_dim // model.d_model, num_heads=c.heads,
      head_dim=c.head_dim, state_size=c.state, **common,
    )  # fmt: skip
  else:
    kinds = {'M': 'linear_attention', '*': 'full_attention', '-': 'mlp'}
    a = model.attention
    config = transformers.NemotronHConfig(
      layers_block_type=[kinds[kind] for kind in model.layers], num_attention_heads=a.heads, head_dim=a.head_dim,
      num_key_value_heads=a.kv_heads, intermediate_size=model.mlp.d_ff, mlp_hidden_act=model.mlp.activation,
      mamba_num_heads=c.heads, mamba_head_dim=c.head_dim, ssm_state_size=c.state, time_step_min=1e-9, **common,
    )  # fmt: skip
  return transformers.AutoModelForCausalLM.from_config(config).float().train()


def their_step(model: Any, optimizer: OptimizerConfig, tokens: np.ndarray, chunk: int) -> Callable[[], float]:
  """One call is one step of PyTorch with the SSD chunk size `chunk`; it returns the loss."""
  import torch

  inputs, labels = (torch.from_numpy(part.astype(np.int64)) for part in (tokens[:, :-1], tokens[:, 1:]))
  adam = torch.optim.AdamW(
    model.parameters(), lr=LEARNING_RATE, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.eps,
    weight_decay=optimizer.weight_decay, fused=True,
  )  # fmt: skip
  mixers = [module for module in model.modules() if hasattr(module, 'chunk_size')]

  def step() -> float:
    for mixer in mixers:
      mixer.chunk_size = chunk
    logits = model(inputs, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip)
    adam.step()
    adam.zero_grad(set_to_none=True)
    return loss.item()

  return step


def markdown(report: dict) -> str:
  lines = [
    f'Training step, float32, {report["batch"]} x {report["seq_len"]} tokens, {report["machine"]} CPU, '
    f'{report["threads"]} threads each, load {report["load"]}, '
    + ', '.join(f'{name} {version}' for name, version in report['versions'].items()),
    f'`{report["command"]}`: median of {report["repeats"]}, taking turns.',
    '',
    '| model | parameters | lmscale ms | transformers ms (chunk) | ratio |',
    '|---|---|---|---|---|',
  ]
  for row in report['rows']:
    ours, theirs = row['seconds']['lmscale'], row['seconds']['transformers']
    lines.append(
      f'| tiny {row["arch"]} | {row["parameters"]:,} | {ours * 1e3:.1f} | {theirs * 1e3:.1f} ({row["chunk"]}) | '
      f'{theirs / ours:.2f}x as fast |'
    )
  return '\n'.join(lines)


if __name__ == '__main__':
  sys.exit(main())
