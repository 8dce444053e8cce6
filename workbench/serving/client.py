"""One request to a server and its answer, token by token.

aiohttp carries it. Rejected: httpx2, which takes twice the processor time a chunk (100 against 50 microseconds,
measured at 50 streams; what the client computes is taken from a server on the same machine), h11 on bare streams (as
fast, but TLS, pools and time-outs would be ours), and guidellm (text prompts only, 6 GB of its own).

The clock is the event loop's, so that tests can run an hour of load in a moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from workbench.errors import importing
from workbench.records import Request
from workbench.serving.address import Address
from workbench.serving.faults import Busy, Dropped, Fault, Gone, Refused
from workbench.serving.stream import Event, How, Lines, Tally, event_of, is_end, parsed, words_of

if TYPE_CHECKING:
    import aiohttp

FIRST_S = 300.0
"""Seconds without a token before a stream's first one: under load it waits for its turn."""
SILENT_S = 60.0
"""Seconds without a token after that."""
CONNECT_S = 10.0
READ_BYTES = 1 << 14
"""Of a stream, read at once."""
MOST_BYTES = 1 << 24
"""Of an answer that is no stream."""
CACHED = 0.1
"""Share of a prompt whose computation a server may have saved: more is another measurement. A chat's template and the
mark of a text's beginning are the same for all."""
EXTRAS: dict[str, object] = {"ignore_eos": True, "return_token_ids": True}
"""What vLLM and llama-server understand beyond OpenAI's API: answers of the length asked for, and ids."""
Got = TypeVar("Got")
Prompt = str | list[int]
Api = Literal["completions", "chat"]


@dataclass(frozen=True)
class Wanted:
    """A request to be sent."""

    prompt: Prompt
    prompt_tokens: int
    """So many by calibration; a server that counts them is believed."""
    new_tokens: int


@dataclass(frozen=True)
class Dialect:
    """How a server wants to be asked."""

    model: str
    answers_as: str = ""
    """The name that its answers are in."""
    api: Api = "completions"
    extras: bool = True
    """Whether it takes `EXTRAS`."""
    by_length: bool = False
    """Whether its tokens can be counted by nothing but the length asked for, which its answers must then have."""

    @property
    def path(self) -> str:
        return "/completions" if self.api == "completions" else "/chat/completions"

    def body(self, prompt: Prompt, new_tokens: int, stream: bool) -> dict[str, object]:
        """A request as the API has it: greedy, of so many tokens."""
        asked: dict[str, object] = {"model": self.model, "max_tokens": new_tokens, "temperature": 0}
        asked |= (
            {"prompt": prompt} if self.api == "completions" else {"messages": [{"role": "user", "content": prompt}]}
        )
        asked |= {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        asked |= EXTRAS if self.extras else {}
        # llama_cpp.server's words for an answer of that length, of the likeliest tokens.
        return asked | ({"min_tokens": new_tokens, "repeat_penalty": 1.0} if self.by_length else {})


@dataclass(frozen=True)
class Answer:
    """A streamed answer as a sample, and how its tokens were counted."""

    request: Request
    how: How | None
    fault: Fault | None = None


class Client:
    """Connections to one server; a context manager. `least_s_per_token`: what its fastest answer to a fresh prompt took
    a prompt token when it was asked nothing else."""

    def __init__(self, address: Address, first_s: float = FIRST_S, silent_s: float = SILENT_S) -> None:
        self.address, self._first_s, self._silent_s = address, first_s, silent_s
        self.least_s_per_token = 0.0
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        with importing("aiohttp, which asks servers,", "pip install aiohttp"):
            import aiohttp
        # On this machine a connection costs less than the doubt whether the server has just closed a kept one;
        # elsewhere they are kept shorter than servers keep them.
        kept: dict[str, Any] = {"force_close": True} if self.address.loopback else {"keepalive_timeout": 3}
        connector = aiohttp.TCPConnector(limit=0, **kept)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self.address.headers)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def get(self, path: str) -> bytes:
        """What the server has at a path. Raises `Fault`."""
        return await self._whole("GET", path, None)

    async def ask(self, url: str, body: object, most: int = MOST_BYTES) -> bytes:
        """What it answers to a request of its own kind at this address of its. Raises `Fault`."""
        async with self._asked("POST", url, body) as reply:
            return await self._text(reply, most)

    async def complete(self, dialect: Dialect, prompt: Prompt, new_tokens: int) -> Event:
        """An answer at once, not streamed. Raises `Fault`."""
        return parsed(await self._whole("POST", dialect.path, dialect.body(prompt, new_tokens, False)))

    async def stream(self, dialect: Dialect, wanted: Wanted) -> Answer:
        """A streamed answer; a fault is told in it, with what had come."""
        now = asyncio.get_running_loop().time
        started = now()
        tally = Tally(dialect.answers_as)
        try:
            await self._read(dialect.path, dialect.body(wanted.prompt, wanted.new_tokens, True), tally, now)
            gained, how = tally.counted(wanted.new_tokens)
            usage = tally.usage
            prompt_tokens = (usage.prompt_tokens if usage else 0) or wanted.prompt_tokens
            request = _sample(tally, gained, prompt_tokens, started, now())
            if fault := self._too_good(request, usage.cached_tokens if usage else 0):
                raise fault
            return Answer(request, how)
        except Fault as fault:
            words = self.address.without_key(str(fault))
            kept = _sample(tally, [1] * len(tally.moments), wanted.prompt_tokens, started, now(), words)
            return Answer(kept, None, fault)

    def _too_good(self, request: Request, cached_tokens: int) -> Fault | None:
        if cached_tokens > CACHED * request.prompt_tokens:
            return Fault(f"{cached_tokens} of {request.prompt_tokens} prompt tokens came from a cache")
        least_s = self.least_s_per_token * request.prompt_tokens / 4
        if request.first_token_s is not None and request.first_token_s < least_s:
            return Fault(
                f"its first token came after {request.first_token_s * 1e3:.3g} ms, a fresh prompt takes it idle "
                f"{4e3 * least_s:.3g} ms at the least: from a cache"
            )
        return None

    async def _read(self, path: str, body: object, tally: Tally, now: Callable[[], float]) -> None:
        begun = now()
        async with self._asked("POST", path, body) as reply:
            _read_little(reply)
            try:
                # One for the whole of it: a timer for every token costs a tenth of what the client computes.
                async with asyncio.timeout_at(begun + self._first_s) as limit:
                    await self._take_all(reply, tally, now, limit)
            except TimeoutError as error:
                limit_s = self._silent_s if tally.moments else self._first_s
                raise _fault_of(error, limit_s, len(tally.moments)) from None

    async def _take_all(
        self, reply: aiohttp.ClientResponse, tally: Tally, now: Callable[[], float], limit: asyncio.Timeout
    ) -> None:
        """Every event of a stream, as it comes. `limit` is set anew by tokens, at most 60 times in its own length."""
        lines, renewed = Lines(), -math.inf
        while True:
            try:
                data = await reply.content.readany()
            except _connection_errors() as error:
                raise _fault_of(error, 0.0, len(tally.moments)) from None
            moment, before = now(), len(tally.moments)
            for line in lines.feed(data):
                if event := event_of(line):
                    tally.take(event, moment)
                elif is_end(line):
                    return
            if not data:
                # Some servers close without an end mark; an answer that has no reason to end was cut.
                if tally.finish is None:
                    raise Gone(f"closed after {len(tally.moments)} pieces, before the answer's end")
                return
            # Comments that keep a connection open are no tokens.
            if len(tally.moments) > before and moment - renewed > self._silent_s / 60:
                renewed = moment
                limit.reschedule(moment + self._silent_s * (1 + 1 / 60))

    async def _whole(self, method: str, path: str, body: object) -> bytes:
        async with self._asked(method, path, body) as reply:
            return await self._text(reply, MOST_BYTES)

    @contextlib.asynccontextmanager
    async def _asked(self, method: str, path: str, body: object) -> AsyncIterator[aiohttp.ClientResponse]:
        """A request that was sent, whose answer's head promises an answer. Raises `Fault`."""

        def sent() -> Awaitable[aiohttp.ClientResponse]:
            assert self._session is not None, "a client is used as a context manager"
            # Redirects are not followed: the key is for this server.
            url = path if path.startswith(self.address.root) else self.address.url + path
            return self._session.request(method, url, json=body, allow_redirects=False)

        try:
            reply = await _within(sent(), self._first_s, self._first_s, 0)
        except Dropped:
            # A connection that was kept and that the server had closed meanwhile: nothing was asked.
            reply = await _within(sent(), self._first_s, self._first_s, 0)
        try:
            if reply.status in (401, 403):
                raise Refused(reply.status, "")  # Its words may be the key's.
            if reply.status != 200:
                words = words_of(await self._text(reply, 2000))
                raise (Busy if reply.status in (429, 503) else Refused)(reply.status, words)
            yield reply
            reply.release()
        finally:
            reply.close()

    async def _text(self, reply: aiohttp.ClientResponse, most: int) -> bytes:
        text = b""
        while len(text) < most and (data := await _within(reply.content.readany(), self._silent_s, self._silent_s, 0)):
            text += data
        return text


def _read_little(reply: aiohttp.ClientResponse) -> None:
    """Make what is read at once as small as tokens are: asyncio makes room for a quarter of a megabyte for each read,
    which takes longer than anything else that is done with a token."""
    transport = reply.connection.transport if reply.connection else None
    if transport is not None and hasattr(transport, "max_size"):
        transport.max_size = READ_BYTES


async def _within(waited: Awaitable[Got], left_s: float, limit_s: float, pieces: int) -> Got:
    """What is waited for. Raises `Gone` for none in what is left of a limit, and where the connection ends."""
    try:
        async with asyncio.timeout(left_s):
            return await waited
    except _connection_errors() as error:
        raise _fault_of(error, limit_s, pieces) from None


@functools.cache
def _connection_errors() -> tuple[type[Exception], ...]:
    """What ends a connection."""
    import aiohttp

    return (aiohttp.ClientError, OSError, ValueError)


def _fault_of(error: Exception, limit_s: float, pieces: int) -> Gone:
    """What has ended a connection, or a limit on silence, in words."""
    import aiohttp

    if isinstance(error, TimeoutError):
        return Gone(f"no token for {limit_s:g} s after {pieces} pieces")
    if isinstance(error, aiohttp.ClientConnectorError):
        return Gone(f"nobody listens there ({error.strerror or error})")
    return Dropped(f"the connection ended after {pieces} pieces ({type(error).__name__})")


def _sample(
    tally: Tally, gained: list[int], prompt_tokens: int, started: float, ended: float, error: str = ""
) -> Request:
    moments = tally.moments
    return Request(
        sent_s=0.0,
        late_s=0.0,
        prompt_tokens=prompt_tokens,
        end_s=max(1e-6, round(ended - started, 6)),
        first_token_s=max(1e-6, round(moments[0] - started, 6)) if moments else None,
        gaps_s=[round(after - before, 6) for before, after in zip(moments, moments[1:], strict=False)],
        gained=gained,
        error=error,
    )
