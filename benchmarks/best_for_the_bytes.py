"""The best GGUF file for the bytes: how much less diverges than with llama.cpp's own mixtures and importance matrix.

    python -P benchmarks/best_for_the_bytes.py OUT [--like Q4_K_M ...] [--engines llamacpp ...] [--windows 24]

On the default model. Importance matrix, Gram matrices and prices come from its calibration text; divergence from the
base is measured on two texts that nothing has looked at, other help topics of CPython and docstrings of its standard
library. Of every mixture in `--like`: llama.cpp's with an importance matrix; the same types with compensated codes; the
same bytes with types by price and compensated codes; and the same bytes with types by the rule of llama.cpp's pull
request 15550 (written anew here), which looks at no gradients: for a row of weights x with errors e, and mean squares s
and means a of its inputs

    (sum s e^2 + (sum a s e)^2 / sum a^2 s) / sum s x^2

averaged over rows; the mixture has the least sum over tensors. Prints ratios of mean divergences with 95 % intervals,
windows as clusters, both texts together and apart, and of speeds; exit code 1 if a limit is not kept. In `transformers`
files are de-quantized, and computed with in float32. What is in OUT already is not made again: a run that was
interrupted goes on. OUT/figures.json has all figures.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import statistics
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

import workbench as wb  # noqa: E402
from workbench.records import Row  # noqa: E402
from workbench.report.estimates import t_quantile  # noqa: E402
from workbench.report.speeds import decode_samples  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ("topics", "docstrings")
LIMITS = {
    ("llamacpp", "priced", "weighted"): {"Q2_K": 0.35, "Q3_K_M": 0.5, "Q4_K_M": 0.62, "Q5_K_M": 0.7},
    ("transformers", "priced", "weighted"): {"Q4_K_M": 0.52},
    ("transformers", "compensated", "weighted"): {"Q4_K_M": 0.7},
    ("llamacpp", "compensated", "weighted"): {},
    ("llamacpp", "priced", "peer"): {"Q4_K_M": 0.8},
}
"""The most that a ratio of divergences may be: (engine, whose, to whose) -> mixture -> ratio; 1 where none is named."""
BYTES, SPEED = 0.005, 0.03
"""How far sizes, and speeds of files of the same types, may be apart."""
LOADS, ROUNDS, TOKENS = 8, 8, 64
"""Of decoding two files by turns: loads of both, rounds after each, tokens in a round."""


def docstrings() -> str:
    """The longer docstrings of the standard library, in the order of its modules."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.append(ast.get_docstring(node) or "")
    return "\n\n".join(text for text in found if len(text) > 200)


def recipe(out: Path, like: Sequence[str], engines: Sequence[str], windows: int) -> Path:
    """Of everything that is made and measured, written into `out`."""
    default = yaml.safe_load((ROOT / "recipes" / "smollm2-135m.yaml").read_text(encoding="utf-8"))
    (out / "docstrings.txt").write_text(docstrings(), encoding="utf-8")
    sources = {"topics": default["evaluation"]["source"], "docstrings": {"file": "docstrings.txt"}}
    variants: list[dict[str, Any]] = []
    for kind in like:
        variants += [
            {"gguf": {"type": kind, "imatrix": True}, "name": f"weighted-{kind}"},
            {"gguf": {"type": kind, "rounding": "compensated"}, "name": f"compensated-{kind}"},
            {"gguf": {"like": kind, "rounding": "compensated"}, "name": f"priced-{kind}"},
        ]
        if (out / f"peer-{kind}.gguf").is_file():
            variants.append({"file": {"path": f"peer-{kind}.gguf"}, "name": f"peer-{kind}"})
    whole = {
        "name": "best-for-the-bytes",
        **{key: default[key] for key in ("model", "base", "calibration")},
        "variants": variants,
        "evaluation": {
            name: {"source": source, "window": 512, "windows": windows, "score": "second-half"}
            for name, source in sources.items()
        },
        "workload": {"prompt_tokens": 64, "new_tokens": 32, "repeats": 3},
        "backends": {name: {"dtype": "float32"} if name == "transformers" else {} for name in engines},
    }
    path = out / "recipe.yaml"
    path.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
    return path


# --- the peer -----------------------------------------------------------------------------------


def means_of_inputs(base: str, tokens: str, tensors: Mapping[str, str], windows: int = 4) -> dict[str, Any]:
    """GGUF tensor -> the mean of each of its inputs over some calibration windows; `tensors`: its linear layer."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    sums: dict[str, Any] = {}

    def watch(name: str) -> Any:
        def before(module: Any, inputs: tuple[Any, ...]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].flatten(0, -2).mean(0) / windows

        return before

    for tensor, linear in tensors.items():
        model.get_submodule(linear).register_forward_pre_hook(watch(tensor))
    with torch.inference_mode():
        for ids in json.loads(Path(tokens).read_text(encoding="utf-8"))["windows"][:windows]:
            model.model(torch.tensor([ids]))
    return {name: value.numpy() for name, value in sums.items()}


def peer(out: Path, kind: str, source: str, matrix: str, base: str, tokens: str) -> None:
    """Write the file whose types the pull request's rule chooses, at the bytes of a mixture."""
    import gguf
    import numpy as np

    from workbench.shape import NamedShape
    from workbench.worker.ggml import choice, imatrix
    from workbench.worker.ggml.blocks import round_trip
    from workbench.worker.ggml.encode import traits_of
    from workbench.worker.ggml.quantizer import run_quantizer

    reader = gguf.GGUFReader(source)
    squares = imatrix.load(matrix)
    shapes = [NamedShape(each.name, tuple(map(int, reversed(each.shape)))) for each in reader.tensors]
    names = {"attn_output": "self_attn.o_proj", **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"}}
    names |= {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    linears = {
        f"blk.{layer}.{short}.weight": f"model.layers.{layer}.{linear}"
        for layer in range(traits_of(reader).layers)
        for short, linear in names.items()
    }
    means = means_of_inputs(base, tokens, linears)
    may = choice.allowed(shapes, choice.TYPES, {})
    errors: dict[str, dict[str, float]] = {}
    for tensor in reader.tensors:
        if tensor.name not in may:
            continue
        rows = np.array(tensor.data[:: max(1, len(tensor.data) // 64)], dtype=np.float32)
        s = squares.get(tensor.name)
        weights = np.ones(rows.shape[1], np.float32) if s is None else s
        a = means.get(tensor.name)
        errors[tensor.name] = {}
        for type_name in may[tensor.name]:
            e = round_trip(type_name, rows, s) - rows
            left = (weights * e * e).sum(1)
            if a is not None:
                left += (a * weights * e).sum(1) ** 2 / (a * a * weights).sum()
            share = left / np.maximum((weights * rows * rows).sum(1), 1e-30)
            errors[tensor.name][type_name] = float(share.mean()) * len(tensor.data)
    size = choice.Budget(like=kind).weight_bytes(shapes, traits_of(reader))
    chosen = choice.choose(shapes, may, errors, size)
    file = str(out / f"peer-{kind}.gguf")
    run_quantizer(source, file, kind, matrix, None, progress=lambda *_: None, types=chosen.types)


# --- figures ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """Of two mean divergences, with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def ratio(row: Row, other: Row, texts: Sequence[str]) -> Ratio:
    """Paired by windows: the error of log(sum a / sum b) from a_w / sum a - b_w / sum b (delta method)."""
    assert row.measurement and other.measurement
    sums = [
        (one["kld_sum"], two["kld_sum"])
        for text in texts
        for one, two in zip(*(each.measurement.qualities[text]["windows"] for each in (row, other)), strict=True)
    ]
    a, b, count = sum(one for one, _ in sums), sum(two for _, two in sums), len(sums)
    error = math.sqrt(sum((one / a - two / b) ** 2 for one, two in sums) * count / (count - 1))
    wide = math.exp(t_quantile(0.975, count - 1) * error)
    return Ratio(a / b, a / b / wide, a / b * wide)


def decode(row: Row) -> float:
    """Tokens a second, the best of its repeats: what else the machine did takes the least from it."""
    return max(decode_samples(row))


def decode_in_turns(file: Path, other: Path) -> float:
    """How many times as many tokens a second the first file decodes in llama.cpp, both in one process by turns: rows of
    two jobs are minutes apart. Where in memory a file comes to lie is worth 2 %, also to the same file twice, so both
    are loaded anew, in either order, and the median of the loads' medians counts."""
    return statistics.median(one_load(file, other, load % 2 == 1) for load in range(LOADS))


def one_load(file: Path, other: Path, other_first: bool) -> float:
    """The median ratio of one load of both files, the second before the first or after it."""
    import llama_cpp

    pair = (file, other)
    models = {
        path: llama_cpp.Llama(str(path), n_ctx=256, n_threads=os.cpu_count(), verbose=False, use_mmap=False)
        for path in (pair[::-1] if other_first else pair)
    }

    def seconds(model: Any) -> float:
        model.reset()
        model.eval(list(range(10, 74)))
        started = time.perf_counter()
        for token in range(TOKENS):
            model.eval([20 + token])
        return time.perf_counter() - started

    ratios = []
    for number in range(ROUNDS + 1):
        taken_s = {path: seconds(models[path]) for path in (pair if number % 2 else pair[::-1])}
        ratios.append(taken_s[other] / taken_s[file])
    for model in models.values():
        model.close()
    return statistics.median(ratios[1:])


def report(
    rows: Mapping[tuple[str, str], Row], like: Sequence[str], files: Mapping[str, Path]
) -> tuple[list[dict[str, Any]], bool]:
    """Print every ratio; all of them, and whether the limits are kept. `files`: of the variants."""
    figures, good = [], True
    for (engine, ours, theirs), limits in LIMITS.items():
        for kind in like:
            row, other = rows.get((f"{ours}-{kind}", engine)), rows.get((f"{theirs}-{kind}", engine))
            if row is None or other is None:
                continue
            both = ratio(row, other, TEXTS)
            apart = {text: ratio(row, other, [text]) for text in TEXTS}
            size = row.artifact.disk_bytes / other.artifact.disk_bytes
            limit = limits.get(kind, 1.0)
            kept = both.value <= limit and both.high < 1 and abs(size - 1) <= BYTES
            good &= kept
            said = ", ".join(f"{text} {found}" for text, found in apart.items())
            verdict = "kept" if kept else "NOT KEPT"
            print(f"{engine:13} {ours:12} to {theirs:9} {kind:7} {both}  limit {limit}: {verdict}")
            speed = decode(row) / decode(other)
            if (ours, engine) == ("compensated", "llamacpp"):
                speed = decode_in_turns(files[f"{ours}-{kind}"], files[f"{theirs}-{kind}"])
                good &= abs(speed - 1) <= SPEED
            print(f"{'':13} bytes {size:.4f}, decode {speed:.3f}; {said}", flush=True)
            figures.append(
                {"engine": engine, "ours": ours, "theirs": theirs, "like": kind, "limit": limit}
                | {"bytes": size, "decode": speed}
                | {"ratio": vars(both), **{text: vars(found) for text, found in apart.items()}}
            )
    return figures, good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--like", nargs="+", default=["Q4_K_M", "Q5_K_M", "Q3_K_M", "Q2_K"])
    parser.add_argument("--engines", nargs="+", default=["llamacpp", "transformers"])
    parser.add_argument("--windows", type=int, default=24, help="of each text")
    given = parser.parse_args()
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WORKBENCH_HOME", str(out / "cache"))
    made = wb.quantize(recipe(out, given.like, given.engines, given.windows), quiet=False)
    if made.failures:
        sys.exit("\n".join(f"{name}: {reason}" for name, reason in made.failures.items()))
    home = Path(os.environ["WORKBENCH_HOME"])
    for kind in given.like:
        if not (out / f"peer-{kind}.gguf").is_file():
            source = next(home.glob("artifacts/*/*-F32.gguf"))
            matrix = next(home.glob("imatrix/*/*.imatrix.gguf"))
            tokens = next(home.glob("tokens/*/calibration.json"))
            peer(out, kind, str(source), str(matrix), made.base.path, str(tokens))
    run = wb.run(recipe(out, given.like, given.engines, given.windows), out / "rows", quiet=False)
    for name, reason in run.failures.items():
        print(f"{name}: {reason}")
    rows = {(row.artifact.variant, row.backend): row for row in run.rows if row.measurement}
    print(run.table)
    files = {name: Path(each[0].path) for name, each in made.artifacts.items()}
    figures, good = report(rows, given.like, files)
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0 if good and not run.failures else 1


if __name__ == "__main__":
    sys.exit(main())
