"""The commands of the reference: train, data, plot."""
