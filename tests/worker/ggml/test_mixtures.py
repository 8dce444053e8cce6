"""The plan's rules of which tensor gets which type, against llama.cpp's own quantizer and against files it wrote."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from tests.places import ROOT
from workbench.shape import NamedShape, Traits
from workbench.worker.ggml.mixtures import BLOCKS, FALLBACK, tensor_bytes, types_of
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


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_every_mixture_gets_the_types_that_the_quantizer_gives(name: str, tmp_path: Path) -> None:
    """All 29 mixtures of each shape, without and with an importance matrix, tensor by tensor."""
    sizes = SHAPES[name]
    tensors, traits = llama(**sizes)
    asked = {
        "tensors": {tensor.name: list(tensor.shape) for tensor in tensors},
        "mixtures": MIXTURES,
        "fields": {
            "context_length": 64,
            "embedding_length": sizes["hidden"],
            "block_count": sizes["layers"],
            "feed_forward_length": sizes["inner"],
            "attention.head_count": sizes["heads"],
            "attention.head_count_kv": sizes["kv_heads"],
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.dimension_count": sizes["hidden"] // sizes["heads"],
        }
        | ({"expert_count": sizes["experts"], "expert_used_count": 2} if "experts" in sizes else {}),
    }
    (tmp_path / "request.json").write_text(json.dumps(asked))
    answer = subprocess.run(
        [sys.executable, "-P", DRY_RUN, tmp_path / "request.json", tmp_path / "reply.json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr[-2000:] + answer.stdout[-500:]
    found = json.loads((tmp_path / "reply.json").read_text())
    whole = all(sizes[axis] % 256 == 0 for axis in ("hidden", "inner"))
    for imatrix, mixture in itertools.product((False, True), MIXTURES):
        types, fell = types_of(mixture, tensors, traits, imatrix)
        # What this starts from: F16, and F32 for a single dimension. Experts' gates stay as they are.
        source = {tensor.name: "F16" if len(tensor.shape) > 1 else "F32" for tensor in tensors}
        ours = {
            name: "UNCHANGED" if kind == source[name] or "ffn_gate_inp" in name else kind
            for name, kind in types.items()
        }
        assert ours == found[imatrix][mixture], (mixture, imatrix)
        assert not (whole and fell)


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
