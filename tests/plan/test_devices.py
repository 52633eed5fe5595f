"""The peaks behind an MFU, by the names that JAX gives to devices."""

import pytest

from lmscale.plan.devices import describe_peak, device_peak_flops


@pytest.mark.parametrize(
  ('kind', 'peak'),
  [
    ('NVIDIA A100-SXM4-40GB', 312e12), ('NVIDIA A100-SXM4-80GB', 312e12), ('NVIDIA A100 80GB PCIe', 312e12),
    ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA H100 PCIe', 756e12), ('NVIDIA H100 NVL', 835e12),
    ('NVIDIA H200', 989e12), ('NVIDIA H200 NVL', 835e12), ('NVIDIA GH200 480GB', 989e12),
    ('NVIDIA B200', 2250e12), ('NVIDIA GB200', 2500e12),
    ('TPU v4', 275e12), ('TPU v5 lite', 197e12), ('TPU v5e', 197e12), ('TPU v5p', 459e12), ('TPU v5', 459e12),
    ('TPU v6 lite', 918e12), ('TPU v6e', 918e12),
  ],
)  # fmt: skip
def test_known_peaks(kind, peak):
  assert device_peak_flops(kind, 'bfloat16') == peak
  assert device_peak_flops(kind, 'float32') is None
  assert f'{peak / 1e12:,.0f} TFLOP/s' in describe_peak(kind, 'bfloat16', 8)


@pytest.mark.parametrize(
  'kind', ['cpu', 'TPU v2', 'TPU v3', 'TPU v4 lite', 'TPU7x', 'NVIDIA H20', 'NVIDIA B300', 'NVIDIA L40S', 'Tesla T4', '']
)
def test_others_are_unknown_and_said_to_be(kind):
  assert device_peak_flops(kind, 'bfloat16') is None
  assert 'unknown, so no MFU' in describe_peak(kind, 'bfloat16')


def test_other_dtypes_say_why():
  assert 'in float32 unknown' in describe_peak('NVIDIA H200', 'float32')
