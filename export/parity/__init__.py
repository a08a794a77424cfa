"""The parity ladder: a bundle against its checkpoint, level by level."""
