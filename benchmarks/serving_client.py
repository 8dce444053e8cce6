"""What the client of a server's load costs: how late it sees each token, and its processor time, at 50 streams.

    python -P benchmarks/serving_client.py [--streams 50] [--tokens 200] [--token-ms 20]

A server in a process of its own sends a token every 20 ms on each stream and writes beside it when it did, by the clock
that both processes have. What the client sees later is its own delay and the loopback's. The claims: 99 of 100 tokens
are seen within a tenth of the time between tokens, and the client takes less than a quarter of one core. Exit code 1 if
not. Run from the repository root on an idle machine; the server takes about as much as the client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

from workbench.report.estimates import quantile  # noqa: E402
from workbench.serving import client as wing  # noqa: E402
from workbench.serving.address import address_of  # noqa: E402
from workbench.serving.client import Client, Dialect, Wanted  # noqa: E402
from workbench.serving.load import closed  # noqa: E402
from workbench.serving.stream import Event, Tally  # noqa: E402

LATE, CORES = 0.1, 0.25
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"


async def serve(tokens: int, token_s: float) -> None:
    """The server: prints its port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD)
        due = time.monotonic()
        for number in range(tokens):
            due += token_s
            await asyncio.sleep(due - time.monotonic())
            finish = "length" if number == tokens - 1 else None
            choice = {"text": " word", "token_ids": [7], "finish_reason": finish}
            told = {"model": repr(time.monotonic()), "choices": [choice]}
            writer.write(b"data: " + json.dumps(told).encode() + b"\n\n")
        writer.write(b"data: [DONE]\n\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def measure(port: int, streams: int, tokens: int) -> tuple[list[float], float]:
    """Seconds between sending and seeing of every token, ascending; cores that the client took."""
    delays: list[float] = []

    class Timed(Tally):
        def take(self, event: Event, moment: float) -> None:
            delays.append(moment - float(event.model or "nan"))
            super().take(event, moment)

    wing.Tally = Timed  # type: ignore[misc]
    began, worked = time.monotonic(), time.process_time()
    async with Client(address_of(f"127.0.0.1:{port}")) as client:
        wanted = [Wanted("prompt", 1, tokens) for _ in range(streams)]
        point, _ = await closed(lambda each: client.stream(Dialect("any"), each), wanted, streams)
    assert not any(each.error for each in point.requests), point.requests[0].error
    return sorted(delays), (time.process_time() - worked) / (time.monotonic() - began)


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--streams", type=int, default=50)
    words.add_argument("--tokens", type=int, default=200)
    words.add_argument("--token-ms", type=float, default=20.0)
    words.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    told = words.parse_args()
    if told.serve:
        asyncio.run(serve(told.tokens, told.token_ms / 1e3))
    program = [
        sys.executable,
        "-P",
        __file__,
        "--serve",
        "--tokens",
        str(told.tokens),
        "--token-ms",
        str(told.token_ms),
    ]
    with subprocess.Popen(program, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        try:
            port = int(server.stdout.readline())
            delays, cores = asyncio.run(measure(port, told.streams, told.tokens))
        finally:
            server.kill()
    half, most = quantile(delays, 0.5), quantile(delays, 0.99)
    print(f"{told.streams} streams, {len(delays)} tokens, one every {told.token_ms:g} ms each")
    print(
        f"seen {half * 1e3:.2f} ms after sending (median), {most * 1e3:.2f} ms (99 %), {delays[-1] * 1e3:.1f} ms (most)"
    )
    a_token = cores * told.tokens * told.token_ms * 1e-3 / len(delays)
    print(f"the client took {cores:.2f} cores, {a_token * 1e6:.0f} us a token")
    return 0 if most <= LATE * told.token_ms / 1e3 and cores <= CORES else 1


if __name__ == "__main__":
    sys.exit(main())
