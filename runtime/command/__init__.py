"""The command line: stiv, its dispatcher, and the commands that need no torch."""
