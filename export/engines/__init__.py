"""ONNX to engines: builds, cached and installed into the bundle. Free of torch, the reference and calibration."""
