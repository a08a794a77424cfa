"""A bundle as a service: an HTTP API, durable jobs, and workers that batch clips step by step."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before ONNX Runtime is imported; see README
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # and before Ray is
