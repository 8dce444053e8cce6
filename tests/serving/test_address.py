"""Addresses and keys as people type them."""

from __future__ import annotations

import pytest

from workbench.errors import UserError
from workbench.serving.address import address_of


@pytest.mark.parametrize(
    ("typed", "url", "loopback"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1", True),
        ("localhost:8000/", "http://localhost:8000/v1", True),
        ("http://[::1]:1/v1/", "http://[::1]:1/v1", True),
        ("https://api.example.com/openai/v1", "https://api.example.com/openai/v1", False),
        ("http://127.0.0.1.example.com", "http://127.0.0.1.example.com/v1", False),
        ("http://10.0.0.3:80", "http://10.0.0.3:80/v1", False),
    ],
)
def test_what_is_typed(typed: str, url: str, loopback: bool) -> None:
    found = address_of(typed)
    assert (found.url, found.loopback, found.headers) == (url, loopback, {})


@pytest.mark.parametrize("typed", ["", "ftp://x", "http://", "http://x:99999999", "http://[", "file:///etc/passwd"])
def test_what_is_no_address(typed: str) -> None:
    with pytest.raises(UserError, match="no address of a server"):
        address_of(typed)


@pytest.mark.parametrize("typed", ["http://me:sk-1@x/v1", "http://x/v1?key=sk-1", "http://x/v1#sk-1"])
def test_secrets_in_an_address_are_refused_and_not_repeated(typed: str) -> None:
    with pytest.raises(UserError, match="--api-key-env VAR") as told:
        address_of(typed)
    assert "sk-1" not in str(told.value)


def test_a_key_is_read_from_its_variable_only() -> None:
    found = address_of("http://x", "MINE", {"MINE": " sk-1\n"})
    assert found.headers == {"Authorization": "Bearer sk-1"}
    assert found.without_key("wrong key sk-1!") == "wrong key ***!"
    for variable, environment in (("MINE", {}), ("MINE", {"MINE": ""}), ("sk-proj-" + "x" * 60, {})):
        with pytest.raises(UserError, match="not set") as told:
            address_of("http://x", variable, environment)
        assert "sk-proj" not in str(told.value)
    with pytest.raises(UserError, match="no HTTP header takes"):
        address_of("http://x", "MINE", {"MINE": "sk\u20ac"})
