"""SSD on Hopper GPUs, lowered through Mosaic GPU; the kernels are imported where `entry` is."""
