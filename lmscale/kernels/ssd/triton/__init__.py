"""SSD on NVIDIA GPUs, lowered through Triton; the kernels are imported where `entry` is."""
