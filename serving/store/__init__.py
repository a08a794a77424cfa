"""Durable jobs: what is asked for, where it stands, and the files of results."""
