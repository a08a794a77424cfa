"""Training: stages, optimizer, averages, sharding, state, log."""
