"""A service on a Ray cluster: its two kinds of replicas, when there are more of them, and how they get there."""

import os

if os.environ.get("RAY_ADDRESS", "127.0.0.1").startswith("127.0.0.1"):
    # Ray's switch for machines that are no part of a larger cluster: its ports are then at 127.0.0.1 alone, which
    # nothing else achieves. It is read when Ray is imported.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
