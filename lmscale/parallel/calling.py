"""How compiled programs are called on a mesh: in which precision, and in step with the other processes."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp

from lmscale import processes
from lmscale.parallel.setup import Setup


class Caller:
  """call(function, *args): the result of a jitted function on the mesh of `setup`."""

  def __init__(self, setup: Setup):
    self._setup = setup
    self._emulated = setup.mesh.size > 1 and setup.mesh.devices.flat[0].platform == 'cpu'
    self._compiled: dict[Any, Any] = {}

  def __call__(self, function: Any, *args: Any) -> Any:
    with self.context():
      if processes.count() > 1:
        function = self._ready(function, *args)
      result = function(*args)
    # Emulated CPU devices share one thread pool, in which two programs in flight could each hold the threads that the
    # other's collectives wait for.
    return jax.block_until_ready(result) if self._emulated else result

  @contextlib.contextmanager
  def context(self) -> Any:
    """What programs are traced and lowered in. float32 means float32: accelerators would otherwise multiply it in TF32 or
    bfloat16."""
    exact = contextlib.nullcontext() if self._setup.dtype == jnp.bfloat16 else jax.default_matmul_precision('highest')
    with jax.set_mesh(self._setup.mesh), exact:
      yield

  def _ready(self, function: Any, *args: Any) -> Any:
    """`function` compiled for arguments of these shapes, by every process.

    Gloo waits 30 seconds for the other processes to come to a collective: less than compiling may take one of them longer.
    """
    key = function, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(args))
    if key not in self._compiled:
      self._compiled[key] = function.lower(*args).compile()
      processes.wait_for_all(f'compiled {len(self._compiled)}')
    return self._compiled[key]
