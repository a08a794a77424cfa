"""One clip on several devices: guidance branches on groups of them, frames and positions within a group."""
