"""Runs the bodies of the Mosaic GPU kernels in NumPy: the code itself, with Pallas' names replaced.

JAX's own GPU interpreter has no rule for most of what these kernels use. This one knows only what they use, and is as
unkind as the hardware may be: an asynchronous copy or wgmma reads its operands at the last moment, when it is
awaited; shared memory written by threads may not be read by either before `commit_smem`; tiles of the pipeline turn
to NaN once their step is over, and memory is NaN until it is written. The warpgroups of a program run one after the
other, so what one hands to another (nothing, but tiles loaded before the loop by warpgroup 0) is not tested.
"""

import contextlib
import functools
import itertools
import threading

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as real

from lmscale.kernels.ssd.mosaic import outer, walk

MODULES = (walk, outer)
LOCK = threading.Lock()


def _poisoned(shape, dtype):
  floating = dtype not in (np.int32, np.bool_)
  return np.full(shape, np.nan if floating else np.iinfo(np.int32).min, dtype)


class _Buffer:
  """Shared memory written by threads and not yet committed is dirty."""

  def __init__(self, smem):
    self.smem, self.dirty = smem, False


class Ref:
  """A view of global or shared memory."""

  def __init__(self, array, smem=False, buffer=None):
    self.array, self.buffer = array, buffer or _Buffer(smem)

  @property
  def at(self):
    return _At(self)

  def transpose(self, permutation):
    return Ref(self.array.transpose(permutation), buffer=self.buffer)

  def __getitem__(self, index):
    return np.array(self.array[index])

  def __setitem__(self, index, value):
    assert self.array[index].shape == np.shape(value) and self.array.dtype == value.dtype, 'stores do not broadcast'
    self.buffer.dirty = self.buffer.smem
    self.array[index] = value


class _At:
  def __init__(self, ref):
    self.ref = ref

  def __getitem__(self, index):
    part = self.ref.array[index]
    assert part.base is not None, 'an index must give a view'
    return Ref(part, buffer=self.ref.buffer)


class _Barrier:
  def __init__(self, arrivals, count=1):
    self.arrivals, self.copies = arrivals, []
    self.at = [self] if count == 1 else [_Barrier(arrivals) for _ in range(count)]


class _Accumulator:
  def __init__(self, emulator, value):
    self.emulator, self.value = emulator, value

  def __getitem__(self, index):
    assert index is Ellipsis
    self.emulator.wait_wgmma()
    return self.value.copy()


class Emulator:
  """What the kernel modules see as `pl`, `plgpu` and `lax`; one per launch of a kernel."""

  def __init__(self):
    self.axes, self.products, self.stores = {}, [], []

  # lax
  def axis_index(self, name):
    return self.axes[name]

  @staticmethod
  def broadcast_in_dim(vector, shape, dims):
    return np.broadcast_to(vector[:, None] if dims == (0,) else vector[None, :], shape)

  @staticmethod
  def cond(predicate, yes, no, *operands):
    return yes(*operands) if predicate else no(*operands)

  # pl
  @staticmethod
  def ds(start, size):
    return slice(start, start + size)

  @staticmethod
  def when(predicate):
    return lambda function: function() if predicate else None

  def run_scoped(self, function, *shapes):
    result = function(*(_Accumulator(self, np.zeros(shape, np.float32)) for shape in shapes))
    assert not self.products, 'a product outlives its accumulator'
    return result

  def run_state(self, function):
    def run(values):
      accumulators = tuple(_Accumulator(self, value.copy()) for value in values)
      function(accumulators)
      return tuple(accumulator[...] for accumulator in accumulators)

    return run

  # plgpu: memory
  @staticmethod
  def load(ref, *index, layout, optimized=True):
    assert layout is not None and index in ((), ((),))
    return np.array(ref.array)

  @staticmethod
  def layout_cast(value, layout):
    return value

  def commit_smem(self):
    for ref in self.scratch:
      if isinstance(ref, Ref):
        ref.buffer.dirty = False

  def copy_smem_to_gmem(self, source, target):
    assert not source.buffer.dirty, 'TMA reads shared memory that was not committed'
    assert source.array.shape == target.array.shape
    self.stores.append((source, target))

  def wait_smem_to_gmem(self, n, wait_read_only=False):
    assert n == 0
    for source, target in self.stores:
      target.array[...] = source.array
    self.stores = []

  @staticmethod
  def copy_gmem_to_smem(source, target, barrier):
    barrier.copies.append((source, target))

  @staticmethod
  def barrier_wait(barrier):
    assert len(barrier.copies) == barrier.arrivals, 'a barrier that is never complete'
    for source, target in barrier.copies:
      target.array[...] = source.array

  # plgpu: wgmma
  def wgmma(self, accumulator, a, b):
    for operand in (a, b):
      if isinstance(operand, Ref):
        assert operand.buffer.smem and not operand.buffer.dirty, 'wgmma reads shared memory that was not committed'
    m, k = (a.array if isinstance(a, Ref) else a).shape
    assert m % 64 == 0 and k % 16 == 0 and accumulator.value.shape == (m, b.array.shape[1]) and b.array.shape[0] == k
    self.products.append((accumulator, a, b))

  def wait_wgmma(self):
    for accumulator, a, b in self.products:
      a, b = (np.asarray(m.array if isinstance(m, Ref) else m, np.float32) for m in (a, b))
      accumulator.value += a @ b
    self.products = []

  @staticmethod
  def broadcasted_iota(dtype, shape, dimension, *, layout):
    return np.broadcast_to(np.arange(shape[dimension], dtype=dtype)[:, None] if dimension == 0 else
                           np.arange(shape[dimension], dtype=dtype)[None, :], shape)  # fmt: skip

  def emit_pipeline_warp_specialized(self, step, *, grid, in_specs, num_compute_wgs, compute_context, **_):
    def run(*sources):
      def pipeline(carry):
        for i in range(*grid):
          tiles = [_tile(spec, source, i) for spec, source in zip(in_specs, sources, strict=True)]
          carry = step((i,), *tiles, carry)
          assert not self.products, 'a product outlives the tiles of its step'
          for tile in tiles:
            tile.array[...] = _poisoned(tile.array.shape, tile.array.dtype)
        return carry

      compute_context(pipeline)

    return run


def _tile(spec, source, i):
  index = tuple(
    j if size is None else slice(j * size, (j + 1) * size)
    for j, size in zip(spec.index_map(i), spec.block_shape, strict=True)
  )
  assert all(not isinstance(k, slice) or k.stop <= size for k, size in zip(index, source.array.shape, strict=True))
  return Ref(source.array[index].copy(), smem=True)


def _scratch(kind):
  if kind is None:
    return None
  if isinstance(kind, real.Barrier):
    return _Barrier(kind.num_arrivals, int(np.prod(kind.num_barriers)))
  return Ref(_poisoned(kind.shape, kind.dtype), smem=True)


def _launch(body, out_type, scratch_types, grid, grid_names, num_threads, *operands):
  """Every program of the grid, and in it every compute warpgroup, one after the other."""
  emulator = Emulator()
  plgpu = _Namespace(emulator, real)
  plgpu.ACC = type('ACC', (), {'__new__': lambda cls, shape, dtype: shape, 'init': staticmethod(lambda value: value)})
  inputs = [Ref(np.asarray(m)) for m in operands]
  outputs = [Ref(_poisoned(m.shape, m.dtype)) for m in out_type]
  with _replaced(pl=emulator, plgpu=plgpu, lax=emulator, jnp=np):
    for cell in itertools.product(*map(range, grid)):
      emulator.scratch = [_scratch(kind) for kind in scratch_types]
      for wg in range(num_threads - 1):
        emulator.axes = dict(zip(grid_names, cell, strict=True)) | {'wg': wg}
        body(*inputs, *outputs, *emulator.scratch)
        assert not emulator.stores, 'a program ends before its stores'
  for output in outputs:
    assert not np.isnan(np.asarray(output.array, np.float32)).any(), 'NaN in an output, or a part never written'
  return tuple(output.array for output in outputs)


class _Namespace:
  """The emulator's names, else the real module's."""

  def __init__(self, first, second):
    self._both = (first, second)

  def __getattr__(self, name):
    first, second = self._both
    return getattr(first, name, None) or getattr(second, name)


@contextlib.contextmanager
def _replaced(**names):
  with LOCK, pytest.MonkeyPatch.context() as patch:
    for module in MODULES:
      for name, value in names.items():
        if hasattr(module, name):
          patch.setattr(module, name, value)
    yield


def _kernel(body, *, out_type, scratch_types, grid, grid_names, num_threads, **_):
  run = functools.partial(_launch, body, out_type, scratch_types, grid, grid_names, num_threads)
  return lambda *operands: jax.pure_callback(run, out_type, *operands)


def install(patch: pytest.MonkeyPatch) -> None:
  """From now on the kernels run here. Only under jit: what is traced must not be traced while a kernel runs."""
  shell = _Namespace(real, real)
  shell.kernel = _kernel
  for module in MODULES:
    patch.setattr(module, 'plgpu', shell)
