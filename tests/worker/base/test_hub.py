"""The hub: every refusal from a server on loopback, and a snapshot from the cache."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.places import ROOT


def hub(source: dict[str, Any], tmp_path: Path, offline: bool = False, **env: str) -> str:
    """What `prepare` says or returns in a fresh interpreter with its own hub cache."""
    code = (
        "import json, sys\nfrom workbench.worker.base.prepare import prepare\nfrom workbench.errors import UserError\n"
        "try: print(json.dumps(prepare(json.loads(sys.argv[1]), lambda *a: None)))\n"
        "except UserError as error: print('UserError', error)\n"
    )
    payload = {"source": source, "out": str(tmp_path / "out"), "offline": offline}
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, json.dumps(payload)],
        env={**clean, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


class Refusing(http.server.BaseHTTPRequestHandler):
    """A hub that answers every request as the real one answers for the repository's name."""

    def do_GET(self) -> None:
        status, code = (403, "GatedRepo") if "gated" in self.path else (404, "RepoNotFound")
        if "revision/nope" in self.path or "/nope" in self.path:
            status, code = 404, "RevisionNotFound"
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Any:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_hub_refusals_say_what_to_do(tmp_path: Path, endpoint: str) -> None:
    gated = hub({"hub": "owner/gated"}, tmp_path, HF_ENDPOINT=endpoint)
    assert gated.startswith("UserError") and "is gated" in gated and "HF_TOKEN" in gated and "hf download" in gated
    missing = hub({"hub": "owner/missing"}, tmp_path, HF_ENDPOINT=endpoint)
    assert "does not exist, or is private" in missing and "HF_TOKEN" in missing
    revision = hub({"hub": "owner/name", "revision": "nope"}, tmp_path, HF_ENDPOINT=endpoint)
    assert "no such revision" in revision


def test_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    said = hub({"hub": "owner/name"}, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot be" in said and "`hf download owner/name`" in said and "`path:`" in said
    assert "hub is off" in hub({"hub": "owner/name"}, tmp_path, HF_HUB_OFFLINE="1")
    assert "hub is off" in hub({"hub": "owner/name"}, tmp_path, offline=True)
    assert "not a repository's name" in hub({"hub": "a/b/c d"}, tmp_path, offline=True)


@pytest.mark.slow
def test_hub_snapshot_from_the_cache(base_dir: Path, tmp_path: Path) -> None:
    sha = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hf" / "hub" / "models--owner--name"
    shutil.copytree(base_dir, repo / "snapshots" / sha)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(sha)
    for revision in ("main", sha):
        reply = json.loads(hub({"hub": "owner/name", "revision": revision}, tmp_path, HF_HUB_OFFLINE="1"))
        assert reply["revision"] == sha and reply["path"] == str(repo / "snapshots" / sha)
    weights = repo / "snapshots" / sha / "model.safetensors"
    content = weights.read_bytes()
    blob = repo / "blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir()
    weights.replace(blob)
    weights.symlink_to(blob)
    assert json.loads(hub({"hub": "owner/name"}, tmp_path, offline=True))["revision"] == sha
    blob.write_bytes(content[:-1000] + bytes(1000))
    said = hub({"hub": "owner/name"}, tmp_path, offline=True)
    assert f"{blob} is not what the hub holds (cut short, or spoiled): delete it, and run again" in said
    weights.unlink()
    assert "holds no *.safetensors" in hub({"hub": "owner/name"}, tmp_path, offline=True)
