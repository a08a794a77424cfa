"""Views of shaded solids from all around: numpy only, each set a pure function of its index, the cameras known."""
