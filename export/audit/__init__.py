"""What the builder fused, layer by layer, against what it should have. Stands on engines only."""
