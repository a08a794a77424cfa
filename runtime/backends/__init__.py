"""Backends: ways to execute a bundle's graphs. Each is imported only when it is asked for."""
