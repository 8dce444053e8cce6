"""AWQ from the calibration pass against AutoAWQ: time and quality on the same tokens, and the layout bit for bit.

AutoAWQ is archived and needs an interpreter of its own (transformers 4.51.3, `pip install autoawq==0.2.9`), given as
PYTHON. It takes about twenty minutes for a 135M model on two cores; `--layers N` cuts the model to its first layers
for both, since each works layer by layer, and then compares times only. Run from the repository root:

    python -P benchmarks/awq_vs_autoawq.py BASE CALIBRATION EVALUATION OUT --python PYTHON [--layers N | --layout-only]

Its time is that of its `quantize` call; ours is the whole pass with AWQ as the only variant. Our checkpoint is
also unpacked by AutoAWQ's own `dequantize_gemm` (and without PYTHON's help by ours), and must agree to the last bit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

from quantize_vs_gptqmodel import ours, perplexity  # noqa: E402

TIME_GOAL = 1 / 12

QUANTIZE = """
import json, sys, time
from awq import AutoAWQForCausalLM
from awq.quantize import quantizer
import torch
base, tokens, out = sys.argv[1:4]
windows = json.load(open(tokens))["windows"]
# Its own loader reads text and concatenates blocks of 512; the same tokens go in where that ends.
quantizer.get_calib_dataset = lambda **_: [torch.tensor([window]) for window in windows]
model = AutoAWQForCausalLM.from_pretrained(base, device_map="cpu", safetensors=True)
class Tokenizer:
    def save_pretrained(self, folder): pass
started = time.perf_counter()
model.quantize(Tokenizer(), quant_config={"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"})
print("SECONDS", time.perf_counter() - started)
model.save_quantized(out)
"""

UNPACK = """
import sys
from safetensors.torch import load_file, save_file
from awq.utils.packing_utils import dequantize_gemm
stored = load_file(sys.argv[1])
made = {}
for name in stored:
    if name.endswith(".qweight"):
        stem = name[: -len(".qweight")]
        weight = dequantize_gemm(stored[name], stored[stem + ".qzeros"], stored[stem + ".scales"], 4, 128)
        made[stem] = weight.t().contiguous()
save_file(made, sys.argv[2])
"""


def run(python: Path, program: str, *arguments: str) -> str:
    """A program's output under another interpreter; exits with its last words if it fails."""
    done = subprocess.run([str(python), "-c", program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{python} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def first_layers(base: Path, count: int, out: Path) -> Path:
    """A copy of the base that ends after its first layers."""
    from safetensors.torch import load_file, save_file

    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": count}), encoding="utf-8")
    beyond = tuple(f"model.layers.{index}." for index in range(count, config["num_hidden_layers"]))
    kept = {
        name: tensor
        for file in sorted(base.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
        if not name.startswith(beyond)
    }
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    return out


def layout_agrees(python: Path, checkpoint: Path, work: Path) -> bool:
    """Whether AutoAWQ's unpacking of our file gives our own float16 values for every weight."""
    import torch
    from safetensors.torch import load_file
    from workbench_kernels.awq import reference

    unpacked = work / "unpacked.safetensors"
    run(python, UNPACK, str(checkpoint / "model.safetensors"), str(unpacked))
    stored, theirs = load_file(checkpoint / "model.safetensors"), load_file(unpacked)
    for stem, weight in theirs.items():
        parts = {suffix: stored[f"{stem}.{suffix}"] for suffix in ("qweight", "qzeros", "scales")}
        if not torch.equal(reference(**parts).half(), weight.half()):
            print(f"  {stem} differs")
            return False
    print(f"AutoAWQ's unpacking of our checkpoint: all {len(theirs)} matrices equal to the last bit")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--python", type=Path, required=True, help="of an environment with autoawq")
    parser.add_argument("--layers", type=int, help="only the base's first so many layers; without perplexities")
    parser.add_argument("--layout-only", action="store_true", help="leave out AutoAWQ's own quantization")
    arguments = parser.parse_args()
    base, tokens, out = arguments.base.resolve(), arguments.calibration.resolve(), arguments.out.resolve()
    if arguments.layers:
        base = first_layers(base, arguments.layers, out / f"first-{arguments.layers}-layers")
    made, ours_s = ours(base, tokens, out, {"awq": ("awq", {})}, "auto")
    print(f"ours: {ours_s:.1f} s, of it AWQ {made['seconds']['awq']:.1f} s", flush=True)
    good = layout_agrees(arguments.python, out / "awq", out)
    if arguments.layout_only:
        return 0 if good else 1
    peer = out / "autoawq"
    shutil.rmtree(peer, ignore_errors=True)
    said = run(arguments.python, QUANTIZE, str(base), str(tokens), str(peer))
    theirs_s = float(next(line for line in said.splitlines() if line.startswith("SECONDS")).split()[1])
    print(f"AutoAWQ: {theirs_s:.1f} s; ours takes 1/{theirs_s / ours_s:.1f} of it (goal 1/12)")
    for name, folder in () if arguments.layers else (("base", base), ("ours", out / "awq"), ("AutoAWQ", peer)):
        form = "safetensors" if name == "base" else "awq"
        print(
            f"  {name:8} perplexity {perplexity(folder, form, 'transformers', arguments.evaluation, out / 'work'):.3f}"
        )
    return 0 if good and ours_s / theirs_s <= TIME_GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
