"""Perplexity and divergence of GGUF types by this program, against `llama-perplexity` on the same tokens.

Prints, for each type, both programs' perplexity, mean divergence and agreement, how far they are apart, and the size
of what each keeps of the base. Run from the repository root:

    python -P benchmarks/perplexity_vs_llama.py BASE OUT --llama-bin DIR [--text FILE] [--windows 10]

BASE is a Hugging Face directory. The text defaults to the documentation that Python carries (`pydoc_data.topics`).
Both programs start from the same GGUF files and each takes its own record of the base's distributions from llama.cpp
and the unquantized file, so that what is compared is the arithmetic of scoring and nothing else: llama.cpp keeps 16
bits a logit, all within 16 of the largest, this program the likeliest ids, a tail and a draw from it
(`worker/scoring/reducer.py`). llama-perplexity cuts its text into tokens itself; the comparison stops if they are
not the ones that this program made of it.

Where `llama-perplexity` is not installed: `--build DIR` builds it from llama-cpp-python's own source package, which
holds all of llama.cpp (six minutes on two cores):

    pip download --no-deps --no-binary :all: llama-cpp-python && tar xf llama_cpp_python-*.tar.gz
    cmake -S llama_cpp_python-*/vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF
    cmake --build build --target llama-perplexity -j
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

from quantize_vs_gptqmodel import call  # noqa: E402

from workbench.records import Artifact, Evaluation, Job, Workload, from_json, to_json  # noqa: E402
from workbench.report import estimates as statistics  # noqa: E402

PROGRAM = "llama-perplexity"
PERPLEXITY_LIMIT, DIVERGENCE_LIMIT = 0.001, 0.02
SIZE_LIMIT = 1 / 40
GGUF_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def built(folder: Path) -> Path:
    """The program, built in `folder` from the source package of the installed llama-cpp-python."""
    folder.mkdir(parents=True, exist_ok=True)
    version = importlib.metadata.version("llama-cpp-python")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", str(folder)]
    subprocess.run([*command, f"llama-cpp-python=={version}"], check=True)
    with tarfile.open(next(folder.glob("llama_cpp_python-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    source = next(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))
    build = folder / "build"
    subprocess.run(
        ["cmake", "-S", str(source), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF"], check=True
    )
    threads = str(len(os.sched_getaffinity(0)))
    subprocess.run(["cmake", "--build", str(build), "--target", PROGRAM, "-j", threads], check=True)
    return build / "bin" / PROGRAM


def found(llama_bin: Path | None, build: Path | None) -> Path:
    """The program: where the options say, or on the path."""
    if build:
        return built(build.resolve())
    if llama_bin:
        names = [llama_bin / PROGRAM, llama_bin] if llama_bin.is_dir() else [llama_bin]
        there = next((path for path in names if path.is_file()), None)
        if there is None:
            sys.exit(f"{llama_bin} has no {PROGRAM}; build it with --build DIR")
        return there.resolve()
    on_path = shutil.which(PROGRAM)
    if on_path is None:
        sys.exit(f"{PROGRAM} is not on the path: name its folder with --llama-bin DIR, or build it with --build DIR")
    return Path(on_path)


def theirs(program: Path, model: Path, window: int, *more: str) -> str:
    """What `llama-perplexity` prints for a model."""
    threads = str(len(os.sched_getaffinity(0)))
    command = [str(program), "-m", str(model), "-c", str(window), "-b", str(window), "-t", threads, *more]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout + done.stderr


def number(pattern: str, text: str) -> float:
    match = re.search(pattern + r"\s*(-?\d+\.\d+)", text)
    if match is None:
        sys.exit(f"no '{pattern}' in what {PROGRAM} printed:\n{text[-2000:]}")
    return float(match[1])


def tokens_in(logits: Path) -> tuple[int, list[int]]:
    """The vocabulary and the tokens that `--save-all-logits` wrote in front of the logits.

    The file: "_logits_", window, vocabulary and chunks as 32-bit integers, the tokens likewise, then the logits.
    """
    with open(logits, "rb") as file:
        magic, window, vocabulary, chunks = struct.unpack("<8s3i", file.read(20))
        if magic != b"_logits_":
            sys.exit(f"{logits} is not a logits file of {PROGRAM}")
        return vocabulary, list(struct.unpack(f"<{window * chunks}i", file.read(4 * window * chunks)))


def same_tokens(evaluation: Path, theirs_ids: list[int]) -> int:
    """How many ids both programs made of the text, but for the first of each window, which BOS may replace."""
    content = json.loads(evaluation.read_text(encoding="utf-8"))
    window = len(content["windows"][0])
    ours = [token for ids in content["windows"] for token in ids]
    if len(ours) != len(theirs_ids):
        sys.exit(f"this program made {len(ours)} tokens of the text, {PROGRAM} {len(theirs_ids)}")
    other = [i for i, (a, b) in enumerate(zip(ours, theirs_ids, strict=True)) if a != b and i % window]
    if other or (content["bos"] is None and ours != theirs_ids):
        sys.exit(f"{len(other)} of {len(ours)} tokens differ, the first at {other[:1] or 0}: not comparable")
    return len(ours)


def job(model: Path, variant: str, made: dict[str, Any], reference: Path | None = None) -> dict[str, Any]:
    """A job for this program's llama.cpp backend that only scores."""
    artifact = Artifact(variant, "base" if variant == "base" else "gguf", "gguf", str(model), variant, 0, 0)
    return dict(
        to_json(
            Job(
                base="base",
                artifact=artifact,
                backend="llamacpp",
                options={},
                workload=Workload(repeats=0),
                evaluations={"evaluation": from_json(Evaluation, made)},
                references={"evaluation": str(reference)} if reference else {},
                base_digest="benchmark",
            )
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path, help="a folder for what is made")
    parser.add_argument("--text", type=Path, help="a text file; default: pydoc_data.topics")
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q4_K_M", "Q2_K"])
    parser.add_argument("--llama-bin", type=Path, help=f"the folder of {PROGRAM}, or the program")
    parser.add_argument("--build", type=Path, help=f"build {PROGRAM} in this folder first")
    arguments = parser.parse_args()
    program = found(arguments.llama_bin, arguments.build)
    base, out, window = arguments.base.resolve(), arguments.out.resolve(), arguments.window
    out.mkdir(parents=True, exist_ok=True)
    work = out / "work"

    from workbench.worker.tokens.text import read_text, source_of

    source = {"file": str(arguments.text.resolve())} if arguments.text else {"module": "pydoc_data.topics"}
    text = out / "evaluation.txt"
    text.write_text(read_text(source_of(source)), encoding="utf-8")
    entry = {
        "role": "evaluation",
        "name": "evaluation",
        "source": {"file": str(text)},
        "window": window,
        "windows": arguments.windows,
        "score": "second-half",
        "out": str(out / "evaluation.json"),
    }
    answer, _ = call("workbench.worker.tokens.windows:build", {"base": str(base), "sets": [entry]}, work)
    made = answer["sets"][0]

    dtype = json.loads((base / "config.json").read_text(encoding="utf-8")).get("dtype") or "bfloat16"
    files = {"base": out / f"base-{GGUF_TYPES[dtype]}.gguf"}
    if not files["base"].exists():
        payload = {"base": str(base), "out": str(files["base"]), "dtype": dtype, "name": "base"}
        call("workbench.worker.methods.gguf:convert", payload, work)
    for kind in arguments.types:
        files[kind] = out / f"{kind}.gguf"
        if not files[kind].exists():
            payload = {"source": str(files["base"]), "out": str(files[kind]), "type": kind, "imatrix": None}
            call("workbench.worker.methods.gguf:quantize", payload | {"threads": None}, work)

    reference, logits = out / "reference.safetensors", out / "logits.bin"
    call("workbench.worker.measure.job:refer", {"job": job(files["base"], "base", made), "out": str(reference)}, work)
    told = theirs(
        program,
        files["base"],
        window,
        "-f",
        str(text),
        "--chunks",
        str(arguments.windows),
        "--kl-divergence-base",
        str(logits),
    )
    vocabulary, ids = tokens_in(logits)
    print(f"{same_tokens(out / 'evaluation.json', ids)} tokens, the same in both; vocabulary {vocabulary}")
    good = True

    def measured(kind: str) -> dict[str, Any]:
        found, _ = call("workbench.worker.measure.job:measure", job(files[kind], kind, made, reference), work)
        quality = found["qualities"]["evaluation"]
        means = {
            "perplexity": statistics.perplexity(quality),
            "kld_mean": statistics.divergence(quality),
            "top1_agreement": statistics.agreement(quality),
            "rms_dp": statistics.rms_dp(quality),
        }
        quantiles = {"kld_p50": 0.5, "kld_p99": 0.99, "kld_max": 1.0}
        return {name: mean.value for name, mean in means.items() if mean} | {
            name: statistics.divergence_quantile(quality, p) for name, p in quantiles.items()
        }

    def line(name: str, own: float, other: float, limit: float | None, digits: int = 5) -> bool:
        apart = own / other - 1
        goal = "" if limit is None else f" (goal {100 * limit:g} %)"
        verdict = limit is None or abs(apart) <= limit
        print(
            f"  {name:12} ours {own:.{digits}f}  theirs {other:.{digits}f}  {100 * apart:+.3f} %{goal}"
            f"{'' if verdict else '  MISSED'}",
            flush=True,
        )
        return verdict

    own = measured("base")
    print(f"\nbase: divergence from its own record {own['kld_mean']:.1e}")
    good &= line("perplexity", own["perplexity"], number("Final estimate: PPL =", told), PERPLEXITY_LIMIT, 4)
    for kind in arguments.types:
        own = measured(kind)
        plain = theirs(program, files[kind], window, "-f", str(text), "--chunks", str(arguments.windows))
        told = theirs(program, files[kind], window, "--kl-divergence", "--kl-divergence-base", str(logits))
        print(f"\n{kind}")
        good &= line("perplexity", own["perplexity"], number("Final estimate: PPL =", plain), PERPLEXITY_LIMIT, 4)
        good &= line(" with --kld", own["perplexity"], number(r"Mean PPL\(Q\)\s*:", told), PERPLEXITY_LIMIT, 4)
        good &= line("KLD, mean", own["kld_mean"], number(r"Mean\s+KLD:", told), DIVERGENCE_LIMIT)
        line("KLD, median", own["kld_p50"], number(r"Median\s+KLD:", told), None)
        line("KLD, 99 %", own["kld_p99"], number(r"99\.0%\s+KLD:", told), None)
        line("KLD, maximum", own["kld_max"], number(r"Maximum KLD:", told), None)
        line("same top", 100 * own["top1_agreement"], number(r"Same top p:", told), None, 3)
        line("RMS dp", 100 * own["rms_dp"], number(r"RMS Δp\s*:", told), None, 3)

    tokens = made["scored_tokens"]
    sizes = {path: path.stat().st_size for path in (reference, logits)}
    share = sizes[reference] / sizes[logits]
    print(
        f"\nkept of the base for {tokens} tokens: ours {sizes[reference] / 1e6:.2f} MB "
        f"({sizes[reference] / tokens:.0f} bytes a token), theirs {sizes[logits] / 1e6:.1f} MB; "
        f"for 10,000: {1e4 * sizes[reference] / tokens / 1e6:.1f} and {1e4 * sizes[logits] / tokens / 1e6:.0f} MB; "
        f"1/{1 / share:.1f} (goal 1/{1 / SIZE_LIMIT:g})"
    )
    return 0 if good and share <= SIZE_LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
