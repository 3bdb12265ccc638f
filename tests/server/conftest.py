from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.server.wire")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A traceback in one of the server's threads fails the test that it served."""
    for item in items:
        if "/server/" in str(item.path):
            item.add_marker(
                pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
            )
