"""Every test runs on eight emulated CPU devices; compiled programs are cached between runs."""

import ctypes
import gc
import importlib.metadata
import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# The tests compile far more than they run.
QUICK = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
if importlib.metadata.version('jaxlib') < '0.11':  # later versions do not know it
  QUICK += ' --xla_cpu_use_fusion_emitters=false'
os.environ.setdefault('XLA_FLAGS', QUICK)

import jax

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_compilation_cache_dir', os.environ.get('TEST_JAX_CACHE') or str(pathlib.Path(__file__).parent.parent / '.cache' / 'jax'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)

MOST = 1.5e9  # bytes of a test process, above which it lets compiled programs go


def pytest_collection_modifyitems(items):
  """The longest file first, or at the end one of two test processes waits for it minutes long."""
  items.sort(key=lambda item: item.path.name != 'test_processes.py')


def pytest_runtest_teardown(item, nextitem):
  """JAX keeps every compiled program: a process would grow to several gigabytes. The next file needs none of them."""
  if nextitem is None or nextitem.path != item.path or resident_bytes() > MOST:
    jax.clear_caches()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident_bytes():
  return int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
