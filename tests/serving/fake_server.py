"""A server that speaks the OpenAI API on loopback and misbehaves on demand, as real ones cannot be made to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Fake:
    """How it behaves; may be changed while it runs."""

    models: list[str] = field(default_factory=lambda: ["toy"])
    answers_as: str = ""
    key: str = ""
    elsewhere: str = ""
    """Where every request is sent on to."""
    apis: tuple[str, ...] = ("completions", "chat")
    knows_extras: bool = True
    ids: bool = True
    usage: bool = True
    a_chunk: int = 1
    """Tokens."""
    context: int = 10**6
    cached: int = 0
    first_s: float = 0.004
    token_s: float = 0.001
    tells: dict[int, tuple[str, float]] = field(default_factory=dict)
    """By id: its text and log-probability, wherever it stands; told to `echo` and `logprobs`, if there are any."""
    ends_after: int = 10**6
    """Tokens after which it ends a streamed answer by itself, unless asked for more at the least."""
    says: str = "x"
    """What it answers where nothing is streamed."""
    slots: int = 10**6
    """More at once are told that it is busy."""
    busy: int = 0
    """So many requests more are told that it is."""
    faults: dict[int, str] = field(default_factory=dict)
    """By number of the streamed request, from 0; -1: all."""
    streamed: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    port: int = 0
    url: str = ""
    at_once: int = 0

    def close(self) -> None:
        """No longer listen, and end every connection."""
        with contextlib.suppress(RuntimeError):  # It is closed already.
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _run(self, ready: threading.Event) -> None:
        async def main() -> None:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            ready.set()
            await self._stop.wait()
            server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        asyncio.run(main())

    def start(self) -> None:
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(10)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                first, *lines = head.split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.headers.append(head)
                _, path, _ = first.split(" ")
                if not await self._answer(path, headers, json.loads(body or b"{}"), writer):
                    break
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, headers: dict[str, str], body: Any, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays."""
        if self.elsewhere:
            writer.write(b"HTTP/1.1 307 X\r\nlocation: %s\r\ncontent-length: 0\r\n\r\n" % self.elsewhere.encode())
            return True
        if self.key and headers.get("authorization") != f"Bearer {self.key}":
            return self._plain(writer, 401, {"error": f"wrong key {headers.get('authorization')}"})
        if path == "/health":
            return self._plain(writer, 200, {})
        if path == "/v1/models":
            return self._plain(writer, 200, {"data": [{"id": name} for name in self.models]})
        api = "chat" if "chat" in path else "completions"
        if api not in self.apis or not path.endswith("/completions"):
            return self._plain(writer, 404, {"error": "no such path"})
        if not self.knows_extras and "ignore_eos" in body:
            return self._plain(writer, 400, {"error": "unknown field ignore_eos"})
        prompt = body["messages"][0]["content"] if api == "chat" else body["prompt"]
        prompt_tokens = len(prompt) if isinstance(prompt, list) else 3 + len(prompt) // 5
        if prompt_tokens + body.get("max_tokens", 16) > self.context:
            return self._plain(writer, 400, {"error": f"more than {self.context} tokens"})
        self.asked.append(body)
        if self.busy > 0:
            self.busy -= 1
            return self._plain(writer, 429, {"error": "too many"})
        many = body.get("max_tokens", 16)
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": many}
        usage |= {"prompt_tokens_details": {"cached_tokens": self.cached}} if self.cached else {}  # type: ignore[dict-item]
        model = self.answers_as or body["model"]
        if not body.get("stream"):
            piece: dict[str, Any] = {"finish_reason": "length"}
            piece |= {"message": {"content": self.says}} if api == "chat" else {"text": self.says}
            if self.tells and body.get("echo"):
                piece["logprobs"] = self._echoed(prompt)
            return self._plain(writer, 200, {"model": model, "choices": [piece], "usage": usage})
        if self.at_once >= self.slots:
            return self._plain(writer, 429, {"error": "too many"})
        self.at_once += 1
        try:
            number, self.streamed = self.streamed, self.streamed + 1
            fault = self.faults.get(number, self.faults.get(-1, ""))
            finish = "length" if many <= max(self.ends_after, body.get("min_tokens", 0)) else "stop"
            many = many if finish == "length" else self.ends_after
            return await self._stream(writer, api, model, many, usage, fault, finish)
        finally:
            self.at_once -= 1

    def _echoed(self, ids: list[int]) -> dict[str, Any]:
        told = [self.tells[token] for token in ids]
        values: list[float | None] = [None, *(value for _, value in told[1:])]
        tops = [None, *({"the likeliest": -0.5} for _ in told[1:])]
        return {"tokens": [text for text, _ in told], "token_logprobs": values, "top_logprobs": tops}

    async def _stream(
        self,
        writer: asyncio.StreamWriter,
        api: str,
        model: str,
        many: int,
        usage: dict[str, Any],
        fault: str,
        finish: str,
    ) -> bool:
        if fault.startswith("status"):
            return self._plain(writer, int(fault.split()[1]), {"error": "told to"})
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")

        def chunk(data: bytes) -> None:
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))

        def event(told: dict[str, Any]) -> bytes:
            return b"data: " + json.dumps(told, ensure_ascii=False).encode() + b"\n\n"

        await asyncio.sleep(0.0 if fault == "at once" else self.first_s)
        if fault == "other model":
            model = "another"
        done = 0
        while done < many:
            more = min(self.a_chunk, many - done)
            done += more
            words = "wörd" * more
            piece: dict[str, Any] = {"delta": {"content": words}} if api == "chat" else {"text": words}
            piece |= {"token_ids": [7] * more} if self.ids else {}
            piece |= {"finish_reason": finish} if done == many else {}
            data = event({"model": model, "choices": [piece]})
            if done > many // 2 and fault == "stall":
                while True:
                    chunk(b": still here\n\n")
                    await asyncio.sleep(0.05)
            if done > many // 2 and fault in ("reset", "end"):
                if fault == "end":
                    chunk(b"")
                    return False
                writer.transport.abort()
                return False
            if done > many // 2 and fault == "broken off":
                chunk(b"data: [DONE]\n\n")
                chunk(b"")
                return True
            if fault == "garbage":
                data = b'data: {"choices": [{"te\n\n'
            if fault == "not utf-8":
                data = data.replace("ö".encode(), b"\xc3(")
            if fault == "cut character":
                place = data.index("ö".encode()) + 1
                chunk(data[:place])
                await writer.drain()
                await asyncio.sleep(0.001)
                data = data[place:]
            if fault == "error inside":
                data = event({"error": {"message": "out of memory"}})
            chunk(data * (2 if fault == "doubled" else 1))
            await writer.drain()
            await asyncio.sleep(self.token_s)
        if self.usage or fault == "wrong usage":
            told = usage | ({"completion_tokens": many * 3} if fault == "wrong usage" else {})
            chunk(event({"model": model, "choices": [], "usage": told}))
        chunk(b"data: [DONE]\n\n")
        chunk(b"")
        return True

    def _plain(self, writer: asyncio.StreamWriter, status: int, told: object) -> bool:
        data = json.dumps(told).encode()
        writer.write(
            b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (status, len(data))
        )
        writer.write(data)
        return True


@contextmanager
def fake_server(**behaviour: Any) -> Iterator[Fake]:
    """A server, until the end."""
    fake = Fake(**behaviour)
    fake.start()
    try:
        yield fake
    finally:
        fake.close()
