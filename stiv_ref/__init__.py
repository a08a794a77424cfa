"""The reference: STIV in plain PyTorch, trainable, and the oracle that every shipped form is compared with."""
