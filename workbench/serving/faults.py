"""What can go wrong between a request and its answer."""

from __future__ import annotations


class Fault(Exception):
    """Why a request got no answer that can be counted: a sample with an error, not the end of the load."""


class Gone(Fault):
    """Nobody answers at all; several of them in a row are the end of a load."""


class Dropped(Gone):
    """The connection ended."""


class Refused(Fault):
    """The server does not take the request."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"status {status}{': ' if words else ''}{words}")
        self.status = status


class Busy(Refused):
    """It takes no more for now."""
