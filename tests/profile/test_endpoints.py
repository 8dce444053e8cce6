"""Endpoints of a recipe, and a server beside a recipe: rows next to those of engines, with quality where it is told."""

from __future__ import annotations

import importlib.util
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from tests.bench import Bench
from tests.serving.fake_server import fake_server
from tests.serving.real_servers import llama_cpp_server, llama_server, vllm_serve
from tests.worker.small_models import write_model, write_sentencepiece
from workbench.errors import UserError
from workbench.recipe.load import Recipe, parse
from workbench.report import store

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 20
SCORED: dict[str, Any] = {"evaluation": {"source": {"text": TEXT}, "window": 64, "windows": 4}}
LOAD = {"prompt_tokens": 40, "new_tokens": 8, "batch": [1, 3], "requests": 4, "repeats": 3}


def recipe_of(endpoints: object) -> Recipe:
    variants = [{"gguf": "Q8_0"}]
    return parse({"base": {"path": "m"}, "variants": variants, "endpoints": endpoints}, Path("r.yaml"))


def test_a_recipe_names_servers() -> None:
    told = {"mine": {"url": "127.0.0.1:8000", "variant": "gguf-Q8_0", "price": {"input": 0.1, "output": 1}}}
    found = recipe_of(told).endpoints["mine"]
    assert (found.variant, found.price and found.price.output, found.model) == ("gguf-Q8_0", 1.0, None)
    assert recipe_of(None).digest == recipe_of({}).digest != recipe_of(told).digest


@pytest.mark.parametrize(
    ("endpoints", "words"),
    [
        (["mine"], "endpoints: a mapping from a name"),
        ({"mine": {}}, "endpoints.mine.url: missing"),
        ({"mine": {"url": "ftp://x"}}, "endpoints.mine.url: ftp://x: no address of a server"),
        ({"mine": {"url": "http://me:secret@x/v1"}}, "endpoints.mine.url: http://x with a user"),
        ({"mine": {"url": "x", "variant": "gguf-Q8"}}, "endpoints.mine.variant.*gguf-Q8_0"),
        ({"mine": {"url": "x", "modell": "y"}}, "endpoints.mine: unknown key 'modell'. Did you mean 'model'"),
        ({"mine": {"url": "x", "api_key_env": "sk-12-34"}}, "endpoints.mine.api_key_env"),
        ({"mine": {"url": "x", "price": {"input": -1, "output": 1}}}, "endpoints.mine.price.input"),
        ({"base": {"url": "x"}}, "'base' is a variant's name"),
        ({"a b": {"url": "x"}}, "endpoints"),
    ],
)
def test_endpoints_that_cannot_be(endpoints: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        recipe_of(endpoints)


def lines(bench: Bench) -> dict[tuple[str, str], Any]:
    found = json.loads(bench("table", "--format", "json").stdout)
    return {(line["variant"], line["backend"]): line for line in found}


def test_a_servers_row_stands_beside_those_of_engines(bench: Bench) -> None:
    with fake_server() as fake:
        endpoints = {
            "its-file": {"url": fake.url, "variant": "gguf-Q8_0"},
            "paid": {"url": fake.url, "price": {"input": 0.5, "output": 2.0}},
        }
        recipe = bench.recipe(endpoints=endpoints, workload=LOAD)
        done = bench("run", recipe)
        assert done.returncode == 0, done.stderr
        asked = len(fake.asked)
        assert bench("run", recipe).returncode == 0
        assert len(fake.asked) == asked, "what was measured is not measured again"
    found = lines(bench)
    assert {("gguf-Q8_0", "endpoint"), ("gguf-Q8_0", "fake"), ("paid", "endpoint")} <= found.keys()
    ours, theirs = found["gguf-Q8_0", "fake"], found["gguf-Q8_0", "endpoint"]
    assert theirs["disk_bytes"] == ours["disk_bytes"] and theirs["decode_tok_s"] > 0
    assert "served b3" in theirs["points"]
    chosen = bench("recommend", str(bench.results), "--min-served", "1", "--backend", "endpoint")
    assert chosen.returncode == 0 and f"It is served at {fake.url}" in chosen.stdout, chosen.stdout
    page = bench.folder / "page.html"
    assert bench("report", "-o", str(page)).returncode == 0 and ">paid<" in page.read_text()
    prices = bench.folder / "prices.yaml"
    prices.write_text("traffic: {requests_a_day: 1000}\nmachines: {nobody: 1}\n")
    assert f"paid at {fake.url}" in bench("cost", str(prices)).stdout


@pytest.mark.slow
def test_a_server_that_is_not_there_is_a_row_with_its_reason(bench: Bench) -> None:
    with fake_server() as fake:
        pass
    endpoints = {
        "gone": {"url": fake.url},
        "far": {"url": "http://192.0.2.1:9/v1"},
        "keyed": {"url": fake.url, "api_key_env": "NONE_SUCH"},
    }
    done = bench("run", bench.recipe(endpoints=endpoints, **SCORED))
    assert done.returncode == 1
    errors = {row["artifact"]["variant"]: row["error"] for row in bench.rows() if row["backend"] == "endpoint"}
    assert "nobody listens there" in errors["gone"] and "NONE_SUCH" in errors["keyed"]
    assert "the recipe's own texts (evaluation)" in errors["far"] and "--yes-remote" in errors["far"]
    assert bench.measured().count("gguf-Q8_0") == 1, "the engines' rows are there all the same"


def test_what_of_a_recipe_a_server_is_measured_with(bench: Bench) -> None:
    with fake_server() as fake:
        words = ("--endpoint", fake.url, "--prompt-tokens", "40", "--new-tokens", "8", "--requests", "10")
        several = bench("profile", bench.recipe(), *words, "--variant", "base", "--variant", "gguf-Q8_0")
        assert several.returncode == 2 and "name by --variant only which one" in several.stderr
        assert bench("profile", *words, "--variant", "base").returncode == 2
        unknown = bench("profile", bench.recipe(), *words, "--variant", "gguf-Q8")
        assert unknown.returncode == 2 and "gguf-Q8_0" in unknown.stderr


# --- real ones -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
def test_a_llama_server_of_somebody_elses_is_as_good_as_its_file(bench: Bench, tmp_path: Path) -> None:
    task = bench.folder / "own.yaml"
    task.write_text('- {prompt: "The quick brown fox", choices: [jumps, sits, "does not mind"], answer: jumps}\n')
    parts: dict[str, Any] = {
        **SCORED,
        "workload": LOAD,
        "backends": {"llamacpp": {}},
        "tasks": {"own": {"file": str(task)}},
    }
    assert bench("run", bench.recipe(**parts)).returncode == 0
    (row,) = [row for row in store.read(bench.results)[0] if row.artifact.variant == "gguf-Q8_0"]
    file = Path(row.artifact.path.replace("$WORKBENCH_HOME", str(bench.home)))
    with llama_server(file, tmp_path, "small") as url:
        endpoints = {"mine": {"url": url, "variant": "gguf-Q8_0"}}
        done = bench("run", bench.recipe(**parts, endpoints=endpoints))
    assert done.returncode == 0, done.stderr + done.stdout
    found = lines(bench)
    here, there = found["gguf-Q8_0", "llamacpp"], found["gguf-Q8_0", "endpoint"]
    assert there["perplexity"] == pytest.approx(here["perplexity"], rel=1e-3)
    assert there["kld_mean"] == pytest.approx(here["kld_mean"], rel=0.02, abs=5e-6)
    rows = {row.backend: row for row in store.read(bench.results)[0] if row.artifact.variant == "gguf-Q8_0"}
    given = [row.measurement.tasks["own"]["given"] for row in rows.values() if row.measurement]
    assert len(given) == 2 and given[0] == given[1]


@pytest.mark.slow
def test_a_llama_cpp_server_of_somebody_elses_is_scored_by_texts(bench: Bench, tmp_path: Path) -> None:
    """Of windows that begin with a word; such texts are the same tokens to it. Others say why not."""
    pytest.importorskip("starlette_context")
    import sentencepiece

    base = write_sentencepiece(write_model(tmp_path / "base", "llama", head_dim=32))
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}')
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    words = [pieces.id_to_piece(i)[1:] for i in range(pieces.vocab_size()) if pieces.id_to_piece(i)[0] == "\u2581"]
    chance = random.Random(1)
    texts = {"words": " ".join(chance.choices([word for word in words if word], k=400)), "cut": TEXT}
    wanted = {name: {"source": {"text": text}, "window": 64, "windows": 4} for name, text in texts.items()}
    parts: dict[str, Any] = {"base": {"path": str(base)}, "evaluation": wanted, "workload": LOAD}
    parts |= {"backends": {"llamacpp": {"variants": ["base"]}}}
    assert bench("run", bench.recipe(**parts)).returncode == 0
    (row,) = [row for row in store.read(bench.results)[0] if row.artifact.variant == "base"]
    file = Path(row.artifact.path.replace("$WORKBENCH_HOME", str(bench.home)))
    with llama_cpp_server(file, tmp_path, "small") as url:
        done = bench("run", bench.recipe(**parts, endpoints={"mine": {"url": url, "variant": "base"}}))
    assert done.returncode == 0, done.stderr + done.stdout
    rows = {row.backend: row.measurement for row in store.read(bench.results)[0] if row.artifact.variant == "base"}
    here, there = rows["llamacpp"], rows["endpoint"]
    assert here and there and there.settings["quality by"] == "echo of text"
    sets = [each.qualities["words"]["windows"] for each in (here, there)]
    nats = [sum(each["nll_sum"] for each in windows) / sum(each["count"] for each in windows) for windows in sets]
    assert math.exp(nats[1] - nats[0]) == pytest.approx(1, abs=1e-3)
    told = " ".join(there.warnings)
    assert (
        "cut" not in there.qualities and "no quality: the server takes text alone, and reads that of a window" in told
    )
    assert "no divergence: the server tells the log-probabilities of a prompt's own tokens alone" in told


@pytest.mark.slow
def test_a_llama_cpp_server_breaks_answers_off(bench: Bench, talking_file: Path, tmp_path: Path) -> None:
    """As it is started by itself: each request ends the answer before it, and the row says what to do."""
    pytest.importorskip("starlette_context")
    with llama_cpp_server(talking_file, tmp_path, "small", interrupts=True) as url:
        words = ("--prompt-tokens", "40", "--new-tokens", "60", "--requests", "20", "--concurrency", "3")
        assert bench("profile", "--endpoint", url, *words).returncode == 0
    (row,), _ = store.read(bench.results)
    assert row.measurement and "--interrupt_requests false" in " ".join(row.measurement.warnings)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_vllm_of_somebody_elses(bench: Bench, tmp_path: Path) -> None:
    base = write_sentencepiece(write_model(tmp_path / "base", "llama", head_dim=32))
    parts: dict[str, Any] = {
        "base": {"path": str(base)},
        "model": "Small",
        "backends": {"transformers": {"variants": ["base"]}},
    }
    # The server's own template is here the base's: a chat has the same answers in both.
    (base / "chat_template.jinja").write_text("{{ bos_token }}Q: {{ messages[0].content }} A:")
    chat = bench.folder / "chat.yaml"
    # Of other prompts this model says halves of characters, which the server keeps to itself.
    chat.write_text('- {prompt: "ak ka kaa", contains: a, new_tokens: 6}\n')
    parts["tasks"] = {"chat": {"file": str(chat), "chat": True}}
    with vllm_serve(base, tmp_path, "small") as url:
        endpoints = {"mine": {"url": url, "variant": "base"}}
        done = bench("run", bench.recipe(**parts, **SCORED, workload=LOAD, endpoints=endpoints))
    assert done.returncode == 0, done.stderr + done.stdout
    found = lines(bench)
    here, there = found["base", "transformers"], found["base", "endpoint"]
    assert there["perplexity"] == pytest.approx(here["perplexity"], rel=1e-3)
    assert there["kld_mean"] == pytest.approx(0, abs=1e-5)
    rows = [row for row in store.read(bench.results)[0] if row.measurement]
    given = [row.measurement.tasks["chat"]["given"] for row in rows if row.measurement]
    assert len(given) == 2 and given[0] == given[1] and all(given[0])
