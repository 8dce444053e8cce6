"""Sizes as people write and read them."""

from __future__ import annotations

import pytest

from workbench.errors import UserError
from workbench.report.units import amount, printable
from workbench.sizes import UNITS, mib_text, parse_size, size_text


def test_units_are_the_powers_that_their_names_say() -> None:
    for power, letter in enumerate("kmgt", 1):
        assert UNITS[f"{letter}ib"] == UNITS[letter] == 1024**power
        assert UNITS[f"{letter}b"] == 1000**power
    assert (UNITS["b"], len(UNITS)) == (1, 13)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 MiB"), (2**20, "1 MiB"), (2**30 - 2**20, "1023 MiB"), (2**30, "1.00 GiB"), (5 * 2**28, "1.25 GiB")],
)
def test_sizes_are_told_in_the_unit_that_fits(size_bytes: int, text: str) -> None:
    assert size_text(size_bytes) == text


def test_one_unit_where_two_are_compared() -> None:
    assert (mib_text(2**30), mib_text(1.5 * 2**20), mib_text(2**19, 2)) == ("1024.0 MiB", "1.5 MiB", "0.50 MiB")
    assert amount(3 * 2**20, "B") == "3.0 MiB"
    assert (amount(123456.0, "tok/s"), amount(0.00123456, "")) == ("1.235e+05 tok/s", "0.001235")
    assert printable("a\x1b[2J\nb") == "a [2J b"


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        *(("8GiB", 2**33), (" 1.5 GB ", 1_500_000_000), ("800M", 800 * 2**20), ("12B", 12)),
        *(("24gb", 24_000_000_000), ("24gib", 24 * 2**30), ("24 Gb", 24_000_000_000), ("1t", 2**40)),
    ],
)
def test_sizes_are_read_back(text: str, size_bytes: int) -> None:
    assert parse_size(text, "--memory") == size_bytes


@pytest.mark.parametrize("text", ["8", "GiB", "8 gigs", "-1GiB", "", "1.GiB", "8GiB8"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--memory .*write a size with its unit"):
        parse_size(text, "--memory")
