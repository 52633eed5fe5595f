"""Times generation: to the first token and per token, and counts the caches, against context length and batch.

  python tools/bench_generate.py --svg=latency.svg                    # the four architectures at size=tiny, random weights
  python tools/bench_generate.py --peers=transformers --contexts=     # tokens/s beside the same models in transformers (extra `hf`)

A token is timed behind `context` tokens with caches of that length, all contexts of an architecture and batch in turns; what is in
the caches does not matter for the time, so they need not be filled. The time to the first token reads a prompt of that length (up to
--prefill) in chunks of 512. Printed are medians; beside the measured ratio Transformer / hybrid stands that of the bytes a step must
move: weights, keys and values once, states read and written.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from typing import Any

import bench_step
import numpy as np

ARCHITECTURES = ('transformer', 'mamba', 'mamba2', 'hybrid')
CHUNK = 512
PEER_PROMPT, PEER_TOKENS, PEER_BATCHES = 64, 64, (1, 8)
PAPER = ((1, 32768), (32, 4096), (32, 32768), (32, 131072))  # (batch, context) of the predictions for 8B


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--archs', default=','.join(ARCHITECTURES))
  parser.add_argument('--size', default='tiny', help='of configs/mamba_study.py')
  parser.add_argument('--contexts', default='1024,4096,8192,16384,32768,65536,131072')
  parser.add_argument('--batches', default='1,8,32,128')
  parser.add_argument('--prefill', type=int, default=8192, help='the longest prompt that is read for the time to the first token')
  parser.add_argument('--tokens', type=int, default=16, help='tokens of one sample')
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument('--memory', type=float, default=4.0, help='GB of caches at a time; larger ones are left out')
  parser.add_argument('--peers', choices=['transformers'])
  parser.add_argument('--svg', type=pathlib.Path)
  parser.add_argument('--out', type=pathlib.Path, help='also write the figures as JSON')
  options = parser.parse_args(argv)
  report = about() | {'rows': [], 'peers': []}
  for arch in options.archs.split(','):
    report['rows'] += measure(arch, options) if options.contexts else []
  if options.peers:
    try:
      report['peers'] = [compare(arch, batch, options.repeats) for arch in options.archs.split(',') for batch in PEER_BATCHES]
    except bench_step.NotPossible as reason:
      print(f'error: {reason}', file=sys.stderr)
      return 2
  print(markdown(report))
  if options.svg:
    draw(report['rows'], options.svg)
  if options.out:
    options.out.write_text(json.dumps(report, indent=1) + '\n')
  return 0


def about() -> dict:
  import jax

  return {'command': ' '.join(sys.argv), 'machine': platform.machine(), 'device': jax.devices()[0].device_kind,
          'cores': len(os.sched_getaffinity(0)), 'load': round(os.getloadavg()[0], 1),
          'versions': {'python': platform.python_version(), 'jax': jax.__version__}}  # fmt: skip


def make_engine(config: Any, params: bool = True) -> Any:
  """An engine of a config on the first device, with random weights or (for counting) none."""
  import jax

  from lmscale.generate.engine import Engine
  from lmscale.generate.weights import generation_setup
  from lmscale.models import model
  from lmscale.parallel.layout import map_layout
  from lmscale.parallel.zero import compute_dtype

  setup = generation_setup(config, jax.devices()[:1])

  def make() -> Any:
    tree = model.init_runs(config.model, setup.stacking, 0)
    return map_layout(lambda leaf, x: x.astype(compute_dtype(leaf, setup.dtype)), setup.layout, tree)

  return Engine(setup, jax.jit(make)() if params else jax.eval_shape(make))


class Decoding:
  """Steps of `rows` rows at the end of a cache for `context` tokens."""

  def __init__(self, engine: Any, rows: int, context: int, tokens: int):
    self.engine, self.rows, self.context, self.tokens = engine, rows, context, tokens
    self.caches = engine.empty(rows, context)
    self.live, self.seed = engine.put(np.ones(rows, bool)), engine.put(np.int32(0), whole=True)

  def seconds(self) -> float:
    """Per step."""
    import jax

    from lmscale.generate.choose import Sampling
    from lmscale.generate.engine import STATE

    at = np.full(self.rows, self.context - self.tokens, np.int32)
    values = dict(zip(STATE, (0 * at, at, at, np.arange(self.rows, dtype=np.int32), 0 * at), strict=True))
    state = jax.block_until_ready({name: self.engine.put(value) for name, value in values.items()})
    vocab = self.engine.setup.config.model.vocab
    start = time.perf_counter()
    for _ in range(self.tokens):
      chosen, state, self.caches = self.engine.step(self.caches, state, self.live, self.seed, Sampling(0.0), vocab)
    chosen.block_until_ready()
    return (time.perf_counter() - start) / self.tokens


def measure(arch: str, options: argparse.Namespace) -> list[dict]:
  """A row for each batch and context whose caches fit."""
  engine = make_engine(recipe(arch, options.size))
  rows = []
  for batch in map(int, options.batches.split(',')):
    candidates, held = {}, 0
    for context in map(int, options.contexts.split(',')):
      held += engine.cache_bytes(batch, context)
      if held <= options.memory * 1e9:
        candidates[context] = Decoding(engine, batch, context, options.tokens)
        candidates[context].seconds()
    samples: dict[int, list[float]] = {context: [] for context in candidates}
    for _ in range(options.repeats):
      for context, decoding in candidates.items():
        samples[context].append(decoding.seconds())
    for context in candidates:
      rows.append({'arch': arch, 'batch': batch, 'context': context, 'seconds': statistics.median(samples[context]),
                   'samples': samples[context], 'cache': engine.cache_bytes(batch, context), 'moved': moved(engine, batch, context),
                   'first': first_token(engine, context, options) if batch == 1 and context <= options.prefill else None})  # fmt: skip
  return rows


def first_token(engine: Any, context: int, options: argparse.Namespace) -> float:
  """Seconds to the first token after a prompt of `context` tokens, the better of two, compiled before."""
  from lmscale.config import GenerateConfig
  from lmscale.generate.generator import Generator

  prompt = np.random.default_rng(0).integers(0, engine.setup.config.model.vocab, context).tolist()
  how = GenerateConfig(tokens=1, temperature=0.0, batch=1, prefill_chunk=CHUNK)
  found = []
  for _ in range(3):
    start = time.perf_counter()
    list(Generator(engine).generate([prompt], how, 0))
    found.append(time.perf_counter() - start)
  return min(found[1:])


def recipe(arch: str, size: str, dtype: str = 'float32', kv_heads: int | None = None) -> Any:
  """The study's model on one device."""
  import runpy

  from lmscale.config import MeshConfig, from_dict

  path = pathlib.Path(__file__).parent.parent / 'configs' / 'mamba_study.py'
  values = runpy.run_path(str(path))['get_config'](f'arch={arch},size={size}')
  if kv_heads:
    values.model.attention.kv_heads = kv_heads
  config = from_dict(values)
  return dataclasses.replace(config, mesh=MeshConfig(1, 1, 1, 0), train=dataclasses.replace(config.train, compute_dtype=dtype))


def moved(engine: Any, rows: int, length: int) -> int:
  """Bytes that a step must move: the weights (of the embedding only rows), keys and values; states and windows twice."""
  import jax

  params = {**engine.params, 'embed': {}} if 'head' in engine.params else engine.params
  weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
  caches = jax.tree_util.tree_leaves_with_path(engine.abstract(rows, length))
  once = (2 - (path[-1].key in ('k', 'v')) for path, _ in caches)
  return weights + sum(n * leaf.size * leaf.dtype.itemsize for n, (_, leaf) in zip(once, caches, strict=True))


def compare(arch: str, batch: int, repeats: int) -> dict:
  """Tokens/s of a whole call, prompt included, of ours and of transformers' greedy `generate`, in turns, from equal weights."""
  os.environ['HF_HUB_OFFLINE'] = '1'
  try:
    import torch
    import transformers
  except ImportError as error:
    raise bench_step.NotPossible(f"{error.name} is not installed here; install the extra `hf`: pip install -e '.[hf]'") from error
  from lmscale.config import GenerateConfig
  from lmscale.generate.generator import Generator, collect

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  torch.manual_seed(0)
  transformers.logging.set_verbosity_error()
  config = recipe(arch, 'tiny')
  theirs = their_model(arch, config.model).eval()
  engine = with_weights(config, theirs)
  prompts = np.random.default_rng(0).integers(0, config.model.vocab, (batch, PEER_PROMPT))
  how = GenerateConfig(tokens=PEER_TOKENS, temperature=0.0, batch=batch, prefill_chunk=PEER_PROMPT)
  inputs = torch.from_numpy(prompts)

  def ours() -> list[list[int]]:
    return [one.ids for one in collect(Generator(engine).generate(prompts, how, 0), batch)]

  def peer() -> list[list[int]]:
    with torch.inference_mode():
      out = theirs.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=PEER_TOKENS, min_new_tokens=PEER_TOKENS, do_sample=False,
        use_cache=True, pad_token_id=0, eos_token_id=None,
      )  # fmt: skip
    return out[:, PEER_PROMPT:].tolist()

  agree = float(np.mean(np.array(ours()) == np.array(peer())))
  if agree < 0.9:
    raise bench_step.NotPossible(f'{arch}: only {agree:.0%} of the greedy tokens agree: these are not the same models')
  samples: dict[str, list[float]] = {'lmscale': [], 'transformers': []}
  for _ in range(repeats):
    for name, call in (('lmscale', ours), ('transformers', peer)):
      samples[name].append(bench_step.timed(call))
  rates = {name: batch * PEER_TOKENS / statistics.median(s) for name, s in samples.items()}
  return {'arch': arch, 'batch': batch, 'agree': agree, 'rates': rates, 'transformers': transformers.__version__, 'torch': torch.__version__}


def their_model(arch: str, model: Any) -> Any:
  """The transformers model of the same sizes, in float32, with weights of its own."""
  import transformers

  common = {'hidden_size': model.d_model, 'vocab_size': model.vocab, 'tie_word_embeddings': False, 'pad_token_id': None}
  if arch == 'transformer':
    a = model.attention
    config = transformers.NemotronConfig(
      num_hidden_layers=model.layers.count('*'), num_attention_heads=a.heads, num_key_value_heads=a.kv_heads, head_dim=a.head_dim,
      intermediate_size=model.mlp.d_ff, hidden_act='relu2', partial_rotary_factor=model.rope_fraction,
      rope_parameters={'rope_type': 'default', 'rope_theta': model.rope_base, 'partial_rotary_factor': model.rope_fraction},
      norm_eps=model.norm_eps, max_position_embeddings=4096, **common,
    )  # fmt: skip
  elif arch == 'mamba':
    c = model.mamba
    config = transformers.MambaConfig(
      num_hidden_layers=len(model.layers), state_size=c.state, expand=c.d_inner // model.d_model, conv_kernel=c.conv,
      time_step_rank=c.dt_rank, layer_norm_epsilon=model.norm_eps, use_mambapy=False, **common,
    )  # fmt: skip
  else:
    return bench_step.their_model(dataclasses.replace(model, mamba2=dataclasses.replace(model.mamba2, chunk=64)))
  return transformers.AutoModelForCausalLM.from_config(config).float()


def with_weights(config: Any, theirs: Any) -> Any:
  """An engine with the weights of `theirs`."""
  import jax

  from lmscale.generate.engine import Engine
  from lmscale.generate.weights import generation_setup
  from lmscale.interop.huggingface import load_weights
  from lmscale.models.stacking import from_layers

  weights = {name: tensor.detach().numpy().copy() for name, tensor in theirs.state_dict().items()}
  loaded, params = load_weights(weights, theirs.config.to_dict())
  setup = generation_setup(dataclasses.replace(config, model=loaded), jax.devices()[:1])
  return Engine(setup, jax.device_put({**params, 'layers': from_layers(params['layers'], setup.stacking)}))


def markdown(report: dict) -> str:
  versions = ', '.join(f'{name} {version}' for name, version in report['versions'].items())
  lines = [f'{report["device"]} ({report["machine"]}), {report["cores"]} cores, load {report["load"]}, {versions}, float32', f'`{report["command"]}`']
  if report['rows']:
    lines += ['', '| model | batch | context | ms per token | tokens/s | first token s | caches MB |', '|---|---|---|---|---|---|---|']
    for r in report['rows']:
      first = '' if r['first'] is None else f'{r["first"]:.2f}'
      lines.append(f'| {r["arch"]} | {r["batch"]} | {r["context"]:,} | {r["seconds"] * 1e3:.2f} | {r["batch"] / r["seconds"]:,.0f} | '
                   f'{first} | {r["cache"] / 1e6:,.1f} |')  # fmt: skip
    lines += ratios(report['rows']) + paper()
  if report['peers']:
    lines += ['', '| model | batch | lmscale tokens/s | transformers tokens/s | ratio | equal greedy tokens |', '|---|---|---|---|---|---|']
    for p in report['peers']:
      ours, theirs = p['rates']['lmscale'], p['rates']['transformers']
      lines.append(f'| {p["arch"]} | {p["batch"]} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.1f} | {p["agree"]:.0%} |')
  return '\n'.join(lines)


def ratios(rows: list[dict]) -> list[str]:
  """Measured and by bytes: Transformer / hybrid, and for each model without attention its longest context / its shortest."""
  found = {(r['arch'], r['batch'], r['context']): r for r in rows}
  lines = ['', '| batch | context | Transformer / hybrid, measured | by bytes moved |', '|---|---|---|---|']
  lines = lines if {'transformer', 'hybrid'} <= {arch for arch, _, _ in found} else []
  for (arch, batch, context), r in found.items():
    other = found.get(('hybrid', batch, context))
    if arch == 'transformer' and other:
      lines.append(f'| {batch} | {context:,} | {r["seconds"] / other["seconds"]:.2f} | {r["moved"] / other["moved"]:.2f} |')
  for arch in ('mamba', 'mamba2'):
    for batch in sorted({b for a, b, _ in found if a == arch}):
      contexts = sorted(c for a, b, c in found if (a, b) == (arch, batch))
      at = 32768 if 32768 in contexts else contexts[-1]
      ratio = statistics.median(long / short for long, short in zip(found[arch, batch, at]['samples'], found[arch, batch, contexts[0]]['samples'], strict=True))
      lines.append(f'\n{arch}, batch {batch}: a token at {at:,} takes {ratio:.3f} times that at {contexts[0]:,} (median of pairs)')
  return lines


def paper() -> list[str]:
  """The same bytes for the 8B models of arXiv 2406.07887 in bfloat16: a prediction, of which nothing was run."""
  engines = {name: make_engine(recipe(arch, '8b', 'bfloat16', kv), params=False)
             for name, arch, kv in (('hybrid', 'hybrid', None), ('GQA-8', 'transformer', 8), ('MHA', 'transformer', None))}  # fmt: skip
  lines = ['', '8B, predicted from the bytes moved (nothing was run):', '',
           '| batch | context | Transformer with GQA-8 / hybrid | with MHA |', '|---|---|---|---|']  # fmt: skip
  for batch, context in PAPER:
    bytes_of = {name: moved(engine, batch, context) for name, engine in engines.items()}
    lines.append(f'| {batch} | {context:,} | {bytes_of["GQA-8"] / bytes_of["hybrid"]:.1f} | {bytes_of["MHA"] / bytes_of["hybrid"]:.1f} |')
  return lines


def draw(rows: list[dict], path: pathlib.Path) -> None:
  """Time per token and bytes of cache against context, at batch 1, and Transformer / hybrid at every batch."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  colours = dict(zip(ARCHITECTURES, ('#d94801', '#6a51a3', '#238b45', '#08519c'), strict=True))
  with pyplot.rc_context({'svg.fonttype': 'none', 'font.size': 10, 'axes.spines.top': False, 'axes.spines.right': False}):
    figure, (time_axes, bytes_axes, ratio_axes) = pyplot.subplots(1, 3, figsize=(13, 4), layout='constrained')
    for arch, colour in colours.items():
      mine = [r for r in rows if r['arch'] == arch and r['batch'] == 1]
      contexts = [r['context'] for r in mine]
      time_axes.plot(contexts, [r['seconds'] * 1e3 for r in mine], 'o-', color=colour, markersize=4, label=arch)
      bytes_axes.plot(contexts, [r['cache'] / 1e6 for r in mine], 'o-', color=colour, markersize=4, label=arch)
    found = {(r['arch'], r['batch'], r['context']): r for r in rows}
    for number, batch in enumerate(sorted({r['batch'] for r in rows})):
      both = [c for a, b, c in found if (a, b) == ('transformer', batch) and ('hybrid', batch, c) in found]
      for what, style in (('seconds', 'o-'), ('moved', '--')):
        ratio = [found['transformer', batch, c][what] / found['hybrid', batch, c][what] for c in both]
        label = f'batch {batch}, ' + ('measured' if what == 'seconds' else 'by bytes')
        ratio_axes.plot(both, ratio, style, color=f'C{number}', markersize=4, label=label)
    for axes, title in ((time_axes, 'ms per token, batch 1'), (bytes_axes, 'MB of cache, batch 1'), (ratio_axes, 'time of the Transformer / hybrid')):
      axes.set(xscale='log', xlabel='tokens of context', title=title)
      axes.set_xscale('log', base=2)
      axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f'{x / 1024:g}K'))
      axes.grid(alpha=0.25)
      axes.legend(frameon=False, fontsize=8)
    time_axes.set_yscale('log')
    bytes_axes.set_yscale('log')
    figure.savefig(path, metadata={'Date': None} if path.suffix == '.svg' else None)
    pyplot.close(figure)


if __name__ == '__main__':
  sys.exit(main())
