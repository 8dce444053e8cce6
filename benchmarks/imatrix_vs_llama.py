"""The importance matrix of the calibration pass against `llama-imatrix` on the same tokens, and what it is worth.

Prints, over all tensors, how far the two matrices are apart, then the perplexity of GGUF types made with ours,
with llama-imatrix's, and without. Run from the repository root:

    python -P benchmarks/imatrix_vs_llama.py BASE CALIBRATION EVALUATION OUT --llama-imatrix PATH [--types Q4_K_M ...]

BASE is a Hugging Face directory; the other two are token files as `workbench/worker/tokens/windows.py` writes them.
`llama-imatrix` builds from llama-cpp-python's source package: `cmake -S vendor/llama.cpp -B build` and
`cmake --build build --target llama-imatrix`. It reads text only, so the calibration tokens are spelled out, and both
take the windows that llama.cpp's tokenizer makes of that text (where two windows meet they may differ by a token).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

from quantize_vs_gptqmodel import call, pass_request, perplexity  # noqa: E402

LIMIT = 0.01


def spelled(base: Path, tokens: Path, gguf_file: Path) -> tuple[str, list[list[int]]]:
    """The calibration as text, and the windows that llama.cpp's tokenizer makes of that text."""
    import llama_cpp
    from transformers import AutoTokenizer

    windows = json.loads(tokens.read_text(encoding="utf-8"))["windows"]
    length = len(windows[0])
    if any(len(window) != length for window in windows):
        sys.exit("llama-imatrix cuts text into windows of one length; take a calibration that has one")
    ids = [token for window in windows for token in window]
    text = AutoTokenizer.from_pretrained(base).decode(ids, clean_up_tokenization_spaces=False)
    model = llama_cpp.Llama(str(gguf_file), vocab_only=True, verbose=False)
    back = model.tokenize(text.encode(), add_bos=False, special=True)
    return text, [back[at : at + length] for at in range(0, len(back) - length + 1, length)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("out", type=Path, help="a folder for what is made")
    parser.add_argument("--llama-imatrix", type=Path, required=True, help="the program")
    parser.add_argument("--llama-quantize", type=Path, help="the program; also tried with our file if given")
    parser.add_argument("--types", nargs="*", default=["Q4_K_M", "Q3_K_M", "Q2_K"])
    arguments = parser.parse_args()
    base, out = arguments.base.resolve(), arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)

    source = out / "base-f32.gguf"
    call(
        "workbench.worker.methods.gguf:convert",
        {"base": str(base), "out": str(source), "dtype": "float32", "name": "base"},
        out / "work",
    )
    text, windows = spelled(base, arguments.calibration, source)
    length = len(windows[0])
    tokens = out / "calibration.json"
    tokens.write_text(json.dumps({"windows": windows}), encoding="utf-8")
    payload = pass_request(base, tokens, out, {}, "float32") | {"imatrix_out": str(out / "ours.gguf")}
    _, ours_s = call("workbench.worker.calibration.run:run", payload, out / "work")
    (out / "calibration.txt").write_text(text, encoding="utf-8")
    theirs_file = out / "llama.gguf"
    started = time.perf_counter()
    command = [
        str(arguments.llama_imatrix.resolve()),
        "-m",
        str(source),
        "-f",
        str(out / "calibration.txt"),
        "-o",
        str(theirs_file),
        "-c",
        str(length),
        "-b",
        str(length),
        "--no-ppl",
        "--parse-special",
        "--output-format",
        "gguf",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    theirs_s = time.perf_counter() - started
    if done.returncode or not theirs_file.exists():
        sys.exit(f"llama-imatrix failed:\n{done.stderr[-2000:]}")

    import numpy as np

    from workbench.worker.ggml import imatrix

    ours, theirs = imatrix.load(out / "ours.gguf"), imatrix.load(theirs_file)
    if set(ours) != set(theirs):
        sys.exit(f"different tensors: {sorted(set(ours) ^ set(theirs))[:8]}")
    distance = {name: float(np.linalg.norm(ours[name] - theirs[name]) / np.linalg.norm(theirs[name])) for name in ours}
    worst = max(distance, key=lambda name: distance[name])
    entries = np.concatenate(
        [np.abs(ours[name] - theirs[name])[theirs[name] > 0] / theirs[name][theirs[name] > 0] for name in ours]
    )
    print(f"{len(ours)} tensors; the pass took {ours_s:.0f} s, llama-imatrix {theirs_s:.0f} s")
    print(
        f"distance of a tensor's entries: median {np.median(list(distance.values())):.2e}, "
        f"worst {distance[worst]:.2e} ({worst})"
    )
    print(
        f"single entries: median {np.median(entries):.2e}, 99 % {np.quantile(entries, 0.99):.2e}, "
        f"worst {entries.max():.2e} (goal {LIMIT})"
    )
    good = float(entries.max()) <= LIMIT

    if arguments.llama_quantize:
        command = [
            str(arguments.llama_quantize.resolve()),
            "--imatrix",
            str(out / "ours.gguf"),
            str(source),
            str(out / "tool.gguf"),
            "Q4_K_M",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = next(
            (line for line in (done.stdout + done.stderr).splitlines() if "importance matrix entries from" in line), ""
        )
        print(f"llama-quantize with our file: {'accepted' if done.returncode == 0 else 'REFUSED'}; {said.strip()}")
        good &= done.returncode == 0

    def made(kind: str, matrix: Path | None, name: str) -> float:
        path = out / f"{kind}-{name}.gguf"
        call(
            "workbench.worker.methods.gguf:quantize",
            {
                "source": str(source),
                "out": str(path),
                "type": kind,
                "imatrix": str(matrix) if matrix else None,
                "threads": None,
            },
            out / "work",
        )
        return perplexity(path, "gguf", "llamacpp", whole, out / "work")

    content = json.loads(arguments.evaluation.read_text(encoding="utf-8"))
    content.setdefault("score_from", [len(window) // 2 for window in content["windows"]])
    content.setdefault("vocab_size", json.loads((base / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    whole = out / "evaluation.json"
    whole.write_text(json.dumps(content), encoding="utf-8")
    from workbench.worker.methods.gguf import NEEDS_IMATRIX

    if arguments.types:
        print("\nperplexity in llama.cpp    without   with ours   with llama-imatrix's", flush=True)
    for kind in arguments.types:
        plain = None if kind in NEEDS_IMATRIX else made(kind, None, "plain")
        with_ours, with_theirs = made(kind, out / "ours.gguf", "ours"), made(kind, theirs_file, "theirs")
        print(
            f"{kind:24} {'-' if plain is None else format(plain, '.3f'):>9} {with_ours:11.3f} {with_theirs:12.3f}",
            flush=True,
        )
        good &= plain is None or with_ours < plain
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
