"""Quickly deployable plugins: kernels as PTX inside the engine, so that nothing of ours is needed where it runs."""
