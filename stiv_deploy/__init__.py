"""STIV video diffusion, from training to deployment. The folders beside this one are its packages."""

__version__ = "0.1.0"
