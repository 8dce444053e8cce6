"""The plan's rules of which tensor gets which type, against llama.cpp's own quantizer and against files it wrote."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.places import ROOT
from workbench.shape import NamedShape, Traits
from workbench.worker.ggml.mixtures import BLOCKS, FALLBACK, RULED, is_quantized, tensor_bytes, types_of
from workbench.worker.methods.gguf import TypeName

MIXTURES = typing.get_args(TypeName)
DRY_RUN = Path(__file__).with_name("llama_dry_run.py")
ROWS = sorted((ROOT / "results").glob("*/rows.jsonl"))


def llama(
    *, layers: int, hidden: int, inner: int, heads: int, kv_heads: int, tied: bool = False, experts: int = 0
) -> tuple[list[NamedShape], Traits]:
    """A Llama's tensors, as small as they may be."""
    keys = hidden * kv_heads // heads
    found = {"token_embd.weight": (32, hidden), "output_norm.weight": (hidden,)}
    found |= {} if tied else {"output.weight": (32, hidden)}
    for i in range(layers):
        found |= {
            f"blk.{i}.attn_norm.weight": (hidden,),
            f"blk.{i}.ffn_norm.weight": (hidden,),
            f"blk.{i}.attn_q.weight": (hidden, hidden),
            f"blk.{i}.attn_k.weight": (keys, hidden),
            f"blk.{i}.attn_v.weight": (keys, hidden),
            f"blk.{i}.attn_output.weight": (hidden, hidden),
        }
        if experts:
            found |= {
                f"blk.{i}.ffn_gate_inp.weight": (experts, hidden),
                f"blk.{i}.ffn_gate_exps.weight": (experts, inner, hidden),
                f"blk.{i}.ffn_up_exps.weight": (experts, inner, hidden),
                f"blk.{i}.ffn_down_exps.weight": (experts, hidden, inner),
            }
        else:
            found |= {
                f"blk.{i}.ffn_gate.weight": (inner, hidden),
                f"blk.{i}.ffn_up.weight": (inner, hidden),
                f"blk.{i}.ffn_down.weight": (hidden, inner),
            }
    return [NamedShape(name, shape) for name, shape in found.items()], Traits(layers, heads, kv_heads, experts)


SHAPES = {
    "plain": {"layers": 32, "hidden": 256, "inner": 256, "heads": 4, "kv_heads": 1},
    "few-layers": {"layers": 3, "hidden": 256, "inner": 512, "heads": 4, "kv_heads": 2},
    "tied": {"layers": 30, "hidden": 256, "inner": 256, "heads": 4, "kv_heads": 4, "tied": True},
    "rows-of-288": {"layers": 9, "hidden": 288, "inner": 256, "heads": 9, "kv_heads": 3, "tied": True},
    "mlp-of-288": {"layers": 9, "hidden": 256, "inner": 288, "heads": 4, "kv_heads": 2},
    "rows-of-40": {"layers": 2, "hidden": 40, "inner": 48, "heads": 2, "kv_heads": 2},
    "eight-experts": {"layers": 17, "hidden": 256, "inner": 256, "heads": 4, "kv_heads": 1, "experts": 8},
    "four-experts": {"layers": 8, "hidden": 256, "inner": 256, "heads": 4, "kv_heads": 2, "experts": 4},
    "seventy": {"layers": 80, "hidden": 256, "inner": 256, "heads": 8, "kv_heads": 1},
}


def dry_run(folder: Path, tensors: list[NamedShape], traits: Traits, fields: dict[str, Any]) -> list[Any]:
    """What llama.cpp's quantizer would make of every tensor, without and with an importance matrix, by mixture."""
    asked = {
        "architecture": traits.model_type,
        "tensors": {tensor.name: list(tensor.shape) for tensor in tensors},
        "mixtures": MIXTURES,
        "fields": {
            "context_length": 64,
            "block_count": traits.layers,
            "attention.head_count": traits.heads,
            "attention.head_count_kv": traits.kv_heads,
            "attention.layer_norm_rms_epsilon": 1e-5,
            **fields,
        },
    }
    (folder / "request.json").write_text(json.dumps(asked))
    answer = subprocess.run(
        [sys.executable, "-P", DRY_RUN, folder / "request.json", folder / "reply.json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr[-2000:] + answer.stdout[-500:]
    return list(json.loads((folder / "reply.json").read_text()))


def changed(types: dict[str, str], tensors: list[NamedShape]) -> dict[str, str]:
    """The rules' types as the dry run says them: it starts from F16, and from F32 for a single dimension."""
    source = {tensor.name: "F16" if len(tensor.shape) > 1 else "F32" for tensor in tensors}
    kept = {tensor.name for tensor in tensors if not is_quantized(tensor)}
    return {name: "UNCHANGED" if name in kept or kind == source[name] else kind for name, kind in types.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_every_mixture_gets_the_types_that_the_quantizer_gives(name: str, tmp_path: Path) -> None:
    """All 29 mixtures of each shape, without and with an importance matrix, tensor by tensor."""
    sizes = SHAPES[name]
    tensors, traits = llama(**sizes)
    fields = {
        "embedding_length": sizes["hidden"],
        "feed_forward_length": sizes["inner"],
        "rope.dimension_count": sizes["hidden"] // sizes["heads"],
    } | ({"expert_count": sizes["experts"], "expert_used_count": 2} if "experts" in sizes else {})
    found = dry_run(tmp_path, tensors, traits, fields)
    whole = all(sizes[axis] % 256 == 0 for axis in ("hidden", "inner"))
    for imatrix, mixture in itertools.product((False, True), MIXTURES):
        types, fell = types_of(mixture, tensors, traits, imatrix)
        assert changed(types, tensors) == found[imatrix][mixture], (mixture, imatrix)
        assert not (whole and fell)


@pytest.mark.slow
@pytest.mark.parametrize("kind", RULED)
def test_the_rules_are_those_of_every_architecture_that_is_encoded(kind: str, tmp_path: Path) -> None:
    """Their own tensors beside Llama's (biases, more norms), or fused ones in their place."""
    tensors, traits = llama(layers=16, hidden=256, inner=512, heads=4, kv_heads=2, tied=kind.startswith("gemma"))
    wide = {tensor.name: tensor.shape for tensor in tensors}
    for layer in range(16):
        block = f"blk.{layer}"
        if kind == "phi3":
            for part in ("q", "k", "v"):
                del wide[f"{block}.attn_{part}.weight"]
            del wide[f"{block}.ffn_gate.weight"]
            wide |= {f"{block}.attn_qkv.weight": (512, 256), f"{block}.ffn_up.weight": (1024, 256)}
        if kind == "qwen2":
            wide |= {f"{block}.attn_{part}.bias": (size,) for part, size in (("q", 256), ("k", 128), ("v", 128))}
        if kind in ("qwen3", "gemma3"):
            wide |= {f"{block}.attn_{part}_norm.weight": (64,) for part in ("q", "k")}
        if kind.startswith("gemma"):
            wide |= {f"{block}.post_{part}_norm.weight": (256,) for part in ("attention", "ffw")}
    tensors, traits = [NamedShape(name, shape) for name, shape in wide.items()], replace(traits, model_type=kind)
    fields: dict[str, Any] = {"embedding_length": 256, "feed_forward_length": 512, "rope.dimension_count": 64}
    if kind.startswith("gemma"):
        fields |= {"attention.sliding_window": 16, "attention.key_length": 64, "attention.value_length": 64}
    found = dry_run(tmp_path, tensors, traits, fields)
    for imatrix, mixture in itertools.product((False, True), MIXTURES):
        types, _ = types_of(mixture, tensors, traits, imatrix)
        assert changed(types, tensors) == found[imatrix][mixture], (mixture, imatrix)


@pytest.mark.skipif(not ROWS, reason="no stored rows")
def test_the_files_of_the_published_rows_hold_what_the_rules_say() -> None:
    """Every GGUF of the results: its tensors' types, and its bytes to the last one."""
    seen = 0
    for line in (line for file in ROWS for line in file.read_text().splitlines()):
        artifact = json.loads(line)["artifact"]
        if artifact["format"] != "gguf" or not artifact["path"].endswith(".gguf"):
            continue
        mixture = artifact["provenance"]["options"].get("type")
        if artifact["parameters"] != 191149824 or not mixture:
            continue
        tensors, traits = _default_base()
        imatrix = bool(artifact["provenance"]["options"].get("imatrix"))
        types, fell = types_of(mixture, tensors, traits, imatrix)
        assert types == artifact["tensor_types"], mixture
        assert sum(tensor_bytes(types[t.name], t) for t in tensors) == artifact["disk_bytes"]
        assert not fell
        seen += 1
    assert seen >= 10


def _default_base() -> tuple[list[NamedShape], Traits]:
    """The default recipe's base: 768 channels, 30 layers, tied."""
    found = {"token_embd.weight": (49152, 768), "output_norm.weight": (768,)}
    for i in range(30):
        found |= {
            f"blk.{i}.attn_norm.weight": (768,),
            f"blk.{i}.ffn_norm.weight": (768,),
            f"blk.{i}.attn_q.weight": (768, 768),
            f"blk.{i}.attn_k.weight": (256, 768),
            f"blk.{i}.attn_v.weight": (256, 768),
            f"blk.{i}.attn_output.weight": (768, 768),
            f"blk.{i}.ffn_gate.weight": (1536, 768),
            f"blk.{i}.ffn_up.weight": (1536, 768),
            f"blk.{i}.ffn_down.weight": (768, 1536),
        }
    return [NamedShape(name, shape) for name, shape in found.items()], Traits(30, 12, 4)


def test_a_tensor_that_falls_back_is_named_with_what_was_meant() -> None:
    tensors, traits = llama(**SHAPES["mlp-of-288"])
    types, fell = types_of("Q4_K_S", tensors, traits)
    assert set(fell) == {t.name for t in tensors if "ffn_down" in t.name}
    assert all(types[name] == FALLBACK[meant] for name, meant in fell.items())
    assert types["blk.8.ffn_down.weight"] == "Q5_0" and fell["blk.8.ffn_down.weight"] == "Q4_K"
    assert types_of("Q8_0", tensors, traits)[1] == {}


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    for kind, (weights, size_bytes) in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (weights, size_bytes)
