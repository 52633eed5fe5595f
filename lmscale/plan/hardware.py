"""Named accelerators in the clusters that they are sold in, for plans: memory, bandwidth, links, and how to compile for them.

Per device, links in one direction, decimal units:
             memory   HBM         in a node                    across nodes
  A100       80 GB    2,039 GB/s  NVLink 3: 600 GB/s, halved   a 200 Gb/s InfiniBand adapter a GPU (DGX A100)
  H100       80 GB    3.35 TB/s   NVLink 4: 900 GB/s, halved   a 400 Gb/s ConnectX-7 a GPU (DGX H100)
  H200       141 GB   4.8 TB/s    the same                     the same (DGX H200)
  v5p        95 GB    2,765 GB/s  3D torus of up to 8,960 chips, 600 GB/s of which a mesh axis, along one of the three dims, has a third
Sources: NVIDIA's A100 80GB (SXM), H100 (SXM) and H200 data sheets, the DGX A100, DGX H100 and DGX H200 data sheets;
docs.cloud.google.com/tpu/docs/v5p (1,200 GB/s a chip in both directions). Peaks are those of `devices`.
"""

import dataclasses

from lmscale.errors import ConfigError
from lmscale.plan.devices import device_peak_flops


@dataclasses.dataclass(frozen=True)
class Hardware:
  """A device and its place in a cluster. memory: bytes; hbm, inside, across: bytes/s; node: devices that `inside` links join."""

  name: str
  device_kind: str  # as JAX says it
  memory: float
  hbm: float
  node: int
  inside: float
  across: float

  @property
  def peak(self) -> float:
    """Dense bfloat16 FLOP/s."""
    return device_peak_flops(self.device_kind, 'bfloat16')

  def link(self, ranks: int, stride: int) -> float:
    """Bytes/s at which each of `ranks` devices, every `stride`-th, receives from the others: the slowest link among them."""
    return self.inside if ranks * stride <= self.node else self.across


HARDWARE = {
  hardware.name: hardware
  for hardware in (
    Hardware('A100', 'NVIDIA A100-SXM4-80GB', 80e9, 2.039e12, 8, 300e9, 25e9),
    Hardware('H100', 'NVIDIA H100 80GB HBM3', 80e9, 3.35e12, 8, 450e9, 50e9),
    Hardware('H200', 'NVIDIA H200', 141e9, 4.8e12, 8, 450e9, 50e9),
    Hardware('v5p', 'TPU v5p', 95e9, 2.765e12, 8960, 200e9, 6.25e9),
  )
}


def find_hardware(names: list[str]) -> list[Hardware]:
  """Hardware by name, `all` or nothing being all of it.

  Raises:
    ConfigError: a name that is not known.
  """
  if unknown := [name for name in names if name not in HARDWARE and name != 'all']:
    raise ConfigError(f'--hardware: {unknown[0]!r} is not one of {", ".join(HARDWARE)}, all')
  return [hardware for name, hardware in HARDWARE.items() if not names or 'all' in names or name in names]


# Multiprocessors, shared memory of one in KB, L2 in MB, GHz, compute capability; for the H200 as for the H100. NVIDIA's A100
# and H100 architecture white papers, and the CUDA C++ programming guide, appendix "Compute Capabilities".
_CHIPS = {
  'A100': (108, 164, 40, 1.41, 'major: 8 minor: 0'),
  'H100': (132, 228, 50, 1.98, 'major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES'),
}
_CHIPS['H200'] = _CHIPS['H100']


def gpu_target(name: str) -> str:
  """A GPU as XLA's GpuTargetConfigProto in text, from which it compiles for one that is not there."""
  hardware = HARDWARE[name]
  cores, shared, l2, clock, capability = _CHIPS[name]
  return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {64 if name == 'A100' else 128}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {(shared - 1) * 1024}
  shared_memory_per_core: {shared * 1024}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {hardware.hbm:.0f}
  device_memory_size: {hardware.memory:.0f}
  l2_cache_size: {l2 * 2**20}
  clock_rate_ghz: {clock}
  cuda_compute_capability {{ {capability} }}
}}
platform_name: "CUDA"
device_description_str: "{hardware.device_kind}"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
"""
