"""Files that others made, from recipe to table: each is measured as its own reader says that it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench import Bench
from tests.cases.models import MEASURED, llama, rows_of, write_random
from tests.worker import others
from tests.worker.small_models import dequantized, write_tokens
from tests.worker.unpacking import load_base
from tests.worker.written import read_compressed, write_compressed
from workbench.machine import isolate

pytestmark = pytest.mark.slow
WIDE = {"hidden_size": 256, "intermediate_size": 512}
DRAWN = 0.03
"""Of a divergence: random models' distributions are flat, and of their tails the reference keeps what it drew."""
ROUNDED = 0.1
"""Of a divergence: what engines round activations to costs these models a few hundredths of what four bits do."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A base, and what others made of it, measured once beside ours."""
    folder = tmp_path_factory.mktemp("found")
    base = write_random(folder / "base", llama(**WIDE))
    source = others.convert(base, folder / "F32.gguf")
    plain = others.quantize(source, folder / "X-Q4_K_M.gguf", "Q4_K_M")
    others.quantize(source, folder / "Y-Q4_K_M.gguf", "Q4_K_M", importance(plain))
    others.split(plain, folder / "parts", 5)
    others.pack_as_autoawq(base, folder / "X-AWQ")
    pack_by_gptqmodel(base, folder / "X-GPTQ")
    write_compressed(base, folder / "X-W4A16", "W4A16", 64)
    case = Bench(folder / "home", folder, base)
    variants = [
        {"gguf": "Q4_K_M"},
        {"file": ["X-Q4_K_M.gguf", "Y-Q4_K_M.gguf"]},
        {"file": "parts/X-Q4_K_M-00001-of-00005.gguf", "name": "split"},
        {"checkpoint": ["X-AWQ", "X-GPTQ", "X-W4A16"]},
        {"gguf": {"from": "X-AWQ"}},
    ]
    backends = {
        "llamacpp": {},
        "transformers": {"variants": ["X-*", "split"]},
        "vllm": {"enforce_eager": True, "variants": ["X-*"]},
    }
    answer = case.start("run", case.recipe(**MEASURED, variants=variants, backends=backends))
    out, err = answer.communicate()
    assert answer.returncode == 0, out + err
    yield case
    assert not case.workers()


def importance(file: Path) -> dict[str, Any]:
    import gguf
    import numpy as np

    chance = np.random.default_rng(0)
    found = {each.name: int(each.shape[0]) for each in gguf.GGUFReader(file).tensors if len(each.shape) == 2}
    return {name: chance.uniform(0.01, 100, inputs).astype(np.float32) for name, inputs in found.items()}


def pack_by_gptqmodel(base: Path, out: Path) -> None:
    options = {"bits": 4, "group_size": 64, "sym": True, "desc_act": False, "damping": 0.05}
    tokens = write_tokens(out.with_suffix(".json"), [64] * 16, 768)
    payload = {"base": str(base), "tokens": str(tokens), "method": "gptq", "options": options, "out": str(out)}
    environment = {"GPTQMODEL_CPU_WORKERS": "4", "HF_HUB_OFFLINE": "1"}
    where = {"workdir": out.with_name("work"), "environment": environment}
    reply = isolate.call("workbench.worker.methods.gptqmodel:gptqmodel", payload, **where)
    assert reply.error is None, reply.log


@pytest.fixture(scope="module")
def rows(place: Bench) -> dict[tuple[str, str], dict[str, Any]]:
    return rows_of(place)


def told(place: Bench, variant: str, backend: str) -> str:
    """All warnings of a stored row, and why it cannot run."""
    row = next(row for row in place.rows() if (row["artifact"]["variant"], row["backend"]) == (variant, backend))
    return str([row["artifact"]["warnings"], row["warnings"], row["unsupported"]])


def divergence(place: Bench, logits_of: Any) -> float:
    """From the base, of the evaluation's tokens, nats; `logits_of(ids)`: what a reader says, [ids, vocabulary]."""
    import torch
    from transformers import AutoModelForCausalLM

    told = next(iter(place.rows()[0]["evaluations"].values()))
    tokens = json.loads(Path(told["path"].replace("$WORKBENCH_HOME", str(place.home))).read_text())
    base: Any = AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32)
    total, count = 0.0, 0
    with torch.inference_mode():
        for ids, first in zip(tokens["windows"], tokens["score_from"], strict=True):
            both = base(torch.tensor([ids])).logits[0], torch.as_tensor(logits_of(ids))
            p, q = (torch.log_softmax(logits[first - 1 : -1].double(), -1) for logits in both)
            total, count = total + float((p.exp() * (p - q)).sum()), count + len(p)
    return total / count


def test_a_plain_file_is_ours_to_the_last_digit(place: Bench, rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    ours, theirs = rows["gguf-Q4_K_M", "llamacpp"], rows["X-Q4_K_M", "llamacpp"]
    for key in ("kld_mean", "perplexity", "bits_per_weight"):
        assert theirs[key] == ours[key] > 0
    assert rows["split", "llamacpp"]["kld_mean"] == ours["kld_mean"], "in parts as in one piece"
    other = rows["Y-Q4_K_M", "llamacpp"]
    assert other["bits_per_weight"] == ours["bits_per_weight"] and other["kld_mean"] != ours["kld_mean"]
    assert "importance matrix others.imatrix of others.txt" in told(place, "Y-Q4_K_M", "llamacpp")
    assert "its header names no importance matrix" in told(place, "X-Q4_K_M", "llamacpp")
    assert "llama-gguf-split --merge" in told(place, "split", "transformers")


@pytest.mark.parametrize("name", ["X-Q4_K_M", "Y-Q4_K_M", "parts/X-Q4_K_M-00001-of-00005"])
def test_a_gguf_file_is_what_llama_cpp_says(
    name: str, place: Bench, rows: dict[tuple[str, str], dict[str, Any]]
) -> None:
    import gguf

    from workbench.worker.ggml.logits import logits_of

    file = place.folder / f"{name}.gguf"
    row = rows["split" if "/" in name else name, "llamacpp"]
    assert row["kld_mean"] == pytest.approx(divergence(place, lambda ids: logits_of(file, ids)), rel=ROUNDED)
    tensors = [
        each for part in sorted(file.parent.glob(f"{file.name[:8]}*.gguf")) for each in gguf.GGUFReader(part).tensors
    ]
    assert row["disk_bytes"] == sum(int(each.n_bytes) for each in tensors)
    stored = next(each for each in place.rows() if each["artifact"]["variant"] == row["variant"])["artifact"]
    assert stored["tensor_types"] == {each.name: each.tensor_type.name for each in tensors}
    assert stored["provenance"]["found"]["sha256"].keys() == {
        each.name for each in sorted(file.parent.glob(f"{file.name[:8]}*.gguf"))
    }


@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_a_gguf_file_in_engines_that_unpack_it(
    backend: str, place: Bench, rows: dict[tuple[str, str], dict[str, Any]]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    kind: Any = AutoModelForCausalLM
    model = kind.from_pretrained(str(place.folder), gguf_file="X-Q4_K_M.gguf", dtype=torch.float32).eval()
    with torch.inference_mode():
        own = divergence(place, lambda ids: model(torch.tensor([ids])).logits[0])
    assert rows["X-Q4_K_M", backend]["kld_mean"] == pytest.approx(
        own, rel=DRAWN if backend == "transformers" else ROUNDED
    )


@pytest.mark.parametrize("backend", ["transformers", "vllm", "llamacpp"])
@pytest.mark.parametrize("name", ["X-AWQ", "X-GPTQ"])
def test_a_checkpoint_is_what_its_layout_says(
    name: str, backend: str, place: Bench, rows: dict[tuple[str, str], dict[str, Any]]
) -> None:
    import torch

    model = dequantized(place.model, place.folder / name, name[2:].lower(), 4).eval()
    with torch.inference_mode():
        own = divergence(place, lambda ids: model(torch.tensor([ids])).logits[0])
    row = rows[name, backend]
    assert row["kld_mean"] == pytest.approx(own, rel=ROUNDED)
    if backend == "transformers":
        assert row["format"] == name[2:].lower()
        assert ("gptqmodel:" if name == "X-GPTQ" else "a packer that it") in told(place, name, backend)


@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_compressed_tensors_are_what_their_library_unpacks(
    backend: str, place: Bench, rows: dict[tuple[str, str], dict[str, Any]]
) -> None:
    import torch

    model = load_base(place.model)
    missing, extra = model.load_state_dict(read_compressed(place.folder / "X-W4A16"), strict=False)
    assert not extra and not any("_proj" in name for name in missing)
    with torch.inference_mode():
        own = divergence(place, lambda ids: model(torch.tensor([ids])).logits[0])
    assert rows["X-W4A16", backend]["kld_mean"] == pytest.approx(own, rel=ROUNDED)


def test_a_checkpoint_is_carried_as_ours_are(place: Bench, rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    carried = rows["gguf-X-AWQ", "llamacpp"]
    assert carried["kld_mean"] == rows["X-AWQ", "llamacpp"]["kld_mean"] and "made by others" in told(
        place, "gguf-X-AWQ", "llamacpp"
    )
    planned = json.loads(place("plan", str(place.folder / "r.yaml"), "--format", "json").stdout)
    needs = {(need["variant"], need["backend"]): need["disk_bytes"] for need in planned}
    made = {pair: row["disk_bytes"] for pair, row in rows.items() if pair[0] in ("X-AWQ", "X-GPTQ", "Y-Q4_K_M")}
    assert {pair: needs[pair] for pair in made} == pytest.approx(made, rel=0.01)


def test_what_is_published_names_whose_it_is(place: Bench) -> None:
    answer = place("push", "X-AWQ", "me/mine", "--license", "mit")
    assert answer.returncode == 2 and "was made by others" in answer.stderr
