"""Reference code to ONNX files: modules by the contract, tracing, passes, 8-bit layers, plugin forms, checks."""
