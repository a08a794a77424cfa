"""The sampling loop on bound graphs: schedule, guidance, frame replacement."""
