"""The toy bundle for all tests of the runtime."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from toys import bundle_of, bundle_path, bundle_with, own_bundle, proven, sampled, skipping_path, toy, toy_bundle

__all__ = [
    "bundle_of",
    "bundle_path",
    "bundle_with",
    "own_bundle",
    "proven",
    "sampled",
    "skipping_path",
    "toy",
    "toy_bundle",
]
