"""Custom attention kernels and the TensorRT plugins around them (README.md in this folder)."""
