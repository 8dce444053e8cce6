"""The bytes of a streamed answer -> when how many tokens came.

Server-sent events as the HTML standard has them (section 9.2): lines of `data:`, an event a blank line; here an event
is one line of JSON, as every server of this API sends it. Bytes are decoded by whole lines only, so that a character
cut in two by the network is whole again.

Tokens are counted by their ids where the server sends them, else by its usage; a chunk may hold many, or none. A server
that sends neither has told how many tokens there are where it stopped at the length asked for. What contradicts itself
(more chunks with text than tokens, ids that usage does not count) is refused: lines were doubled, or the count is
wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from workbench.serving.faults import Fault

LONGEST_LINE = 1 << 22
"""Bytes; no event of one token comes near."""
How = Literal["ids", "usage", "length"]
"""What tokens are counted by."""


class Delta(msgspec.Struct):
    """A piece of a chat's answer."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class Choice(msgspec.Struct):
    """A piece of an answer."""

    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None

    @property
    def says(self) -> bool:
        """Whether it holds any text."""
        told = self.delta or Delta()
        return bool(self.text or told.content or told.reasoning or told.reasoning_content)


class Details(msgspec.Struct):
    """Of a prompt's tokens."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """Tokens, as the server counts them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: Details | None = None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that it did not compute."""
        return (self.prompt_tokens_details and self.prompt_tokens_details.cached_tokens) or 0


class Event(msgspec.Struct):
    """One event of a stream, or the whole of an answer that is none."""

    model: str | None = None
    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


class Lines:
    """Bytes as the network cuts them -> whole lines."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that are whole now, without their ends. Raises `Fault` for one that does not end."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LONGEST_LINE:
            raise Fault(f"a line of more than {LONGEST_LINE} bytes")
        return [line.rstrip(b"\r") for line in lines]


def event_of(line: bytes) -> Event | None:
    """The event that a line holds; None for a comment, a blank line, another field or the end mark. Raises `Fault`."""
    if not line.startswith(b"data:"):
        if line.startswith(b"{"):
            raise Fault(f"an answer that is no stream: {words_of(line)}")
        return None
    text = line[5:].strip()
    return None if text in (b"", b"[DONE]") else parsed(text)


def is_end(line: bytes) -> bool:
    """Whether a line ends the stream."""
    return line.startswith(b"data:") and line[5:].strip() == b"[DONE]"


def parsed(text: bytes) -> Event:
    """An answer's JSON. Raises `Fault` for what is none, and for an error that the server reports in it."""
    try:
        event = msgspec.json.decode(text, type=Event)
    except UnicodeDecodeError:
        raise Fault("bytes that are not UTF-8") from None
    except (ValueError, RecursionError) as error:
        what = "bytes that are not UTF-8" if "utf-8" in str(error).lower() else f"no JSON of this API ({error})"
        raise Fault(f"{what}: {words_of(text)}") from None
    if event.error:
        raise Fault(f"the server reports: {words_of(str(event.error).encode())}")
    return event


def words_of(data: bytes) -> str:
    """The beginning of what a server sent, as one line that can be printed."""
    text = " ".join(data[:1000].decode("utf-8", "replace").split())[:200]
    return "".join(mark if mark.isprintable() else "?" for mark in text)


@dataclass
class Tally:
    """An answer as it comes."""

    model: str = ""
    """The name that the answer must be in; empty: any."""
    moments: list[float] = field(default_factory=list)
    """When something came, by the reader's clock."""
    ids: list[int] = field(default_factory=list)
    """So many ids each time."""
    usage: Usage | None = None
    finish: str | None = None
    named: str = ""
    """The name that it is in."""

    def take(self, event: Event, moment: float) -> None:
        """An event that came at this moment. Raises `Fault` if it is of another model."""
        if event.model and self.model and event.model != self.model:
            raise Fault(f"answers as another model: {words_of(event.model.encode())}")
        self.named = event.model or self.named
        self.usage = event.usage or self.usage
        for choice in event.choices:
            self.finish = choice.finish_reason or self.finish
            if choice.says or choice.token_ids:
                self.moments.append(moment)
                self.ids.append(len(choice.token_ids or ()))

    def counted(self, asked: int) -> tuple[list[int], How]:
        """Tokens of each arrival, and what they were counted by. Raises `Fault` where that cannot be known.

        Where only their sum is known, it is shared out over the arrivals as evenly as whole numbers are. One arrival
        more than tokens is allowed: some servers hold text back and send it last.
        """
        pieces = len(self.moments)
        if not pieces:
            raise Fault("no text at all")
        said = self.usage.completion_tokens if self.usage else None
        how: How
        if any(self.ids):
            how, total = "ids", sum(self.ids)
            if said is not None and said != total:
                raise Fault(f"{total} token ids came, its usage counts {said}: doubled lines, or a wrong count")
        elif said is not None:
            how, total = "usage", said
        elif self.finish == "length":
            how, total = "length", asked
        elif self.finish is None:
            raise Fault(
                f"broken off after {pieces} pieces, without a reason to end: llama_cpp.server does that for whoever "
                "asks next, unless started with --interrupt_requests false"
            )
        else:
            raise Fault("neither ids nor usage: its tokens cannot be counted")
        if total > asked:
            raise Fault(f"{total} tokens by its own count, {asked} were asked for")
        if total < pieces - 1 or not total:
            raise Fault(f"{pieces} pieces of text, {total} tokens by its own count: doubled lines, or a wrong count")
        return (self.ids if how == "ids" else shared_out(total, pieces)), how


def shared_out(total: int, pieces: int) -> list[int]:
    """A sum as so many whole numbers, as even as can be."""
    ends = [total * place // pieces for place in range(pieces + 1)]
    return [after - before for before, after in zip(ends, ends[1:], strict=False)]
