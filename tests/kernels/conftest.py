"""The static table of the kernels, printed when all tests are through."""

from __future__ import annotations

import pytest

LINES = pytest.StashKey[list[str]]()


@pytest.fixture
def static_lines(request: pytest.FixtureRequest) -> list[str]:
    """What has been printed of the table so far, to be added to."""
    return request.config.stash.setdefault(LINES, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash.get(LINES, []):
        terminalreporter.section("what the compiler makes of the kernels (kernels/static_table.py)")
        for line in lines:
            terminalreporter.write_line(line)
