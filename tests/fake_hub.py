"""A hub on loopback: repositories that are folders, gated or absent ones by their names, and what was asked of it."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SHA = "0123456789abcdef0123456789abcdef01234567"
"""The one commit of each repository."""


@contextmanager
def hub(repositories: Mapping[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Its address, and a line for each request: method, file and range. What is called `gated` is."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = next((name for name in repositories if f"/{name}/" in f"{self.path}/"), "")
            if not name:
                gated = "gated" in self.path
                self.answer(403 if gated else 404, b"", {"X-Error-Code": "GatedRepo" if gated else "RepoNotFound"})
            elif "/resolve/" in self.path:
                self.serve(repositories[name], self.path.split("/resolve/")[1].partition("/")[2])
            else:
                files = [file.name for file in sorted(repositories[name].iterdir())]
                said = {"id": name, "sha": SHA, "siblings": [{"rfilename": file} for file in files]}
                tree = [{"type": "file", "path": file, "size": 1, "oid": "0"} for file in files]
                self.answer(200, json.dumps(tree if "/tree/" in self.path else said).encode(), {})

        def serve(self, folder: Path, name: str) -> None:
            file = folder / name
            if not file.is_file():
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})
            ranged = (self.headers.get("range") or "").removeprefix("bytes=")
            asked.append(f"{self.command} {name} {ranged}".strip())
            first, _, last = ranged.partition("-")
            content = file.read_bytes()
            part = content[int(first) : int(last or len(content)) + 1] if ranged else content
            self.answer(206 if ranged else 200, part, {"X-Repo-Commit": SHA, "ETag": f'"{name}"'})

        def answer(self, status: int, content: bytes, more: dict[str, str]) -> None:
            self.send_response(status)
            for header, value in {**more, "Content-Length": str(len(content))}.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
