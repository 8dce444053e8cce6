"""GGUF files that others made: compared with the base's own, linked, refused in one line, planned from their headers.

Measured by real engines: `tests/cases/test_found.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench import Bench
from tests.fake_hub import SHA, hub
from tests.places import ROOT
from tests.worker.base.gguf_files import write_gguf
from tests.worker.others import convert, rewrite, split
from tests.worker.small_models import write_model
from workbench.errors import UserError
from workbench.machine import isolate
from workbench.recipe.load import parse
from workbench.records import to_json
from workbench.shape import NamedShape, Shape, Traits
from workbench.worker.methods.file import adopt, headers

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`F32.gguf`, as the base's own conversion is; `X-Q8_0.gguf`, the same quantized by somebody."""
    folder = tmp_path_factory.mktemp("files")
    write_gguf(folder / "F32.gguf", "F32")
    write_gguf(folder / "X-Q8_0.gguf", "Q8_0")
    return folder


def silent(done: float, total: float, text: str) -> None:
    assert 0 <= done <= total and text


def found(files: Path, file: Path, out: Path) -> Any:
    options = {"hub": "", "file": "", "revision": "", "path": str(file)}
    asked = {"base": "", "out": str(out / f"Tiny-{file.name}"), "options": options, "source": str(files / "F32.gguf")}
    return adopt(asked, silent)


def refusal(files: Path, file: Path, out: Path) -> str:
    with pytest.raises(UserError) as caught:
        found(files, file, out)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shape_of(file: Path, **changes: Any) -> Shape:
    tensors = tuple(
        NamedShape(each.name, tuple(reversed(each.shape.tolist()))) for each in gguf.GGUFReader(file).tensors
    )
    facts = {"hidden": 64, "head_dim": 16, "inner": 96, "vocab_size": 259, "context_tokens": 128, "dtype": "float32"}
    return Shape(tensors, Traits(1, 4, 2), **(facts | changes))


def test_a_file_is_linked_and_told_as_it_is(files: Path, tmp_path: Path) -> None:
    made = found(files, files / "X-Q8_0.gguf", tmp_path)
    (link,) = tmp_path.iterdir()
    assert link.is_symlink() and link.samefile(files / "X-Q8_0.gguf") and link.name == "Tiny-X-Q8_0.gguf"
    own = {each.name: each for each in gguf.GGUFReader(files / "X-Q8_0.gguf").tensors}
    assert made["tensor_types"] == {name: each.tensor_type.name for name, each in own.items()}
    assert made["disk_bytes"] == sum(int(each.n_bytes) for each in own.values())
    about = made["provenance"]["found"]
    assert about["sha256"] == {"X-Q8_0.gguf": hashlib.sha256((files / "X-Q8_0.gguf").read_bytes()).hexdigest()}
    assert made["provenance"]["options"] == {"path": "X-Q8_0.gguf"}, "no folder of this machine"
    assert about["header"]["general.name"] == "tiny" and about["header"]["general.license"] == "mit"
    (told,) = made["warnings"]
    assert told.endswith("measured as it is: X-Q8_0.gguf; its header names no importance matrix")


@pytest.mark.parametrize(("bare", "parts"), [(False, 3), (True, 4)])
def test_all_parts_of_a_file_that_is_split(bare: bool, parts: int, files: Path, tmp_path: Path) -> None:
    first = split(files / "X-Q8_0.gguf", tmp_path / "parts", 4, bare)
    (tmp_path / "out").mkdir()
    made = found(files, first, tmp_path / "out")
    whole = found(files, files / "X-Q8_0.gguf", tmp_path)
    assert (made["tensor_types"], made["disk_bytes"]) == (whole["tensor_types"], whole["disk_bytes"])
    links = sorted(link.name for link in (tmp_path / "out").iterdir())
    assert links == [f"Tiny-X-Q8_0-{part:05}-of-{parts:05}.gguf" for part in range(1, parts + 1)]
    assert len(made["provenance"]["found"]["sha256"]) == parts
    assert "llama-gguf-split --merge" in made["provenance"]["limits"]["transformers"]


TOKENS = ["<s>", "</s>", *(f"other {i}" for i in range(257))]


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ({"general__architecture": "qwen2"}, "is of the architecture 'qwen2', the base of 'llama'"),
        (
            {"llama__attention__head_count": 8},
            "not of the base's shape: its 'llama.attention.head_count' is 8, the base's 4",
        ),
        (
            {"tokenizer__ggml__tokens": TOKENS},
            "has another tokenizer than the base: 257 of 259 tokens are not the base's",
        ),
    ],
)
def test_an_entry_of_another_model_is_refused(entries: dict[str, Any], why: str, files: Path, tmp_path: Path) -> None:
    assert why in refusal(files, rewrite(files / "X-Q8_0.gguf", tmp_path / "X.gguf", **entries), tmp_path)


def test_another_count_of_experts_is_refused(tmp_path: Path) -> None:
    convert(write_model(tmp_path / "base", "mixtral"), tmp_path / "F32.gguf")
    theirs = rewrite(tmp_path / "F32.gguf", tmp_path / "X.gguf", llama__expert_count=3)
    said = refusal(tmp_path, theirs, tmp_path)
    assert "not of the base's shape: its 'llama.expert_count' is 3, the base's 4" in said


def drop(reader: Any, name: str) -> None:
    reader.tensors = [each for each in reader.tensors if each.name != name]


def test_tensors_of_another_model_are_refused(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = gguf.GGUFReader

    def written(change: Callable[[Any], None]) -> Path:
        def changed(path: Path) -> Any:
            reader = original(path)
            change(reader)
            return reader

        with monkeypatch.context() as patch:
            patch.setattr(gguf, "GGUFReader", changed)
            return rewrite(files / "X-Q8_0.gguf", tmp_path / "X.gguf")

    def halve(name: str) -> Callable[[Any], None]:
        def change(reader: Any) -> None:
            place = next(i for i, each in enumerate(reader.tensors) if each.name == name)
            each = reader.tensors[place]
            reader.tensors[place] = each._replace(data=each.data[: len(each.data) // 2])

        return change

    said = refusal(files, written(halve("token_embd.weight")), tmp_path)
    assert "has a vocabulary of 129 tokens, the base of 259. Give one that was made of this base" in said
    said = refusal(files, written(halve("blk.0.ffn_up.weight")), tmp_path)
    assert "not of the base's shape: blk.0.ffn_up.weight is 48 x 64, in the base 96 x 64" in said
    said = refusal(files, written(lambda reader: drop(reader, "blk.0.attn_k.weight")), tmp_path)
    assert "lacks 1 of the base's tensors (blk.0.attn_k.weight)" in said


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"llama__rope__freq_base": 5e5}, "its 'llama.rope.freq_base' is 500000.0, the base's 20000.0"),
        ({"tokenizer__ggml__eos_token_id": 0}, "its 'tokenizer.ggml.eos_token_id' is 0, the base's 1"),
    ],
)
def test_what_a_reader_should_know_is_a_warning(
    entries: dict[str, Any], told: str, files: Path, tmp_path: Path
) -> None:
    made = found(files, rewrite(files / "X-Q8_0.gguf", tmp_path / "X.gguf", **entries), tmp_path / "..")
    assert made["warnings"][1:] == [told]


def test_a_few_tokens_and_the_template(files: Path, tmp_path: Path) -> None:
    tokens = gguf.GGUFReader(files / "X-Q8_0.gguf").fields["tokenizer.ggml.tokens"].contents()
    theirs = rewrite(files / "X-Q8_0.gguf", tmp_path / "X.gguf", tokenizer__ggml__tokens=[*tokens[:-1], "ba"])
    assert found(files, theirs, tmp_path)["warnings"][1:] == [
        "1 of 259 tokens are not the base's (id 258: 'ab' in the base, 'ba' here)"
    ]


def test_files_that_are_not_whole_are_refused(files: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes((files / "X-Q8_0.gguf").read_bytes()[:-9000])
    assert "is truncated or damaged" in refusal(files, cut, tmp_path)
    cut.write_bytes(b"PK\3\4" + bytes(100))
    assert "is not a GGUF file" in refusal(files, cut, tmp_path)
    assert "is no file. Fetch it, or mend the path" in refusal(files, tmp_path / "gone.gguf", tmp_path)

    first = split(files / "X-Q8_0.gguf", tmp_path / "parts", 4)
    second = first.with_name("X-Q8_0-00002-of-00003.gguf")
    whole = second.read_bytes()
    second.write_bytes(whole[:-2000])
    assert "00002-of-00003.gguf is truncated" in refusal(files, first, tmp_path)
    second.write_bytes(first.read_bytes())
    assert "is part 1 of 3 by its header, not by its name" in refusal(files, first, tmp_path)
    second.unlink()
    assert "1 of its 3 parts are missing (X-Q8_0-00002-of-00003.gguf)" in refusal(files, first, tmp_path)
    renamed = tmp_path / "renamed.gguf"
    first.rename(renamed)
    assert "is part 1 of 3 by its header" in refusal(files, renamed, tmp_path)


def variants(*entries: Any) -> list[str]:
    recipe = parse({"base": {"path": "base"}, "variants": list(entries)}, Path("r.yaml"))
    return [variant.name for variant in recipe.variants[1:]]


def test_names_and_lists_in_a_recipe() -> None:
    listed = {"hub": "someone/X-GGUF", "file": ["X-Q4_K_M.gguf", "sub/X-Q2_K-00001-of-00002.gguf"]}
    assert variants({"file": listed}) == ["someone-X-Q4_K_M", "someone-X-Q2_K"]
    assert variants({"file": "dir/X-Q4_K_M.gguf"}, {"file": {"path": "Y.gguf"}, "name": "theirs"}) == [
        "X-Q4_K_M",
        "theirs",
    ]


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (
            {"file": {"hub": "a/b", "path": "X.gguf"}},
            r"variants\[0\]: file: give exactly one of hub, path \(found both\)",
        ),
        ({"file": {}}, r"exactly one of hub, path \(found none\)"),
        ({"file": {"hub": "a/b"}}, "`hub` and `file` go together"),
        ({"file": {"path": "X.gguf", "revision": "v1"}}, "a revision is a hub repository's"),
        ({"file": {"hub": "a b", "file": "X.gguf"}}, "'a b' is not a repository's name; write `owner/name`"),
        ({"file": "X.safetensors"}, "X.safetensors is no .gguf file; a folder of AWQ or GPTQ is a `checkpoint`"),
        ({"file": "X-00002-of-00003.gguf"}, "is part 2 of 3: name the first"),
        ({"file": {"hub": "a/b", "file": "../X.gguf"}}, "is no name of a file in a repository"),
        ({"file": ["a/X.gguf", "b/X.gguf"]}, r"variants\[0\]: a variant named 'X' is already there; give one a `name`"),
        ({"file": ["X.gguf", "Y.gguf"], "name": "Z"}, r"variants\[0\].name: a list makes several variants"),
    ],
)
def test_what_can_be_no_file_is_refused_with_the_recipe(entry: Any, why: str) -> None:
    with pytest.raises(UserError, match=why):
        variants(entry)


# --- the hub ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def someone(files: Path) -> Iterator[tuple[str, list[str]]]:
    with hub({"someone/X-GGUF": files}) as served:
        yield served


def asked(function: str, payload: Any, endpoint: str, tmp_path: Path, offline: bool = False) -> isolate.Reply:
    """In an interpreter of its own: the hub's client reads its address once."""
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": str(int(offline))}
    environment["HF_HUB_DISABLE_XET"] = "1"
    return isolate.call(
        f"workbench.worker.methods.file:{function}", payload, workdir=tmp_path / "work", environment=environment
    )


def from_hub(name: str, **options: str) -> dict[str, str]:
    return {"hub": name, "file": "X-Q8_0.gguf", "revision": "", "path": "", **options}


def test_a_file_from_the_hub_is_pinned_to_its_commit(
    files: Path, someone: tuple[str, list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "Tiny-X-Q8_0.gguf"
    payload = {"base": "", "out": str(out), "source": str(files / "F32.gguf"), "options": from_hub("someone/X-GGUF")}
    reply = asked("adopt", payload, someone[0], tmp_path)
    assert reply.error is None, reply.log
    assert reply.value["provenance"]["found"]["revision"] == SHA
    assert f"someone/X-GGUF at {SHA[:12]}, X-Q8_0.gguf" in reply.value["warnings"][0]
    cached = tmp_path / "hf" / "hub" / "models--someone--X-GGUF" / "snapshots" / SHA / "X-Q8_0.gguf"
    assert os.readlink(out) == str(cached) and out.read_bytes() == (files / "X-Q8_0.gguf").read_bytes()
    again = asked("adopt", payload, "http://127.0.0.1:9", tmp_path, offline=True)
    assert again.value == reply.value, "from the hub's cache"


def test_a_split_file_from_the_hub_comes_with_all_its_parts(files: Path, tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    split(files / "X-Q8_0.gguf", tmp_path / "served" / "Q8_0", 4)
    options = from_hub("someone/X-GGUF", file="Q8_0/X-Q8_0-00001-of-00003.gguf")
    shape = to_json(shape_of(files / "F32.gguf"))
    out = tmp_path / "Tiny-X-Q8_0-00001-of-00003.gguf"
    payload = {"base": "", "out": str(out), "source": str(files / "F32.gguf"), "options": options}
    with hub({"someone/X-GGUF": tmp_path / "served"}) as (endpoint, requests):
        planned = asked("headers", {"options": options, "shape": shape}, endpoint, tmp_path)
        made = asked("adopt", payload, endpoint, tmp_path)
    assert planned.error is None and made.error is None, planned.log + made.log
    assert planned.value["gguf"]["disk_bytes"] == made.value["disk_bytes"]
    assert planned.value["gguf"]["limits"].keys() == {"transformers", "vllm"}
    links = [os.readlink(link) for link in sorted(tmp_path.glob("Tiny-*.gguf"))]
    assert [Path(link).parent.parent.name for link in links] == [SHA] * 3
    assert sum("GET Q8_0/X-Q8_0-00003" in line for line in requests) == 2


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (from_hub("owner/gated"), "is gated: accept its license"),
        (from_hub("owner/absent"), "does not exist, or is private"),
        (from_hub("someone/X-GGUF", file="X-Q8_O.gguf"), "holds no 'X-Q8_O.gguf'. Did you mean 'X-Q8_0.gguf'?"),
    ],
)
def test_a_repository_that_does_not_give_it(
    options: dict[str, str], why: str, files: Path, someone: tuple[str, list[str]], tmp_path: Path
) -> None:
    payload = {"base": "", "out": str(tmp_path / "X.gguf"), "source": str(files / "F32.gguf"), "options": options}
    reply = asked("adopt", payload, someone[0], tmp_path)
    assert reply.user_error and why in (reply.error or ""), reply.error
    planned = asked(
        "headers", {"options": options, "shape": to_json(shape_of(files / "F32.gguf"))}, someone[0], tmp_path
    )
    assert why in planned.value["gguf"]["refused"]


def test_a_plan_reads_the_header_alone(files: Path, tmp_path: Path) -> None:
    """The first megabyte is more than this file: asked for in small pieces, it is not read to its end."""
    program = (
        "import json, sys\nfrom workbench.worker.base import hub\nfrom workbench.worker.methods import file\n"
        "hub.FRONT_BYTES = 1024\nprint(json.dumps(file.headers(json.loads(sys.argv[1]), print)))"
    )
    payload = {"options": from_hub("someone/X-GGUF"), "shape": to_json(shape_of(files / "F32.gguf"))}
    with hub({"someone/X-GGUF": files}) as (endpoint, requests):
        own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", program, json.dumps(payload)], env=os.environ | own, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)["gguf"]
    tensors = gguf.GGUFReader(files / "X-Q8_0.gguf").tensors
    assert read["types"] == {each.name: each.tensor_type.name for each in tensors}
    assert read["disk_bytes"] == sum(int(each.n_bytes) for each in tensors)
    pieces = [line.split()[2] for line in requests if line.startswith("GET")]
    assert pieces[:2] == ["0-1023", "1024-4095"]
    assert int(pieces[-1].split("-")[1]) < (files / "X-Q8_0.gguf").stat().st_size / 2


def test_a_plan_refuses_what_is_not_of_the_bases_shape(files: Path) -> None:
    options = {"hub": "", "file": "", "revision": "", "path": str(files / "X-Q8_0.gguf")}
    shape = shape_of(files / "F32.gguf", vocab_size=300)
    refused = headers({"options": options, "shape": to_json(shape)}, silent)["gguf"]["refused"]  # type: ignore[index]
    assert refused == "X-Q8_0.gguf has a vocabulary of 259 tokens, the base of 300. Give one that was made of this base"


# --- in the cache -------------------------------------------------------------------------------


def test_a_file_that_changed_under_its_artifact_is_noticed(bench: Bench) -> None:
    mine = bench.folder / "mine.gguf"
    own = next(bench.home.glob("artifacts/*/*Q8_0.gguf"))
    mine.write_bytes(own.read_bytes())
    recipe = bench.recipe(variants=[{"file": "mine.gguf"}])
    answer = bench("quantize", recipe)
    assert answer.returncode == 0, answer.stderr
    line = next(line for line in answer.stdout.splitlines() if line.startswith("mine "))
    artifact = Path(line.split()[-1])
    assert artifact.is_symlink() and artifact.samefile(mine)
    status = mine.stat()
    content = bytearray(mine.read_bytes())
    content[-4096:] = bytes(4096)
    mine.write_bytes(content)
    os.utime(mine, ns=(status.st_atime_ns, status.st_mtime_ns))
    answer = bench("quantize", recipe)
    assert answer.returncode == 1 and "mine.gguf is not what it was when it was made" in answer.stderr
    os.utime(mine)
    assert bench("quantize", recipe).returncode == 0, "it is another artifact now, and meant"
    mine.unlink()
    answer = bench("quantize", recipe)
    assert answer.returncode == 1 and "mine.gguf does not exist" in answer.stderr
