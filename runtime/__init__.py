"""What ships: run a bundle without torch."""
