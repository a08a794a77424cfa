"""From a checkpoint to a bundle: ONNX graphs, their checks, engines, parity."""
