"""Whether all that needs a GPU works on this machine's, and how fast, in ten minutes at most: `make gpu-check`.

    python benchmarks/gpu_check.py                                        every part, one after the other
    python benchmarks/gpu_check.py environment kernels speed encoders calibration recipe      or some of them

Prints a table of what holds and what does not, and appends each line as a JSON row to
`results/<gpu>/gpu-check.jsonl`; exit code 1 where something does not hold, 2 without a GPU. A part runs in a process of
its own, with a time limit: what hangs or crashes is one line of the table. Needs torch and Triton, parts that run the
workbench itself also what it needs; engines and llama.cpp are used where they are, and nothing is fetched.

Goals are those of peers (on the same or a like GPU), not promises: a line that does not hold is a finding.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

NEEDED = {"torch": (2, 11), "triton": (3, 6), "transformers": (5, 17)}
ENGINES = {"transformers": "transformers", "vllm": "vllm", "llamacpp": "llama_cpp"}
"""The workbench's names of engines, and their modules."""
COPY_GOAL, FP16_GOAL, ENCODER_GOAL, CALIBRATION_GOAL_S = 0.85, 3.3, 20.0, 120.0
FOUR_BITS = ("awq-4", "gptq-4", "Q4_K")
SPEED = (*FOUR_BITS, "Q6_K", "Q8_0")
"""Operations that are timed; all of them are checked."""


@dataclass(frozen=True)
class Place:
    """Where and how large the parts work; tests take the CPU and small sizes."""

    work: Path
    """An empty folder."""
    results: Path
    device: str = "cuda"
    shapes: tuple[tuple[int, int], ...] = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
    """(out, in): the linear layers of Llama-3.1-8B."""
    checked: tuple[tuple[str, int], ...] = (("decode", 1), ("prefill", 16), ("dense", 300))
    """Ways to multiply, and how many rows of x each is checked with."""
    engines: tuple[str, ...] = tuple(ENGINES)
    """Those of them that are here are used."""
    processes: int = 8
    layer: dict[str, int] = field(
        default_factory=lambda: {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            # For the layers alone are timed, and a larger one takes time to make.
            "vocab_size": 4096,
        }
    )
    calibration_windows: tuple[int, int] = (128, 512)
    """How many, and tokens in each."""


@dataclass(frozen=True)
class Finding:
    """A line of the table. `holds`: None where nothing is asked for, or it could not be measured here."""

    what: str
    found: str
    goal: str = ""
    holds: bool | None = None
    values: dict[str, object] = field(default_factory=dict)
    """Unrounded, for the row."""


# --- environment --------------------------------------------------------------------------------


def environment(place: Place) -> Iterator[Finding]:
    """What is installed, and what of the GPU a container may hide."""
    import torch

    for package, least in NEEDED.items():
        version = installed(package)
        numbers = tuple(map(int, re.findall(r"\d+", version or "")[:2]))
        yield Finding(package, version or "not here", ">= " + ".".join(map(str, least)), numbers >= least)
    for package in ("vllm", "llama-cpp-python", "gptqmodel", "nvidia-ml-py"):
        yield Finding(package, installed(package) or "not here")
    if os.environ.get("WORKBENCH_PYTHON_VLLM"):
        yield Finding("vLLM's own interpreter", os.environ["WORKBENCH_PYTHON_VLLM"])
    yield Finding("python, CUDA of torch", f"{sys.version.split()[0]}, {torch.version.cuda}")
    yield Finding("nvcc", shutil.which("nvcc") or "not on PATH")
    yield Finding("in a container", "yes" if Path("/.dockerenv").exists() else "not of Docker's")
    place.results.mkdir(parents=True, exist_ok=True)
    yield Finding("results can be written", str(place.results), "yes", os.access(place.results, os.W_OK))
    if place.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        free, whole = torch.cuda.mem_get_info()
        yield Finding(
            properties.name,
            f"{whole / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors, "
            f"sm_{properties.major}{properties.minor}",
        )
        yield Finding("free of it", f"{100 * free / whole:.0f} %", "> 90 %: nobody else is on it", free / whole > 0.9)
        yield seen_by_nvml()
        yield offload()


def installed(package: str) -> str | None:
    """The version of a package here."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def seen_by_nvml() -> Finding:
    """Whether NVML names this process by the id that it has here: in a container without the host's ids it does not."""
    import torch

    what, goal = "NVML knows this process", "yes (a container needs --pid host)"
    if not importlib.util.find_spec("pynvml"):
        return Finding(what, "nvidia-ml-py is not here")
    import pynvml

    used = torch.ones(1, device="cuda")
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        pids = {process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
    except pynvml.NVMLError as error:
        return Finding(what, f"{error}", goal, False)
    del used
    return Finding(what, "yes" if os.getpid() in pids else f"no, it names {sorted(pids)}", goal, os.getpid() in pids)


def offload() -> Finding:
    """Whether llama.cpp, imported as the workbench imports it, can use the GPU."""
    what = "llama.cpp can use the GPU"
    if not importlib.util.find_spec("llama_cpp"):
        return Finding(what, "not here")
    program = "import llama_cpp; print(llama_cpp.llama_supports_gpu_offload())"
    answer = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    words = (answer.stdout + answer.stderr).strip().splitlines()
    return Finding(what, words[-1] if words else "no answer", "True", words[-1:] == ["True"])


# --- kernels ------------------------------------------------------------------------------------


def kernels(place: Place) -> Iterator[Finding]:
    """Every operation against its plain reference, at all shapes, by every way; with the first tile of each kernel:
    trying all would take the time of the whole check."""
    from bench import TOLERANCE, operations

    os.environ["WORKBENCH_KERNELS_TUNE"] = "0"
    names = list(operations("meta"))
    for name, worst in at_once(place, worst_error, names):
        yield Finding(
            f"{name}, largest error", f"{worst:.1e}", f"< {TOLERANCE:.0e}", worst < TOLERANCE, {"error": worst}
        )


def at_once(place: Place, work: Callable[[str, Place], float], names: Sequence[str]) -> Iterator[tuple[str, float]]:
    """The answer for each name, in order, from some processes at once: compiling takes most of the time."""
    if place.processes < 2:
        yield from ((name, work(name, place)) for name in names)
        return
    import multiprocessing

    fresh = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(place.processes, mp_context=fresh) as pool:
        yield from zip(names, pool.map(work, names, itertools.repeat(place)), strict=True)


def worst_error(name: str, place: Place) -> float:
    """The largest error over the largest output, of products by all ways at all shapes, and of de-quantizing."""
    import torch
    from bench import operations, relative_error

    operation, worst = operations(place.device)[name], 0.0
    for n, k in place.shapes:
        weight = operation.make(n, k)
        for path, rows in place.checked:
            x = torch.randn(rows, k, device=place.device, dtype=torch.float16)
            worst = max(worst, relative_error(operation, x, weight, path)[0])
    return worst


# --- speed --------------------------------------------------------------------------------------


def speed(place: Place) -> Iterator[Finding]:
    """One row of x against what the memory does in a copy and against torch's fp16 product; many rows against fp16."""
    import torch
    from bench import copy_bandwidth, measure, operations, row_of

    copy_bytes_s = copy_bandwidth()
    yield Finding("copy", f"{copy_bytes_s / 1e9:.0f} GB/s", values={"copy_bytes_s": copy_bytes_s})
    known = operations(place.device)
    torch_s: dict[tuple[int, int, int], float] = {}
    for name in SPEED:
        for n, k in place.shapes:
            for found in measure(known[name], n, k, [1, 2048] if n == k else [1], "auto", torch_s):
                row = row_of(name, "Llama-3.1-8B", "auto", n, k, found, copy_bytes_s)
                yield speed_finding(name, n, k, row)
        torch.cuda.empty_cache()


def speed_finding(name: str, n: int, k: int, row: dict[str, Any]) -> Finding:
    """The line of one product that `bench.row_of` has the figures of."""
    rows = row["rows"]
    what = f"{name} {n} x {k}, {rows} row{'s' if rows > 1 else ''}"
    if row.get("wrong"):
        return Finding(what, f"wrong by {row['error']:.1e}, not timed", "right", False, row)
    fraction, ratio = row["bandwidth_fraction"], row["torch_ratio"]
    found = f"{1e6 * row['seconds']:.1f} us, {fraction:.2f} of copy, {ratio:.2f} x fp16"
    if rows > 1:
        return Finding(what, found, values=row)
    if name in FOUR_BITS:
        holds = fraction >= COPY_GOAL and ratio >= FP16_GOAL
        return Finding(what, found, f"{COPY_GOAL} of copy, {FP16_GOAL} x fp16", holds, row)
    return Finding(what, found, f"{COPY_GOAL} of copy", fraction >= COPY_GOAL, row)


# --- encoders -----------------------------------------------------------------------------------


def encoders(place: Place) -> Iterator[Finding]:
    """Blocks made on the GPU, with importances and without: the bytes that llama.cpp's quantizer makes, or ours on
    the CPU where that is not here; and, without, weights a second against llama.cpp's on all processors."""
    import torch
    from workbench_kernels.encoders.encode import ENCODERS, encode

    n, k = place.shapes[0]
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.02
    moved = weight.to(place.device)
    with_llama = importlib.util.find_spec("llama_cpp") is not None and importlib.util.find_spec("gguf") is not None
    sample = weight[:: max(1, n // 64)].contiguous()
    importance = torch.rand(k, generator=torch.Generator().manual_seed(1)) ** 4
    for kind in ENCODERS:
        equal, rates = 0, []
        for means in (importance, None):
            means_there = None if means is None else means.to(place.device)
            samples_s = []
            for _ in range(3):
                started = time.perf_counter()
                made = encode(kind, moved, means_there)
                if place.device == "cuda":
                    torch.cuda.synchronize()
                samples_s.append(time.perf_counter() - started)
            rates.append(n * k / min(samples_s))
            mine = made[:: max(1, n // 64)].cpu().contiguous()
            if with_llama:
                from workbench.worker.ggml.encode import same_as_llama_cpp

                numbers = None if means is None else means.numpy()
                equal += same_as_llama_cpp(kind, sample.numpy(), numbers, mine.numpy())
            else:
                equal += int((encode(kind, sample, means) == mine).all(1).sum())
        whose = "llama.cpp's" if with_llama else "the CPU's (no llama.cpp here)"
        rows = 2 * len(sample)
        yield Finding(f"{kind}, rows as {whose}", f"{equal} of {rows}", "all", equal == rows, {"equal": equal})
        with_importances_s, weights_s = rates
        theirs_s = llama_weights_s(kind, weight) if with_llama else None
        ratio = weights_s / theirs_s if theirs_s else None
        yield Finding(
            f"{kind}, encoded",
            f"{weights_s / 1e6:.0f} M weights/s" + (f", {ratio:.1f} x llama.cpp" if ratio else ""),
            f">= {ENCODER_GOAL:.0f} x llama-quantize on {os.cpu_count()} processors",
            None if ratio is None else ratio >= ENCODER_GOAL,
            {
                "weights_s": weights_s,
                "samples_s": samples_s,
                "with_importances_weights_s": with_importances_s,
                "llama_weights_s": theirs_s,
            },
        )


def llama_weights_s(kind: str, weight: Any) -> float:
    """Weights a second that llama.cpp's own quantizer makes, some rows on each processor, as llama-quantize works."""
    import numpy as np
    from workbench_kernels.gguf.types import BLOCK_TYPES

    from workbench.worker.ggml.encode import same_as_llama_cpp

    processors = os.cpu_count() or 1
    rows = min(weight.shape[0], 16 * processors)
    slices = [piece for piece in np.array_split(weight[:rows].numpy(), processors) if len(piece)]
    row_bytes = BLOCK_TYPES[kind].row_bytes(weight.shape[1])
    outs = [np.zeros((len(piece), row_bytes), np.uint8) for piece in slices]
    with concurrent.futures.ThreadPoolExecutor(processors) as pool:
        started = time.perf_counter()
        list(pool.map(lambda piece, out: same_as_llama_cpp(kind, piece, None, out), slices, outs))
        return rows * weight.shape[1] / (time.perf_counter() - started)


# --- calibration --------------------------------------------------------------------------------


def calibration(place: Place, layers: tuple[int, int] = (1, 3), of: int = 32) -> Iterator[Finding]:
    """AWQ, GPTQ and the importance matrix of a few and of some more layers of the 8B shape; what all would take is
    extrapolated from the difference, since what happens once (loading libraries, compiling, embeddings) grows with
    nothing."""
    chance, (count, length) = random.Random(0), place.calibration_windows
    tokens = place.work / "calibration.json"
    windows = [[chance.randrange(place.layer["vocab_size"]) for _ in range(length)] for _ in range(count)]
    tokens.write_text(json.dumps({"windows": windows}))
    seconds, taken_s = zip(*(calibrated(place, tokens, few) for few in layers), strict=True)
    yield calibration_finding(list(seconds), list(taken_s), layers, of, (count, length))


def calibrated(place: Place, tokens: Path, layers: int) -> tuple[dict[str, float], float]:
    """Seconds of a pass over so many layers, by phase, and of its whole process."""
    from quantize_vs_gptqmodel import call, pass_request

    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    shape |= {**place.layer, "num_hidden_layers": layers}
    work = place.work / f"layers-{layers}"
    source = {"config": shape, "init": "random"}
    call("workbench.worker.base.prepare:prepare", {"source": source, "out": str(work / "base")}, place.work / "log")
    variants: dict[str, tuple[str, dict[str, Any]]] = {"awq": ("awq", {}), "gptq": ("gptq", {})}
    payload = pass_request(work / "base", tokens, work, variants, "auto") | {"device": place.device}
    made, taken_s = call("workbench.worker.calibration.run:run", payload, place.work / "log")
    return {name: value for name, value in made["seconds"].items() if name != "total"}, taken_s


def calibration_finding(
    seconds: list[dict[str, float]],
    taken_s: list[float],
    layers: tuple[int, int],
    of: int,
    windows: tuple[int, int],
) -> Finding:
    """The time of all layers, from passes over two numbers of them."""
    more = layers[1] - layers[0]
    each_s = (taken_s[1] - taken_s[0]) / more
    all_s = taken_s[1] + each_s * (of - layers[1])
    said = ", ".join(f"{name} {(seconds[1][name] - seconds[0][name]) / more:.2f}" for name in seconds[1])
    return Finding(
        f"AWQ, GPTQ, imatrix on {windows[0]} x {windows[1]} tokens",
        f"{taken_s[1]:.0f} s for {layers[1]} of {of} layers, {each_s:.1f} s a layer ({said}); "
        f"extrapolated, not measured: {all_s:.0f} s for all",
        f"<= {CALIBRATION_GOAL_S:.0f} s",
        all_s <= CALIBRATION_GOAL_S,
        {"seconds": seconds, "taken_s": taken_s, "layers": layers, "extrapolated_s": all_s},
    )


# --- recipe -------------------------------------------------------------------------------------


def recipe(place: Place) -> Iterator[Finding]:
    """A tiny random model through every engine that is here, by the command that people type; with the
    first tile of each kernel, as above."""
    import yaml

    here = [name for name in place.engines if usable(name)]
    write_tiny(place.work / "Tiny")
    for seed, name in enumerate(("seen", "held-out")):
        chance = random.Random(seed)
        text = "".join(chance.choices(f"{string.ascii_lowercase}    ", k=20_000))
        (place.work / f"{name}.txt").write_text(text)
    variants: list[dict[str, object]] = [{"awq": {"group_size": 128}}, {"gptq": {"group_size": 128}}]
    variants += [{"gguf": "Q8_0"}, {"gguf": "Q4_K_M"}] if "llamacpp" in here else []
    # Where GPTQModel is not, what it makes is multiplied by the workbench's own kernels.
    own = {} if importlib.util.find_spec("gptqmodel") else {"kernel": "workbench"}
    content = {
        "name": "gpu-check",
        "model": "Tiny",
        "base": {"path": str(place.work / "Tiny")},
        "variants": variants,
        "calibration": {"source": {"file": "seen.txt"}, "window": 64, "windows": 8},
        "evaluation": {"source": {"file": "held-out.txt"}, "window": 64, "windows": 4},
        "workload": {"prompt_tokens": 32, "new_tokens": 16, "repeats": 2},
        "backends": {name: own if name == "transformers" else {} for name in here},
    }
    file = place.work / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    words = ["run", str(file), "--results", str(place.work / "results"), "--quiet", "--format", "json"]
    answer = subprocess.run(
        [sys.executable, "-m", "workbench.cli", *words],
        capture_output=True,
        text=True,
        cwd=place.work,
        env={
            **os.environ,
            "WORKBENCH_HOME": str(place.work / "home"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
            "HF_HUB_OFFLINE": "1",
            "WORKBENCH_KERNELS_TUNE": "0",
        },
    )
    try:
        rows = json.loads(answer.stdout)
    except ValueError:
        words = answer.stderr.strip().splitlines() or ["no output"]
        yield Finding("the tiny recipe", words[-1], "a table", False)
        return
    for row in rows:
        yield row_finding(row, place.device)


def usable(engine: str) -> bool:
    """Whether an engine is installed, here or in an interpreter of its own."""
    own = os.environ.get(f"WORKBENCH_PYTHON_{engine.upper()}")
    return bool(own) or importlib.util.find_spec(ENGINES[engine]) is not None


def row_finding(row: dict[str, Any], device: str) -> Finding:
    """The line of one variant in one engine."""
    what = f"{row['variant']} in {row['backend']}"
    if row["unsupported"]:
        return Finding(what, str(row["unsupported"]))
    if row["error"]:
        return Finding(what, str(row["error"]), "measured", False)
    found = f"{row['decode_tok_s']:.0f} tok/s on {row['device']}"
    quality = row["perplexity"]
    found += f", perplexity {quality:.1f}" if quality is not None else ", no perplexity"
    holds = str(row["device"]).startswith(device) and quality is not None
    return Finding(what, found, f"measured on {device}", holds, {"decode_tok_s": row["decode_tok_s"]})


def write_tiny(folder: Path) -> None:
    """A random Llama of two layers with a tokenizer of Llama 2's kind, a token a character: every engine reads both."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += list(string.ascii_letters + string.digits + string.punctuation)
    model = BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in tokens[:3]])
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokens),
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>"}
    settings |= {"eos_token": "</s>", "model_max_length": 2048}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


# --- the whole ----------------------------------------------------------------------------------

PARTS: dict[str, tuple[Callable[[Place], Iterator[Finding]], int]] = {
    "environment": (environment, 30),
    "kernels": (kernels, 140),
    "speed": (speed, 130),
    "encoders": (encoders, 40),
    "calibration": (calibration, 80),
    "recipe": (recipe, 180),
}
"""A part, and the seconds that it may take."""


def found_by(name: str, place: Place) -> Iterator[Finding]:
    """What a part finds, with what ends it as its last line."""
    try:
        yield from PARTS[name][0](place)
    except (Exception, SystemExit) as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        missing = isinstance(error, ModuleNotFoundError)
        yield Finding(f"{name} ended", words[-1][:200], "" if missing else "no error", None if missing else False)


def in_a_process(name: str, limit_s: float, results: Path) -> Iterator[Finding]:
    """What a part finds in a process of its own, which is ended with all that it started at its limit."""
    words = [sys.executable, str(Path(__file__).resolve()), name, "--lines", "--results", str(results)]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + limit_s
    assert child.stdout is not None
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        try:
            while True:
                line = reader.submit(child.stdout.readline).result(max(0.0, deadline - time.monotonic()))
                if not line:
                    break
                yield Finding(**json.loads(line))
        except TimeoutError:
            yield Finding(f"{name} ended", f"not done after {limit_s:.0f} s", "done", False)
            return
        finally:
            end(child)
    if child.returncode:
        yield Finding(f"{name} ended", f"exit code {child.returncode}", "0", False)


def end(child: subprocess.Popen[str]) -> None:
    """End a process and its group; first so that it can end those that have left the group."""
    for how, patience_s in ((signal.SIGINT, 10), (signal.SIGKILL, 10)):
        if child.poll() is None:
            os.killpg(child.pid, how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(patience_s)


def line_of(finding: Finding) -> str:
    """A line of the table."""
    holds = {True: "yes", False: "NO", None: "-"}[finding.holds]
    goal = f"  (goal: {finding.goal})" if finding.goal else ""
    return f"  {holds:4} {finding.what:34} {finding.found}{goal}"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; by default all")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--lines", action="store_true", help="one part, here, its findings as JSON lines")
    arguments = parser.parse_args(words)
    for name in arguments.parts:
        if name not in PARTS:
            parser.error(f"unknown part {name!r}; there are {', '.join(PARTS)}")
    for package in ("torch", "triton"):
        if not importlib.util.find_spec(package):
            print(f"gpu_check.py needs {package}, which is not installed here: `make gpu` sets it up", file=sys.stderr)
            return 2
    import torch

    if not torch.cuda.is_available():
        print("gpu_check.py checks a GPU, and torch sees none (torch.cuda.is_available() is false)", file=sys.stderr)
        return 2
    if arguments.lines:
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
            for finding in found_by(arguments.parts[0], Place(Path(work), arguments.results)):
                print(json.dumps(asdict(finding)), flush=True)
        return 0
    return report(arguments.parts or list(PARTS), arguments.results)


def report(parts: list[str], results: Path) -> int:
    """Run the parts, print the table, store the rows; 1 where something does not hold."""
    from bench import append, machine

    here = machine()
    file = results / re.sub(r"[^a-z0-9]+", "-", str(here["gpu"]).lower()).strip("-") / "gpu-check.jsonl"
    started, held = time.monotonic(), {True: 0, False: 0, None: 0}
    print(f"{here['gpu']}, torch {here['torch']}, Triton {here['triton']}")
    for name in parts:
        part_started = time.monotonic()
        print(f"{name}:", flush=True)
        left_s = max(1.0, sum(limit_s for _, limit_s in PARTS.values()) - (part_started - started))
        for finding in in_a_process(name, min(PARTS[name][1], left_s), results):
            print(line_of(finding), flush=True)
            held[finding.holds] += 1
            append(file, {"part": name, **asdict(finding), **here})
        print(f"  took {time.monotonic() - part_started:.0f} s", flush=True)
    print(f"{held[True]} hold, {held[False]} do not, {held[None]} say nothing of a goal or could not be measured here")
    print(f"rows: {file}")
    return 1 if held[False] else 0


if __name__ == "__main__":
    sys.exit(main())
