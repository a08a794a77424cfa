"""Fused attention: the kernels of runtime/plugins as PyTorch operators."""
