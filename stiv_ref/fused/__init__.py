"""Fused attention: the kernels of runtime/plugins as PyTorch operators, and modules that call them."""
