"""The whole chain on the shipped checkpoint, as one command."""
