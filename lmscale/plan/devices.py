"""What the accelerators can do: the peak that an MFU is a share of.

Figures are dense bfloat16 matmul FLOP/s of one JAX device, as the makers publish them (without structured sparsity):
  A100              312      NVIDIA A100 data sheet, all form factors
  H100 SXM, H200    989      NVIDIA H100 and H200 data sheets: 1,979 with sparsity, halved; the same in GH200
  H100 PCIe         756      NVIDIA H100 data sheet (PCIe): 1,513 with sparsity, halved
  H100 NVL          835      NVIDIA H100 NVL and H200 NVL data sheets: 1,671 with sparsity, halved
  B200              2,250    NVIDIA HGX B200 data sheet: 36 PFLOP/s with sparsity for eight, halved
  GB200             2,500    NVIDIA GB200 NVL72 data sheet: 360 PFLOP/s with sparsity for 72, halved
  TPU v4            275      docs.cloud.google.com/tpu/docs/v4, peak compute per chip
  TPU v5e           197      docs.cloud.google.com/tpu/docs/v5e
  TPU v5p           459      docs.cloud.google.com/tpu/docs/v5p
  TPU v6e           918      docs.cloud.google.com/tpu/docs/v6e
Chips that JAX shows as two devices (v2, v3, v7) or that nobody looked up are not guessed at.
"""

# TPUs by jax.Device.device_kind, in full: 'TPU v4 lite' is another chip than 'TPU v4'. 'TPU v5' is the v5p.
TPU_PEAKS = {
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5': 459e12,
  'TPU v5p': 459e12,
  'TPU v6 lite': 918e12,
  'TPU v6e': 918e12,
}
# GPUs by a part of it, since it also tells the memory ('NVIDIA H100 80GB HBM3'). The first that fits counts.
GPU_PEAKS = (
  ('GB200', 2500e12), ('B200', 2250e12), ('H200 NVL', 835e12), ('H200', 989e12), ('H100 NVL', 835e12),
  ('H100 PCIe', 756e12), ('H100', 989e12), ('A100', 312e12),
)  # fmt: skip


def device_peak_flops(device_kind: str, dtype: str) -> float | None:
  """Peak dense matmul FLOP/s of one device (jax's `device_kind`) in a compute dtype; None where it is not known.

  Only bfloat16 has one meaning: float32 matmuls run in TF32, in three bf16 passes or in full, as the precision says.
  """
  if dtype != 'bfloat16':
    return None
  if device_kind.startswith('TPU'):
    return TPU_PEAKS.get(device_kind)
  return next((peak for part, peak in GPU_PEAKS if part.lower() in device_kind.lower()), None)


def describe_peak(device_kind: str, dtype: str, devices: int = 1) -> str:
  """One line for people: the peak and its source, or that it is unknown and what follows from that."""
  if peak := device_peak_flops(device_kind, dtype):
    return f'{devices} * {device_kind}: {peak / 1e12:,.0f} TFLOP/s each in dense bfloat16; MFU is the share of that'
  why = '' if dtype == 'bfloat16' else f' in {dtype}'
  return f'{devices} * {device_kind}: peak FLOP/s{why} unknown, so no MFU'
