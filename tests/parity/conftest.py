"""Shared by the parity tests, most of which export."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _traced_once(traced_once: None) -> None:
    """For all tests of this folder."""
