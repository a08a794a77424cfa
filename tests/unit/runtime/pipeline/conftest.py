"""A pipeline on the toy bundle."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from stiv_deploy.runtime import StivPipeline


@pytest.fixture
def pipe(bundle_path: Path) -> Iterator[StivPipeline]:
    with StivPipeline.from_bundle(bundle_path, "onnxruntime", threads=1) as pipe:
        yield pipe
