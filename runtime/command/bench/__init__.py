"""``stiv bench``: how long a bundle takes, how sure that is, and whether two results may be compared."""
