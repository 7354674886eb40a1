"""What several test files share: one browser for all of them."""

import pytest

from tests.browser import chromium


@pytest.fixture(scope="session")
def browser():
    with chromium() as running:
        yield running
