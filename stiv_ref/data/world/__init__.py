"""A drawn world of one moving object: numpy only, each clip a pure function of (seed, index), the truth known."""
