"""What tools/bench_kernels.py times: the operations, their shapes and inputs, and the least that each has to do.

The floors are those of a perfect kernel: every input read once and every output written once at the device's memory
bandwidth, or the multiply-adds of the smallest useful algorithm at its matmul rate, whichever takes longer.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 64  # tokens per chunk in the FLOP count: larger chunks cost more and are the implementation's own choice


class Shape(NamedTuple):
  """Sizes of one layer; `length` is 1 in a decoding step. Mamba-1 has heads * head_dim channels and no groups."""

  batch: int
  length: int
  heads: int
  head_dim: int
  groups: int
  state: int

  def __str__(self) -> str:
    return f'{self.batch} x {self.length}, h {self.heads} p {self.head_dim} g {self.groups} n {self.state}'


class Peaks(NamedTuple):
  """Bytes moved and FLOPs done per second, at best."""

  bytes: float
  flops: float


Inputs = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Op:
  """run(shape, inputs, implementation, deterministic) -> tuple of the outputs whose bytes count, y first.

  modes: the Pallas kernels have a backward pass that is not deterministic too. flops: (shape) -> matmul FLOPs of
  (forward, backward), 0 where there is no matmul form. exact: inputs that stay in (at least) float32.
  """

  shapes: dict[str, list[Shape]]
  inputs: Callable[[Shape, np.random.Generator], dict[str, np.ndarray]]
  run: Callable[[Shape, Inputs, str, bool], tuple[jax.Array, ...]]
  implementations: tuple[str, ...]
  flops: Callable[[Shape], tuple[float, float]] = lambda shape: (0.0, 0.0)
  backward: bool = True
  modes: bool = False
  exact: tuple[str, ...] = ('dt', 'A', 'D', 'state', 'scale')


def make_inputs(op: Op, shape: Shape, dtype: str, seed: int = 0) -> Inputs:
  """Random inputs on the first device, rounded to `dtype` but for the float32 ones."""
  arrays = op.inputs(shape, np.random.default_rng(seed))
  full = jnp.promote_types(jnp.float32, dtype)
  return {name: jnp.asarray(a, full if name in op.exact else dtype) for name, a in arrays.items()}


def make_functions(op: Op, shape: Shape, implementation: str, deterministic: bool) -> dict[str, Callable]:
  """{'forward': inputs -> outputs, 'forward+backward': (inputs, dy) -> (outputs, gradients)}."""

  def forward(inputs: Inputs) -> tuple[jax.Array, ...]:
    return op.run(shape, inputs, implementation, deterministic)

  def both(inputs: Inputs, dy: jax.Array) -> tuple:
    y, pull = jax.vjp(lambda inputs: forward(inputs)[0], inputs)
    return y, pull(dy)[0]

  return {'forward': forward} | ({'forward+backward': both} if op.backward else {})


def costs(op: Op, shape: Shape, inputs: Inputs) -> dict[str, tuple[float, float]]:
  """Least (bytes, FLOPs) of 'forward' and 'backward'. Backward reads the inputs and dy and writes the gradients."""
  outputs = jax.eval_shape(lambda inputs: op.run(shape, inputs, op.implementations[0], True), inputs)
  read, written = (sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(t)) for t in (inputs, outputs))
  forward, backward = op.flops(shape)
  found = {'forward': (read + written, forward)}
  if op.backward:
    found['backward'] = (2 * read + written, backward)
  return found


def floor(found: dict[str, tuple[float, float]], name: str, peaks: Peaks) -> float:
  """Seconds that the pass `name` takes at best: one part after the other, each bound by bytes or by FLOPs."""
  return sum(max(b / peaks.bytes, f / peaks.flops) for b, f in (found[part] for part in name.split('+')))


def _ssd_inputs(s: Shape, rng: np.random.Generator) -> dict[str, np.ndarray]:
  x = rng.standard_normal((s.batch, s.length, s.heads, s.head_dim), np.float32)
  b, c = rng.standard_normal((2, s.batch, s.length, s.groups, s.state), np.float32)
  return {'x': x, 'dt': _dt((s.batch, s.length, s.heads), rng), 'A': -rng.uniform(1, 16, s.heads), 'B': b, 'C': c}


def _dt(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
  """Steps as Mamba initialises them: log-uniform from 0.001 to 0.1."""
  return np.exp(rng.uniform(math.log(1e-3), math.log(0.1), shape))


def _ssd(s: Shape, i: Inputs, implementation: str, deterministic: bool) -> tuple[jax.Array, ...]:
  from lmscale.kernels.ssd import ssd

  return ssd(**i, implementation=implementation, deterministic=deterministic)[:1]


def _ssd_flops(s: Shape) -> tuple[float, float]:
  """Chunked SSD (arXiv 2405.21060, section 6) without credit for causal halving; C B^T once per head."""
  q, p, n = CHUNK, s.head_dim, s.state
  forward = 2 * q * n + 2 * q * p + 4 * p * n
  backward = 3 * 2 * q * n + 2 * 2 * q * p + 5 * 2 * p * n
  tokens = s.batch * s.length * s.heads
  return float(tokens * forward), float(tokens * backward)


def _update_inputs(s: Shape, rng: np.random.Generator) -> dict[str, np.ndarray]:
  one = {name: a if name == 'A' else a[:, 0] for name, a in _ssd_inputs(s._replace(length=1), rng).items()}
  return {'state': rng.standard_normal((s.batch, s.heads, s.head_dim, s.state), np.float32)} | one


def _update(s: Shape, i: Inputs, implementation: str, deterministic: bool) -> tuple[jax.Array, ...]:
  from lmscale.kernels.ssd_update import ssd_update

  return ssd_update(**i, implementation=implementation)


def _scan_inputs(s: Shape, rng: np.random.Generator) -> dict[str, np.ndarray]:
  d = s.heads * s.head_dim
  x = rng.standard_normal((s.batch, s.length, d), np.float32)
  b, c = rng.standard_normal((2, s.batch, s.length, s.state), np.float32)
  a = -np.broadcast_to(np.arange(1, s.state + 1, dtype=np.float32), (d, s.state))
  return {'x': x, 'dt': _dt(x.shape, rng), 'A': a, 'B': b, 'C': c}


def _scan(s: Shape, i: Inputs, implementation: str, deterministic: bool) -> tuple[jax.Array, ...]:
  from lmscale.kernels.selective_scan import selective_scan

  return selective_scan(**i, implementation=implementation)[:1]


def _conv_inputs(s: Shape, rng: np.random.Generator) -> dict[str, np.ndarray]:
  channels = s.heads * s.head_dim + 2 * s.groups * s.state
  x = rng.standard_normal((s.batch, s.length, channels), np.float32)
  return {'x': x, 'weight': 0.5 * rng.standard_normal((4, channels)), 'bias': rng.standard_normal(channels)}


def _conv(s: Shape, i: Inputs, implementation: str, deterministic: bool) -> tuple[jax.Array, ...]:
  from lmscale.kernels.causal_conv import causal_conv

  return causal_conv(**i)[:1]


def _norm_inputs(s: Shape, rng: np.random.Generator) -> dict[str, np.ndarray]:
  y, z = rng.standard_normal((2, s.batch, s.length, s.heads, s.head_dim), np.float32)
  return {'y': y, 'z': z, 'scale': rng.standard_normal((s.heads, s.head_dim))}


def _norm(s: Shape, i: Inputs, implementation: str, deterministic: bool) -> tuple[jax.Array, ...]:
  from lmscale.kernels.gated_norm import gated_norm

  return (gated_norm(**i, groups=s.groups, eps=1e-5),)


def _attention_inputs(s: Shape, rng: np.random.Generator) -> dict[str, np.ndarray]:
  q = rng.standard_normal((s.batch, s.length, s.heads, s.head_dim), np.float32)
  k, v = rng.standard_normal((2, s.batch, s.length, s.groups, s.head_dim), np.float32)
  return {'q': q, 'k': k, 'v': v}


def _attention(s: Shape, i: Inputs, implementation: str, deterministic: bool) -> tuple[jax.Array, ...]:
  """`state` is how many documents of equal length a row has. 'xla_all_keys': 512 queries at a time beside every key of the row."""
  from lmscale.kernels.attention import attention
  from lmscale.kernels.attention.xla import attention_xla

  ids = jnp.broadcast_to(1 + jnp.arange(s.length) * s.state // s.length, (s.batch, s.length))
  if implementation == 'xla_all_keys':
    return (attention_xla(**i, q_positions=None, k_positions=None, q_segments=ids, k_segments=ids, chunk=512, block=s.length),)
  return (attention(**i, q_segments=ids, k_segments=ids, implementation=implementation),)


def _attention_flops(s: Shape) -> tuple[float, float]:
  """Two products of each query with the keys of its document before it, and four in the backward pass."""
  forward = 2 * s.batch * s.heads * s.head_dim * s.length**2 / s.state
  return forward, 2 * forward


def _ssd_shapes(heads: int) -> list[Shape]:
  return [Shape(b, l, heads, 64, 1, 128) for b, l in ((1, 2048), (8, 2048), (32, 2048), (4, 32768))]


LAYER = Shape(1, 4096, 128, 64, 8, 128)  # of the 8B models of arXiv 2406.07887
SMALL = Shape(1, 4096, 8, 32, 2, 32)  # of the tiny models of configs/mamba_study.py, at the length of the 8B ones
WIDE = Shape(1, 4096, 8, 64, 1, 64)  # one group, and a state four times as large
SHAPES = {'small': [SMALL], '8b': [LAYER._replace(batch=b) for b in (1, 2, 4)]}
PEERS = [shape for heads in (24, 48, 64, 80, 128) for shape in _ssd_shapes(heads)]  # those of TileOPs' SSD benchmark
MAMBA1 = {name: [s._replace(groups=1, state=16) for s in shapes] for name, shapes in SHAPES.items()}
ROWS = {name: [s._replace(head_dim=64, state=documents) for s in shapes[:1] for documents in (1, 8)] for name, shapes in SHAPES.items()}
DECODE = {name: [shapes[0]._replace(batch=b, length=1) for b in (8, 64)] for name, shapes in SHAPES.items()}

SSD = ('scan', 'xla', 'pallas_triton', 'pallas_mosaic')
OPS = {
  'attention': Op(ROWS, _attention_inputs, _attention, ('xla', 'xla_all_keys', 'cudnn'), _attention_flops),
  'ssd': Op(SHAPES | {'wide': [WIDE], 'peers': PEERS}, _ssd_inputs, _ssd, SSD, _ssd_flops, modes=True),
  'ssd_update': Op(DECODE, _update_inputs, _update, ('xla', 'pallas_triton'), backward=False),
  'selective_scan': Op(MAMBA1, _scan_inputs, _scan, ('scan', 'xla', 'pallas_triton')),
  'causal_conv': Op(SHAPES, _conv_inputs, _conv, ('xla',)),
  'gated_norm': Op(SHAPES, _norm_inputs, _norm, ('xla',)),
}
