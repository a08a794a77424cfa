"""Text encoders and VAEs of other projects, from local folders."""
