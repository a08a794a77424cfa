"""The contract on disk: graphs and their tensors, manifest, files with hashes."""
