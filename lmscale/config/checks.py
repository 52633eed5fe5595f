"""Every check on the values of a config, before any work is done.

`validate` needs nothing but the config; `resolve_mesh` also knows the number of devices. A check of a layer kind's
fields applies only where the pattern uses that kind. Each error names the field, shows the arithmetic and says what
would do.
"""

import dataclasses
import math
import operator
from collections.abc import Iterator
from typing import Any

from lmscale.config.fields import Config
from lmscale.config.pattern import LAYER_KINDS
from lmscale.config.pipeline import check_microbatches, check_stages, nearest_multiples
from lmscale.config.ramp import run_tokens
from lmscale.config.scaling import check_scaling
from lmscale.errors import ConfigError

USES = {'model.attention': '*', 'model.mlp': '-', 'model.mamba2': 'M', 'model.mamba': 'm'}

CHOICES = {
  'model.norm': ('rmsnorm', 'layernorm', 'layernorm1p'),
  'model.positions': ('none', 'rope', 'learned'),
  'model.rope_scaling.kind': ('none', 'linear', 'ntk', 'yarn', 'longrope', 'llama3'),
  'model.mlp.activation': ('gelu', 'gelu_tanh', 'relu2', 'swiglu', 'geglu'),
  'mesh.zero': (0, 1, 2, 3),
  'mesh.schedule': ('gpipe', '1f1b', '1f1b_strict', 'interleaved'),
  'optimizer.schedule': ('cosine', 'wsd', 'constant'),
  'model.attention.implementation': ('auto', 'xla', 'cudnn'),
  'model.mamba2.implementation': ('auto', 'scan', 'xla', 'pallas_triton', 'pallas_mosaic'),
  'model.mamba.implementation': ('auto', 'scan', 'xla', 'pallas_triton'),
  'train.compute_dtype': ('float32', 'bfloat16', 'float64'),
  'train.grad_dtype': ('float32', 'bfloat16', 'float64'),
  'train.remat': ('none', 'selective', 'full'),
  'train.stack': ('runs', 'unrolled'),
}
SOURCE_KINDS = ('stdlib', 'text', 'jsonl', 'megatron', 'tfds', 'synthetic')
FIELD_KINDS = ('jsonl', 'tfds')  # in which a text is one of several fields
TOKENIZER_FILES = ('.json', '.model')
STDLIB_STREAMS = ('code', 'prose')

AT_LEAST = {  # smallest allowed integer
  'seed': 0, 'emulate': 0,
  'model.d_model': 1, 'model.vocab': 2, 'model.max_positions': 0, 'model.rope_scaling.length': 0,
  'model.attention.heads': 1, 'model.attention.kv_heads': 1, 'model.attention.head_dim': 1, 'model.mlp.d_ff': 1,
  'model.mamba2.heads': 1, 'model.mamba2.head_dim': 1, 'model.mamba2.groups': 1, 'model.mamba2.state': 1,
  'model.mamba2.conv': 1, 'model.mamba2.chunk': 0,
  'model.mamba.d_inner': 1, 'model.mamba.state': 1, 'model.mamba.dt_rank': 1, 'model.mamba.conv': 1,
  'model.mamba.chunk': 0,
  'mesh.pipe': 1, 'mesh.tensor': 1, 'mesh.virtual': 1,
  'optimizer.warmup_tokens': 0, 'optimizer.decay_tokens': 0, 'optimizer.wsd_decay_tokens': 0,
  'train.steps': 1, 'train.batch': 1, 'train.seq_len': 1, 'train.microbatch': 1, 'train.ramp_start': 0,
  'train.ramp_increment': 0, 'train.ramp_tokens': 0, 'train.loss_chunk': 1, 'train.nonfinite_budget': 0,
  'train.spike_budget': 0, 'train.stored_microbatches': 0,
  'loop.log_every': 1, 'loop.eval_every': 0, 'loop.eval_samples': 1, 'loop.checkpoint_every': 0, 'loop.keep': 1,
  'loop.sample_every': 0, 'loop.sample_tokens': 1,
  'generate.tokens': 1, 'generate.top_k': 0, 'generate.batch': 1, 'generate.prefill_chunk': 1,
  'eval.every': 0, 'eval.samples': 0,
}  # fmt: skip
LARGEST = 2**26  # of any integer but token counts: what is made of them fits in 32 or 64 bits

LARGEST_COUNT = 2**53  # of tokens: a float holds every integer up to here
MOST_LAYERS = 2**12
MOST_EMULATED = 2**12

INTERVALS = {  # where numbers must lie: whatever somebody may have a use for, but no slip of the keyboard
  'model.mamba2.dt_min': '[0, 1e6]', 'model.mamba2.dt_max': '[0, 1e6]',
  'model.norm_eps': '(0, 1]', 'model.init_std': '(0, 100]', 'model.rope_base': '(0, 1e12]', 'model.rope_fraction': '(0, 1]',
  'model.rope_scaling.factor': '[1, 1e6]',
  'optimizer.learning_rate': '(0, 100]', 'optimizer.min_learning_rate': '[0, 100]', 'optimizer.eps': '(0, 1]',
  'optimizer.beta1': '[0, 1)', 'optimizer.beta2': '[0, 1)', 'optimizer.weight_decay': '[0, 100]',
  'optimizer.clip': '[0, 1e6]', 'train.spike_skip': '[0, 1e6]', 'data.validation': '[0, 1)', 'loop.temperature': '[0, 100]',
  'generate.temperature': '[0, 100]', 'generate.top_p': '(0, 1]',
}  # fmt: skip
WEIGHT = '[0, 1e12]'


def validate(config: Config) -> None:
  """Rejects every config that no number of devices could run.

  Raises:
    ConfigError: the first mistake found.
  """
  _check_pattern(config.model.pattern)
  for path, allowed in _used(CHOICES, config):
    if _get(config, path) not in allowed:
      raise ConfigError(f'{path}: {_get(config, path)!r} is not one of {", ".join(map(str, allowed))}')
  for path, low in _used(AT_LEAST, config):
    if _get(config, path) < low:
      raise ConfigError(f'{path}: {_get(config, path)} is less than {low}')
    if _get(config, path) > (most := _most(path)):
      raise ConfigError(f'{path}: {_get(config, path)} is more than {most}')
  for path, interval in _used(INTERVALS, config):
    _check_number(path, _get(config, path), interval)
  checks = (_check_heads, _check_dt, _check_positions, check_scaling, _check_dtypes, _check_ramp, _check_schedule, _check_sources, _check_rest)
  for check in checks:
    check(config)


def resolve_mesh(config: Config, devices: int) -> Config:
  """The config with mesh.data filled in for `devices` devices.

  Raises:
    ConfigError: the mesh does not use exactly `devices` devices, or model, batch or sequence cannot be cut that way.
  """
  mesh = config.mesh
  config = fill_data(config, devices)
  mesh = config.mesh
  if mesh.size != devices:
    raise ConfigError(
      f'mesh: pipe {mesh.pipe} * data {mesh.data} * tensor {mesh.tensor} = {mesh.size}, but there are {devices} '
      f'devices; {_mesh_advice(mesh, devices)}'
    )
  check_mesh(config)
  return config


def fill_data(config: Config, devices: int) -> Config:
  """mesh.data = -1 replaced by the devices that pipe and tensor leave; any other value is kept."""
  mesh = config.mesh
  if mesh.data != -1:
    return config
  rest, left = divmod(devices, mesh.pipe * mesh.tensor)
  if left or not rest:
    raise ConfigError(
      f'mesh: {devices} devices / (pipe {mesh.pipe} * tensor {mesh.tensor} = {mesh.pipe * mesh.tensor}) is not a '
      f'whole number; {_mesh_advice(mesh, devices)}'
    )
  return dataclasses.replace(config, mesh=dataclasses.replace(mesh, data=rest))


def check_tensor(config: Config) -> None:
  """Whether mesh.tensor can cut this model."""
  model, mesh = config.model, config.mesh
  cut_by_tensor = {
    'model.attention.heads': '*', 'model.mamba2.heads': 'M', 'model.mamba.d_inner': 'm', 'model.mlp.d_ff': '-',
    'model.vocab': '',
  }  # fmt: skip
  for path, symbol in cut_by_tensor.items():
    if symbol in model.layers:
      _check_divides('mesh.tensor', mesh.tensor, path, _get(config, path))


def check_mesh(config: Config) -> None:
  """Whether the mesh, with mesh.data known, can cut this model, batch and sequence."""
  mesh, train = config.mesh, config.train
  check_tensor(config)
  check_stages(config)
  if mesh.sequence_parallel:
    _check_divides('mesh.tensor', mesh.tensor, 'train.seq_len', train.seq_len, ' (mesh.sequence_parallel)')
  unit = train.microbatch * mesh.data
  sizes = {'train.batch': train.batch}
  if train.ramp_start:
    sizes = {'train.ramp_start': train.ramp_start, 'train.ramp_increment': train.ramp_increment, **sizes}
  for path, size in sizes.items():
    if size % unit:
      raise ConfigError(
        f'{path}: {size} is not a multiple of train.microbatch {train.microbatch} * mesh.data {mesh.data} = {unit}; '
        f'nearest: {nearest_multiples(size, unit)}'
      )
    check_microbatches(config, path, size)


def _get(config: Any, path: str) -> Any:
  return operator.attrgetter(path)(config)


def _most(path: str) -> int:
  """The largest allowed value of an integer field."""
  if path.endswith('_tokens') and path != 'loop.sample_tokens':
    return LARGEST_COUNT
  return {'seed': 2**32 - 1, 'emulate': MOST_EMULATED}.get(path, LARGEST)


def _used(table: dict[str, Any], config: Config) -> Iterator[tuple[str, Any]]:
  """The rows of a table whose layer kind, if any, occurs in the pattern."""
  for path, value in table.items():
    if USES.get(path.rpartition('.')[0], '') in config.model.layers:
      yield path, value


def _check_number(path: str, value: float, interval: str) -> None:
  if not math.isfinite(value):
    raise ConfigError(f'{path}: {value} is not a finite number')
  low, high = map(float, interval[1:-1].split(','))
  above = low <= value if interval[0] == '[' else low < value
  below = value <= high if interval[-1] == ']' else value < high
  if not (above and below):
    raise ConfigError(f'{path}: {value} is not in {interval}')


def _check_divides(name: str, divisor: int, path: str, value: int, why: str = '') -> None:
  if value % divisor:
    raise ConfigError(
      f'{name}: {divisor} does not divide {path} {value}{why}: {value} = {value // divisor} * {divisor} '
      f'+ {value % divisor}; possible: {_divisors(value)}'
    )


def _divisors(value: int) -> str:
  small = [d for d in range(1, min(value, 64) + 1) if value % d == 0]
  return ', '.join(map(str, small))


def _check_pattern(pattern: str) -> None:
  for position, symbol in enumerate(pattern):
    if symbol not in LAYER_KINDS and symbol != '|':
      known = ', '.join(f'{s} ({kind})' for s, kind in LAYER_KINDS.items())
      raise ConfigError(f'model.pattern: {symbol!r} at position {position} is no layer; use {known} or | (a cut)')
  if not pattern.replace('|', ''):
    raise ConfigError('model.pattern: no layers; write one symbol per layer, for example M-M*-')
  if len(pattern.replace('|', '')) > MOST_LAYERS:
    raise ConfigError(f'model.pattern: {len(pattern.replace("|", ""))} layers are more than {MOST_LAYERS}')
  if '' in pattern.split('|'):
    raise ConfigError(
      f'model.pattern: {pattern!r} has a stage without layers beside |; every | needs layers on both sides'
    )


def _check_heads(config: Config) -> None:
  model = config.model
  pairs = (
    ('*', 'model.attention.kv_heads', 'model.attention.heads'),
    ('M', 'model.mamba2.groups', 'model.mamba2.heads'),
  )
  for symbol, part, whole in pairs:
    if symbol in model.layers:
      _check_divides(part, _get(config, part), whole, _get(config, whole))


def _check_dt(config: Config) -> None:
  c = config.model.mamba2
  if 'M' in config.model.layers and 0 < c.dt_max <= c.dt_min:
    raise ConfigError(
      f'model.mamba2.dt_max: {c.dt_max:g} is not above model.mamba2.dt_min {c.dt_min:g}; raise it, or set 0 for no bound'
    )


def _check_dtypes(config: Config) -> None:
  """float64 is a property of a whole run: JAX has it or has it not."""
  compute, grad = config.train.compute_dtype, config.train.grad_dtype
  if grad == 'float64' and compute != 'float64':
    raise ConfigError(
      f'train.grad_dtype: float64 with train.compute_dtype {compute}; only a float64 run has float64, '
      'set train.compute_dtype=float64 or train.grad_dtype=float32'
    )
  if grad == 'bfloat16' and compute == 'float64':
    raise ConfigError(
      'train.grad_dtype: bfloat16 with train.compute_dtype float64; a float64 run sums its gradients in float64, '
      'leave it at float32 or set float64'
    )


def _check_positions(config: Config) -> None:
  model, seq_len = config.model, config.train.seq_len
  if model.positions == 'learned' and model.max_positions < seq_len:
    raise ConfigError(
      f'model.max_positions: {model.max_positions} learned positions are fewer than train.seq_len '
      f'{seq_len}; set model.max_positions={seq_len}'
    )
  prompt, sampled = len(config.loop.sample_prompt.encode(errors='surrogatepass')) or 1, config.loop.sample_tokens
  if model.positions == 'learned' and config.loop.sample_every and prompt + sampled > model.max_positions:
    raise ConfigError(
      f'loop.sample_tokens: {sampled} after a prompt of {prompt} bytes = {prompt + sampled} tokens exceed '
      f'model.max_positions {model.max_positions}; sample fewer'
    )
  if model.positions != 'learned' and model.max_positions:
    raise ConfigError(
      f'model.max_positions: {model.max_positions} is only used with model.positions=learned, not '
      f'{model.positions}; set it to 0'
    )
  rotated = model.attention.head_dim * model.rope_fraction
  if model.positions == 'rope' and '*' in model.layers and (rotated % 2 or rotated < 2):
    raise ConfigError(
      f'model.rope_fraction: head_dim {model.attention.head_dim} * {model.rope_fraction} = {rotated:g} '
      'rotated dimensions; it must be an even number of at least 2'
    )


def _check_ramp(config: Config) -> None:
  train = config.train
  ramp = (train.ramp_start, train.ramp_increment, train.ramp_tokens)
  if not any(ramp):
    return
  if not all(ramp):
    names = ('ramp_start', 'ramp_increment', 'ramp_tokens')
    missing = ', '.join(f'train.{n}' for n, value in zip(names, ramp, strict=True) if not value)
    raise ConfigError(f'{missing}: 0 while the rest of the batch ramp is set; set all three or none')
  if train.ramp_start >= train.batch:
    raise ConfigError(f'train.ramp_start: {train.ramp_start} is not below train.batch {train.batch}')
  if (train.batch - train.ramp_start) % train.ramp_increment:
    raise ConfigError(
      f'train.ramp_increment: (batch {train.batch} - ramp_start {train.ramp_start} = '
      f'{train.batch - train.ramp_start}) is not a multiple of {train.ramp_increment}'
    )


def _check_schedule(config: Config) -> None:
  opt, train = config.optimizer, config.train
  if opt.min_learning_rate > opt.learning_rate:
    raise ConfigError(
      f'optimizer.min_learning_rate: {opt.min_learning_rate} exceeds optimizer.learning_rate {opt.learning_rate}'
    )
  total = run_tokens(train)
  run = f'the run of {total} tokens (train.steps {train.steps}, batch {train.batch}, seq_len {train.seq_len})'
  if opt.warmup_tokens > total:
    raise ConfigError(f'optimizer.warmup_tokens: {opt.warmup_tokens} is beyond {run}; lower it or take more steps')
  if opt.schedule == 'constant':
    return
  end = opt.decay_tokens or total
  name = 'optimizer.decay_tokens' if opt.decay_tokens else 'the end of the run'
  decay = opt.wsd_decay_tokens if opt.schedule == 'wsd' else 0
  if opt.schedule == 'wsd' and not decay:
    raise ConfigError('optimizer.wsd_decay_tokens: 0; the schedule wsd needs the length of its final decay')
  if opt.warmup_tokens + decay > end:
    field = 'optimizer.wsd_decay_tokens' if decay else 'optimizer.decay_tokens'
    raise ConfigError(
      f'{field}: warm-up {opt.warmup_tokens} + final decay {decay} = {opt.warmup_tokens + decay} tokens '
      f'exceed {name} at {end}'
    )


def _check_sources(config: Config) -> None:
  sources, tokenizer = config.data.sources, config.data.tokenizer
  if tokenizer != 'bytes' and not tokenizer.endswith(TOKENIZER_FILES):
    raise ConfigError(f'data.tokenizer: {tokenizer!r} is not bytes nor the path of a tokenizer.json (Hugging Face) or a '
                      '.model (SentencePiece)')
  if not sources:
    raise ConfigError('data.sources: empty; give at least one source')
  for i, source in enumerate(sources):
    path = f'data.sources.{i}'
    if source.kind not in SOURCE_KINDS:
      raise ConfigError(f'{path}.kind: {source.kind!r} is not one of {", ".join(SOURCE_KINDS)}')
    if source.kind == 'stdlib' and source.path not in STDLIB_STREAMS:
      raise ConfigError(
        f'{path}.path: {source.path!r} is no stream of the standard library; use {" or ".join(STDLIB_STREAMS)}'
      )
    if not source.name or not source.name.isprintable():
      raise ConfigError(f'{path}.name: {source.name!r} cannot name a source')
    if not source.field or source.field != 'text' and source.kind not in FIELD_KINDS:
      raise ConfigError(f'{path}.field: {source.field!r}; only {" and ".join(FIELD_KINDS)} have fields, the others text')
    if source.split != 'train' and source.kind != 'tfds':
      raise ConfigError(f'{path}.split: {source.split!r}; only tfds has splits, leave it at train')
    _check_number(f'{path}.weight', source.weight, WEIGHT)
  names = [s.name for s in sources]
  if twice := [n for i, n in enumerate(names) if n in names[:i]]:
    raise ConfigError(f'data.sources: two sources are called {twice[0]!r}; names must differ')
  if not sum(s.weight for s in sources) > 0:
    raise ConfigError('data.sources: the weights sum to 0; give at least one source a weight')


def _check_rest(config: Config) -> None:
  if not config.name or not config.name.isprintable() or '/' in config.name or config.name in ('.', '..'):
    raise ConfigError(f'name: {config.name!r} cannot name a run; use letters, digits, - and _')
  if config.mesh.data < 1 and config.mesh.data != -1:
    raise ConfigError(
      f'mesh.data: {config.mesh.data}; give a number of devices of at least 1, or -1 for what pipe and tensor leave'
    )
  if 0 < config.train.spike_skip <= 1:
    raise ConfigError(
      f'train.spike_skip: {config.train.spike_skip:g} times the median would skip ordinary steps; give more than 1, or 0 for none'
    )
  if '' in config.generate.stop:
    raise ConfigError('generate.stop: an empty text stops everything at once; leave it out')
  if bad := [length for length in config.eval.lengths if not 0 < length <= LARGEST]:
    raise ConfigError(f'eval.lengths: {bad[0]} is no number of tokens from 1 to {LARGEST}')
  if not config.eval.lengths:
    raise ConfigError('eval.lengths: empty; give at least one number of tokens, for example [1024]')
  if config.eval.every and not config.eval.tasks:
    raise ConfigError(f'eval.tasks: none, but eval.every is {config.eval.every}; name some, or set eval.every=0')
  if config.loop.eval_every and not config.data.validation:
    raise ConfigError(
      f'data.validation: 0 holds nothing out, but loop.eval_every is {config.loop.eval_every}; set '
      'loop.eval_every=0 or hold a share out'
    )


def _mesh_advice(mesh: Any, devices: int) -> str:
  if devices % (mesh.pipe * mesh.tensor) == 0:
    return f'set mesh.data={devices // (mesh.pipe * mesh.tensor)} or -1'
  tensors = [t for t in range(1, devices + 1) if devices % (mesh.pipe * t) == 0]
  if not tensors:
    return f'set mesh.pipe to a divisor of {devices}'
  near = min(tensors, key=lambda t: (abs(t - mesh.tensor), t))
  return f'for example mesh.tensor={near}, mesh.data={devices // (mesh.pipe * near)}'
