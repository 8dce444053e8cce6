"""Cards and uploads: what the hub reads, what a licence forbids, and a whole upload to a stand-in of the hub's HTTP
API on loopback, driven by the real huggingface_hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command import command
from tests.places import ROOT
from tests.rows import a_row
from workbench.errors import UserError
from workbench.hub import card as cards
from workbench.hub import push as wing
from workbench.hub.licences import FAMILIES, LICENCES, hint, refusal
from workbench.records import Row
from workbench.report import store


@dataclass
class Hub:
    """The part of the hub's API that an upload uses; what arrives is kept."""

    url: str = ""
    repositories: dict[str, bool] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    refuse: int = 0


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, what: Any, code: int = 200) -> None:
            body = json.dumps(what).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                whole = b""
                while size := int(self.rfile.readline(), 16):
                    whole += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return whole
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_PUT(self) -> None:
            content = self.body()
            state.objects[hashlib.sha256(content).hexdigest()] = content
            self.answer({})

        def do_POST(self) -> None:
            content, path = self.body(), self.path.partition("?")[0]
            if self.headers.get("Authorization") != "Bearer secret" or state.refuse:
                self.answer({"error": "Invalid username or password."}, state.refuse or 401)
            elif path == "/api/repos/create":
                asked = json.loads(content)
                state.repositories[f"{asked['organization']}/{asked['name']}"] = asked.get("visibility") == "private"
                self.answer({"url": f"{state.url}/{asked['organization']}/{asked['name']}", "name": asked["name"]})
            elif path == "/api/validate-yaml":
                asked = yaml.safe_load(json.loads(content)["content"].split("---\n")[1])
                self.answer(
                    {"errors": [] if isinstance(asked, dict) else [{"message": "no front matter"}], "warnings": []}
                )
            elif "/preupload/" in path:
                names = [file["path"] for file in json.loads(content)["files"]]
                modes = {name: "lfs" if name.endswith((".safetensors", ".gguf")) else "regular" for name in names}
                self.answer(
                    {"files": [{"path": n, "shouldIgnore": False, "uploadMode": mode} for n, mode in modes.items()]}
                )
            elif path.endswith("/objects/batch"):
                self.answer(
                    {
                        "transfer": "basic",
                        "objects": [
                            {**o, "actions": {"upload": {"href": f"{state.url}/lfs/{o['oid']}"}}}
                            for o in json.loads(content)["objects"]
                        ],
                    }
                )
            elif "/commit/" in path:
                for line in content.splitlines():
                    part = json.loads(line)
                    value = part["value"]
                    if part["key"] == "header":
                        state.commits.append(value)
                    elif part["key"] == "file":
                        state.files[value["path"]] = base64.b64decode(value["content"])
                    elif part["key"] == "lfsFile":
                        state.files[value["path"]] = state.objects[value["oid"]]
                name = path.removeprefix("/api/models/").partition("/commit/")[0]
                self.answer(
                    {"commitUrl": f"{state.url}/{name}/commit/1", "commitOid": "1" * 40, "pullRequestUrl": None}
                )
            else:
                self.answer({"error": f"unknown {path}"}, 404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield state
    server.shutdown()
    server.server_close()


def rows_of(folder: Path, source: dict[str, str], **more: Any) -> list[Row]:
    """A base and a variant of it, with files on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Toy-Q4.gguf").write_bytes(b"GGUF" + bytes(1000))
    base = a_row("base", base="Toy-1M")
    row = a_row("gguf-Q4_0", windows=[(4, 8.4), (4, 10.0), (4, 9.5)], base="Toy-1M", **more)
    provenance = {
        "source": source,
        "options": {"type": "Q4_0", "imatrix": False},
        "versions": {"gguf": "0.19"},
        "base": "b1",
    }
    artifact = replace(row.artifact, path=str(folder / "Toy-Q4.gguf"), provenance=provenance)
    return [base, replace(row, artifact=artifact)]


def front(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_the_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"hub": "meta-llama/Llama-3.1-8B-Instruct"})
    rows[1] = replace(rows[1], measurement=replace(rows[1].measurement, settings={"threads": 7}))  # type: ignore[type-var]
    text = cards.card(rows, rows[1], "llama3.1", "someone")
    assert front(text) == {
        "base_model": "meta-llama/Llama-3.1-8B-Instruct",
        "base_model_relation": "quantized",
        "quantized_by": "someone",
        "license": "llama3.1",
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["quantized", "gguf", "workbench"],
    }
    assert "[meta-llama/Llama-3.1-8B-Instruct](https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct)" in text
    assert 'begin the name of the model with "Llama"' in text
    assert "| gguf-Q4_0 | llamacpp" in text and "| base" in text
    assert "- method: gguf, type Q4_0, imatrix False" in text
    assert "llama-server --model Toy-Q4.gguf" in text and "--threads" not in text and str(tmp_path) not in text
    hub = pytest.importorskip("huggingface_hub")
    assert hub.ModelCard(text).data.base_model == "meta-llama/Llama-3.1-8B-Instruct"  # as the hub's own reader sees it


def test_a_licence_that_the_hub_has_no_word_for() -> None:
    row = a_row("q", method="awq")
    row = replace(row, artifact=replace(row.artifact, format="awq"))
    found = cards.front_matter(row, "mrl")
    assert (found["license"], found["license_name"]) == ("other", "mrl")
    assert found["license_link"].startswith("https://mistral.ai/") and found["library_name"] == "transformers"
    assert cards.front_matter(row, "house-rules") == {
        "license": "other",
        "license_name": "house-rules",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["quantized", "awq", "4-bit", "workbench"],
    }
    assert "license" not in cards.front_matter(row, None)


def test_names_cannot_break_out_of_the_card(tmp_path: Path) -> None:
    evil = 'x"\n---\nlicense: mit\n<script>alert(1)</script>`| [a](javascript:b)'
    rows = rows_of(tmp_path, {"hub": evil})
    row = replace(rows[1], base=evil, artifact=replace(rows[1].artifact, warnings=[evil], variant=evil))
    text = cards.card([row], row, evil, evil)
    matter = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    assert matter["license"] == "other" and matter["quantized_by"] == evil
    assert "<script>" not in text.split("\n---\n", 1)[1]


def test_every_family_is_named_with_what_it_asks() -> None:
    assert {family for family, _, _ in FAMILIES} == {"Llama", "Gemma", "Qwen", "Mistral", "Phi", "DeepSeek"}
    for _, _, names in FAMILIES:
        assert any(known in names for known in LICENCES)
    assert all(known.asks for known in LICENCES.values() if known.redistribution)
    assert hint("Llama-3.1-8B-Instruct") == "Llama models come under llama3.1."
    assert "gemma" in hint("google/gemma-3-4b-it") and "mit" in hint("microsoft/phi-4")
    assert hint("SmolLM2") == ""


@pytest.mark.parametrize(
    ("licence", "model", "why"),
    [
        (None, "Qwen2.5-3B", r"the licence of Qwen2.5-3B is not known. Qwen models come under"),
        ("house-rules", "Toy", "what the licence 'house-rules' of Toy asks is not known here"),
        ("cc-by-nc-nd-4.0", "Toy", "CC BY-NC-ND 4.0, the licence of Toy, forbids passing on derivatives"),
    ],
)
def test_what_is_refused(tmp_path: Path, licence: str | None, model: str, why: str) -> None:
    import re

    assert re.search(why, refusal(licence, model) or "")
    rows = [replace(row, base=model) for row in rows_of(tmp_path, {"path": "/base"})]
    with pytest.raises(UserError, match=f"not pushed: {why}"):
        wing.push(rows, rows[1], "me/toy", licence=licence)
    for known in LICENCES.values():
        assert (refusal(known.id, "m") is None) == known.redistribution


def test_the_licence_is_read_off_the_base(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a", {"path": "/base"})
    assert wing.licence_of(rows[1], rows) is None
    base = replace(rows[0], artifact=replace(rows[0].artifact, format="safetensors", path=str(tmp_path)))
    (tmp_path / "README.md").write_text("---\nlicense: gemma\n---\n# Toy\n")
    assert wing.licence_of(rows[1], [base, rows[1]]) == "gemma"
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: qwen-research\n---\n")
    assert wing.licence_of(rows[1], [base, rows[1]]) == "qwen-research"
    for broken in ("---\nlicense: [\n---\n", "no front matter", "---\n- a\n---\n"):
        (tmp_path / "README.md").write_text(broken)
        assert wing.licence_of(rows[1], [base, rows[1]]) is None
    assert wing.licence_of(rows_of(tmp_path / "b", {"package": "no-such-package"})[1], []) is None
    assert wing.licence_of(rows_of(tmp_path / "b", {"package": "huggingface_hub"})[1], []) in (None, "apache-2.0")


def push(hub: Hub, folder: Path, *words: str, token: str = "secret") -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder / "hf"),
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, "-m", "workbench.cli", "push", *words, "--results", str(folder / "results")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        timeout=120,
    )


def test_a_gguf_goes_up_with_its_card_in_one_commit(hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    for row in rows_of(tmp_path / "files", {"hub": "google/gemma-3-1b-it"}):
        store.append(tmp_path / "results", "desk", row)
    refused = push(hub, tmp_path, "gguf-Q4_0", "me/toy")
    assert refused.returncode == 2 and "not pushed: the licence of Toy-1M is not known" in refused.stderr
    assert hub.repositories == {} and hub.commits == []
    done = push(hub, tmp_path, "gguf-Q4_0", "me/toy", "--licence", "gemma", "--author", "me", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/me/toy/commit/1"
    assert hub.repositories == {"me/toy": True} and len(hub.commits) == 1
    assert set(hub.files) == {"Toy-Q4.gguf", "README.md", "Notice"}
    assert hub.files["Toy-Q4.gguf"] == (tmp_path / "files" / "Toy-Q4.gguf").read_bytes()
    assert front(hub.files["README.md"].decode())["license"] == "gemma"
    assert b"Gemma is provided under and subject to the Gemma Terms of Use" in hub.files["Notice"]
    wrong = push(hub, tmp_path, "gguf-Q4_0", "me/toy", "--licence", "gemma", token="nonsense")
    assert wrong.returncode == 2 and "the hub refused" in wrong.stderr and "Traceback" not in wrong.stderr
    assert push(hub, tmp_path, "gguf-Q4_0", "me/toy", "--anyway").returncode == 0


def test_a_folder_goes_up_whole_but_no_code(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_library = pytest.importorskip("huggingface_hub")
    folder = tmp_path / "awq"
    (folder / "sub").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "sub/more.json", "README.md"):
        (folder / name).write_bytes(name.encode())
    rows = rows_of(tmp_path / "x", {"path": "/base"})
    row = replace(rows[1], artifact=replace(rows[1].artifact, path=str(folder), format="awq", method="awq"))
    api = hub_library.HfApi
    monkeypatch.setattr(hub_library, "HfApi", lambda: api(endpoint=hub.url, token="secret"))
    monkeypatch.setattr(hub_library.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_library.constants, "HF_HUB_DISABLE_XET", True)
    wing.push([*rows, row], row, "me/toy", licence="mit")
    assert set(hub.files) == {"model.safetensors", "config.json", "tokenizer.json", "sub/more.json", "README.md"}
    assert hub.files["README.md"].startswith(b"---\n")  # ours, not what lay there
    (folder / "modeling_toy.py").write_text("import os")
    with pytest.raises(UserError, match="neither weights nor configuration: modeling_toy.py"):
        wing.push([*rows, row], row, "me/toy", licence="mit")


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    hub_library = pytest.importorskip("huggingface_hub")
    rows = rows_of(tmp_path, {"path": "/base"})
    api = hub_library.HfApi
    monkeypatch.setattr(hub_library, "HfApi", lambda: api(endpoint="http://127.0.0.1:9", token="secret"))
    monkeypatch.setattr(hub_library.constants, "HF_HUB_OFFLINE", offline)
    wanted = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached .*refused"
    with pytest.raises(UserError, match=f"me/toy: not pushed, {wanted}"):
        wing.push(rows, rows[1], "me/toy", licence="mit")


def test_what_cannot_be_pushed(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"path": "/base"})
    with pytest.raises(UserError, match="write the repository as OWNER/NAME"):
        wing.push(rows, rows[1], "toy", licence="mit")
    (tmp_path / "Toy-Q4.gguf").unlink()
    with pytest.raises(UserError, match="are not there.*workbench quantize"):
        wing.push(rows, rows[1], "me/toy", licence="mit")
    with pytest.raises(UserError, match="unknown variant 'gguf-Q4_1'. Did you mean 'gguf-Q4_0'"):
        cards.find(rows, "gguf-Q4_1")
    other = replace(rows[1], base="Other", key="o", recipe="other")
    with pytest.raises(UserError, match=r"of 2 bases \(Other, Toy-1M\): name one with --recipe"):
        cards.find([*rows, other], "gguf-Q4_0")
    assert cards.find([*rows, other], "gguf-Q4_0", "other").base == "Other"


def test_the_card_command(tmp_path: Path) -> None:
    for row in rows_of(tmp_path / "files", {"path": "/base"}):
        store.append(tmp_path / "results", "desk", row)
    done = command("card", "gguf-Q4_0", "--results", str(tmp_path / "results"))
    assert done.returncode == 0, done.stderr
    assert front(done.stdout)[
        "library_name"
    ] == "gguf" and "The licence of Toy-1M is not known." in done.stdout.replace("toy-1m", "Toy-1M")


def test_a_card_says_who_made_the_blocks_of_a_gguf(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"hub": "meta-llama/Llama-3.1-8B-Instruct"})
    assert "blocks:" not in cards.card(rows, rows[1], "llama3.1", "someone"), "a row from before there was a choice"
    by = {"name": "workbench", "device": "NVIDIA H100", "rows_checked": 40, "rows_equal": 39}
    row = replace(rows[1], artifact=replace(rows[1].artifact, provenance=rows[1].artifact.provenance | {"encoder": by}))
    text = cards.card([rows[0], row], row, "llama3.1", "someone")
    assert "- blocks: made by workbench on NVIDIA H100, 39 of 40 rows compared are llama.cpp's" in text


def test_a_card_of_what_was_carried_is_of_its_format(tmp_path: Path) -> None:
    """And a checkpoint that was also carried has the card of the checkpoint, whichever engine came last."""
    rows = rows_of(tmp_path, {"hub": "meta-llama/Llama-3.1-8B-Instruct"})
    how = {"carried": {"from": "Toy-1M-awq", "types": ["Q4_1"], "largest_error": 4e-4}}

    def row(name: str, form: str, started_at: str, **provenance: Any) -> Row:
        found = replace(rows[1].artifact, variant=name, method="awq", format=form, digest=form, provenance=provenance)
        return replace(rows[1], artifact=found, started_at=started_at)

    file = row("gguf-awq", "gguf", "2026-02-01T00:00:00Z", **how)
    text = cards.card([rows[0], file], file, "llama3.1")
    assert front(text)["library_name"] == "gguf" and "awq" not in front(text)["tags"]
    assert "- carried: from Toy-1M-awq, in Q4\\_1" in text or "- carried: from Toy-1M-awq, in Q4_1" in text
    folder = row("mlx-awq", "mlx", "2026-02-01T00:00:00Z", **how)
    assert front(cards.card([rows[0], folder], folder, "llama3.1"))["library_name"] == "mlx"
    both = [row("awq", "awq", "2026-02-01T00:00:00Z"), row("awq", "gguf", "2026-02-02T00:00:00Z", **how)]
    assert cards.find([rows[0], *both], "awq").artifact.format == "awq"


def test_a_card_has_the_artifacts_own_numbers_whatever_its_base_was_scored_on_since(tmp_path: Path) -> None:
    base, row = a_row(recipe="mine"), a_row("Q4", recipe="mine", started_at="2026-11-21T11:00:00Z")
    other = a_row(recipe="other", evaluation="e2", started_at="2026-11-22T10:00:00Z")
    text = cards.card([base, row, other], row, "llama3.1", "someone")
    assert "| Q4 " in text and "| base " in text and "not shown" not in text
