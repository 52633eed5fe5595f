"""PyTorch's SSD kernels beside ours: mamba-ssm and fla-core, where they are importable and there is an NVIDIA GPU.

A peer's output and gradients are compared with ours in float32 before it is timed. mamba-ssm chooses its tiles once per
process whatever the batch and length, so tools/bench_kernels.py uses a fresh process per shape.
"""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_ops import OPS, Shape, make_functions, make_inputs
from bench_timing import Candidate

CHECKED_LENGTH = 512
WORST_ERROR = 2e-2  # relative RMSE of any output or gradient, bfloat16 against float32
GRADIENTS = ('x', 'dt', 'A', 'B', 'C')


class Refused(ValueError):
  """Why a peer is not timed."""


def peers() -> dict[str, Callable]:
  """name -> y(x, dt, A, B, C) on torch tensors, for every package that can be imported. Raises Refused without torch."""
  try:
    torch = importlib.import_module('torch')
  except ImportError as error:
    raise Refused('torch is not installed') from error
  if not torch.cuda.is_available():
    raise Refused('the kernels of mamba-ssm and fla-core need an NVIDIA GPU')
  found = {}
  try:
    combined = importlib.import_module('mamba_ssm.ops.triton.ssd_combined').mamba_chunk_scan_combined
    for chunk in (128, 256):
      found[f'mamba_ssm, chunk {chunk}'] = lambda x, dt, A, B, C, chunk=chunk: combined(x, dt, A, B, C, chunk)
  except ImportError as error:
    found['mamba_ssm'] = _raises(f'not importable: {error}')
  try:
    gla = importlib.import_module('fla.ops.simple_gla')
    for name in ('fused_chunk_simple_gla', 'chunk_simple_gla'):
      found[f'fla {name}'] = _simple_gla(getattr(gla, name))
  except ImportError as error:
    found['fla'] = _raises(f'not importable: {error}')
  return found


def _raises(reason: str) -> Callable:
  def function(*_: Any) -> None:
    raise Refused(reason)

  return function


def _simple_gla(function: Callable) -> Callable:
  """SSD in the terms of gated linear attention, which knows no groups: q = C, k = B per head, v = dt x, g = dt A."""

  def run(x: Any, dt: Any, A: Any, B: Any, C: Any) -> Any:
    repeat = x.shape[2] // B.shape[2]
    k, q = (m.repeat_interleave(repeat, dim=2) for m in (B, C))
    return function(q, k, (dt[..., None] * x).to(x.dtype), dt * A, scale=1.0)[0]

  return run


def peer_candidates(function: Callable, shape: Shape, dtype: str) -> dict[str, Candidate]:
  """{'forward', 'forward+backward'} of a peer after its check. Raises Refused where it is wrong or fails."""
  import torch

  try:
    error = worst_error(function, shape._replace(batch=1, length=min(CHECKED_LENGTH, shape.length)), dtype)
  except Refused:
    raise
  except Exception as failure:  # a peer may raise anything
    raise Refused(f'failed: {str(failure).splitlines()[0] if str(failure) else type(failure).__name__}') from failure
  if not error <= WORST_ERROR:
    raise Refused(f'wrong: relative error {error:.2g} in an output or gradient, so it is not timed')
  inputs, dy = to_torch(make_inputs(OPS['ssd'], shape, dtype), dtype)
  functions = _passes(function, inputs, dy)

  def wait(handle: Any) -> None:
    torch.cuda.synchronize()

  return {name: Candidate(call, wait, _memory(call)) for name, call in functions.items()}


def worst_error(function: Callable, shape: Shape, dtype: str) -> float:
  """The largest relative RMSE over y and the gradients against our float32 run on the same, rounded, inputs."""
  rounded = make_inputs(OPS['ssd'], shape, dtype)
  exact = {name: a.astype(jnp.float32) for name, a in rounded.items()}
  dy = jnp.ones_like(exact['x'])
  with jax.default_matmul_precision('highest'):
    y, gradients = jax.jit(make_functions(OPS['ssd'], shape, 'xla', True)['forward+backward'])(exact, dy)
  want = [y] + [gradients[name] for name in GRADIENTS]
  got = _passes(function, *to_torch(rounded, dtype))['forward+backward']()
  return max(relative(g.float().cpu().numpy(), np.asarray(w)) for g, w in zip(got, want, strict=True))


def to_torch(inputs: dict[str, jax.Array], dtype: str) -> tuple[dict[str, Any], Any]:
  """Leaves on the GPU that require gradients, and dy = 1."""
  import torch

  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  tensors = {}
  for name in GRADIENTS:
    kind = getattr(torch, str(inputs[name].dtype))
    array = np.array(inputs[name].astype(jnp.float32))
    tensors[name] = torch.from_numpy(array).to(device, kind).requires_grad_()
  return tensors, torch.ones_like(tensors['x'])


def _passes(function: Callable, inputs: dict[str, Any], dy: Any) -> dict[str, Callable]:
  import torch

  leaves = [inputs[name] for name in GRADIENTS]

  def forward() -> Any:
    with torch.no_grad():
      return function(*leaves)

  def both() -> list:
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

  return {'forward': forward, 'forward+backward': both}


def _memory(call: Callable) -> int:
  import torch

  torch.cuda.reset_peak_memory_stats()
  call()
  torch.cuda.synchronize()
  return torch.cuda.max_memory_allocated()


def relative(got: np.ndarray, want: np.ndarray) -> float:
  """Root mean square of the difference over that of `want`."""
  return float(np.sqrt(np.mean((got - want) ** 2.0) / np.mean(want**2.0)))
