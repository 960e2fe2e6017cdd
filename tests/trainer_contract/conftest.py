"""What the suite runs beyond its default."""

from __future__ import annotations

import pytest


@pytest.fixture
def more(pytestconfig: pytest.Config) -> bool:
    """Whether scenarios that others cover on two ranks run there, too."""
    return bool(pytestconfig.getoption("full_matrix"))
