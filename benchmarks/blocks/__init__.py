"""Baselines of one whole block in PyTorch; :mod:`blocks.baselines` is where to begin."""
