"""Calibration: ranges of the reference model over its real sampling loop, and which layers run in 8 bits."""
