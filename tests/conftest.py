"""Every test runs on eight emulated CPU devices; compiled programs are cached between runs."""

import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# The tests compile far more than they run.
os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true')

import jax

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(__file__).parent.parent / '.cache' / 'jax'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def pytest_collection_modifyitems(items):
  """The longest file first, or at the end one of two test processes waits for it minutes long."""
  items.sort(key=lambda item: item.path.name != 'test_processes.py')
