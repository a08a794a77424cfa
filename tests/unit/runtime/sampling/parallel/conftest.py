"""A toy bundle with halves."""

from pathlib import Path

import pytest
from mixing_toys import mixing_graphs
from toys import Toy, make_bundle

from stiv_deploy.runtime.bundle.bundle import Bundle


@pytest.fixture(scope="session")
def mixing_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy bundle with halves; do not write into it."""
    return make_bundle(tmp_path_factory.mktemp("mixing") / "bundle", Toy(), mixing_graphs())


@pytest.fixture
def mixing(mixing_path: Path) -> Bundle:
    return Bundle.open(mixing_path)
