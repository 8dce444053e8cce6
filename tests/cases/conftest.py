"""A place for a case: a cache and results of its own, and where its base lies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench import Bench


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Bench]:
    """`case.model` is the folder of the base, yet to be written."""
    place = Bench(tmp_path / "home", tmp_path, tmp_path / "base")
    yield place
    assert not place.workers()
