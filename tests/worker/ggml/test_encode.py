"""GGUF files by this project's encoders are llama.cpp's, to the byte: blocks, types, order and metadata."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.places import ROOT
from workbench.errors import UserError
from workbench.worker.methods import gguf as method

MIXTURES = ["Q4_K_M", "Q6_K", "Q2_K", "Q3_K_M", "Q5_K_M", "Q8_0", "Q4_0"]
IDS = [40, 41, 42, 43]


# --- what the parent reads without an engine ----------------------------------------------------


@pytest.mark.parametrize("name", method.TYPE_NAMES)
def test_what_the_encoders_do_not_make_is_refused_with_what_they_do(name: str) -> None:
    options = method.Options(type=name, imatrix=True, encoder="workbench")  # type: ignore[arg-type]
    if name in method.ENCODED:
        method.check(options)
    else:
        with pytest.raises(
            UserError, match=rf"encoder workbench does not make {name}, only Q8_0, Q6_K, .*Q2_K_S: leave"
        ):
            method.check(options)
    assert (name in method.ENCODED) == (name[0] == "Q")


def test_auto_is_llama_cpps_but_on_a_gpu() -> None:
    assert method.Options("Q4_K_M").encoder == "auto"

    def encoder(kind: Any, encoder: Any = "auto", *, cuda: bool) -> object:
        return method.making(method.Options(kind, encoder=encoder), cuda).arguments["encoder"]

    assert encoder("Q4_K_M", "auto", cuda=False) == "llamacpp"
    assert encoder("Q4_K_M", "auto", cuda=True) == "auto"
    assert encoder("IQ4_XS", "auto", cuda=True) == "llamacpp"
    assert encoder("Q4_K_M", "workbench", cuda=False) == "workbench"
    assert encoder("Q4_K_M", "llamacpp", cuda=True) == "llamacpp"
    assert encoder("BF16", cuda=True) == "llamacpp", "the base itself"


def test_names_tell_an_encoder_that_was_asked_for() -> None:
    assert method.default_name(method.Options("Q4_K_M", imatrix=True)) == "gguf-Q4_K_M-imatrix"
    asked = method.Options("Q4_K_M", imatrix=True, encoder="workbench")
    assert method.default_name(asked) == "gguf-Q4_K_M-imatrix-workbench"


def test_a_gpu_whose_blocks_differ_is_found_out() -> None:
    """The comparison that every file is made with, on blocks of which one bit was changed."""
    torch, np = pytest.importorskip("torch"), pytest.importorskip("numpy")
    pytest.importorskip("llama_cpp")
    from workbench_kernels.encoders.encode import encode

    from workbench.worker.ggml.encode import same_as_llama_cpp

    chance = torch.Generator().manual_seed(0)
    weight, importance = torch.randn(4, 512, generator=chance), torch.rand(512, generator=chance)
    made = encode("Q4_K", weight, importance).numpy()
    assert same_as_llama_cpp("Q4_K", weight.numpy(), importance.numpy(), made) == 4
    assert same_as_llama_cpp("Q4_K", weight.numpy(), np.ones(512, np.float32), made) == 0
    made[2, 100] ^= 1
    assert same_as_llama_cpp("Q4_K", weight.numpy(), importance.numpy(), made) == 3


# --- the real thing -----------------------------------------------------------------------------


def converted(base: Path, dtype: str, call: Any) -> Path:
    out = base.with_suffix(".gguf")
    payload = {"base": str(base), "out": str(out), "dtype": dtype, "name": base.name}
    call("workbench.worker.methods.gguf:convert", payload)
    return out


def matrix_for(source: Path) -> Path:
    """Importances of all sizes, and some of nothing, for every matrix of the layers."""
    import gguf
    import numpy as np

    from workbench.worker.ggml import imatrix

    chance = np.random.default_rng(0)
    means = {}
    for tensor in gguf.GGUFReader(str(source)).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            size = int(tensor.shape[0]) * (int(tensor.shape[2]) if len(tensor.shape) > 2 else 1)
            found = chance.uniform(0.0, 1.0, size) ** 6
            means[tensor.name] = np.where(found < 1e-4, 0, found).astype(np.float32)
    out = source.with_suffix(".imatrix.gguf")
    imatrix.write(out, means, tokens=1024, windows=2, window=512, dataset="random numbers")
    return out


def assert_pairs_are_equal(made: list[dict[str, Any]]) -> dict[tuple[str, bool], dict[str, str]]:
    """Both workers' answers, and their files byte for byte. Types of tensors by (mixture, imatrix)."""
    import gguf
    import numpy as np

    files, types = set(), {}
    for pair in made:
        where = pair["type"], pair["imatrix"]
        theirs, ours = pair["llamacpp"], pair["workbench"]
        assert theirs.pop("provenance") == {"encoder": {"name": "llamacpp", "device": "cpu"}}
        assert theirs.pop("notes") == []
        by, (note,) = ours.pop("provenance")["encoder"], ours.pop("notes")
        assert f"{by['rows_equal']} of {by['rows_checked']} rows compared with llama.cpp's are the same" in note
        assert by["name"] == "workbench" and by["rows_equal"] == by["rows_checked"] >= 8, by
        paths = Path(theirs.pop("path")), Path(ours.pop("path"))
        assert theirs == ours, where
        tensors = [gguf.GGUFReader(str(path)).tensors for path in paths]
        for one, other in zip(*tensors, strict=True):
            assert np.array_equal(one.data, other.data), (*where, one.name)
        data = paths[1].read_bytes()
        assert paths[0].read_bytes() == data, f"{where}: metadata"
        files.add(data)
        types[where] = ours["tensor_types"]
        if "logits" in pair:
            assert pair["logits"]["status"] == 0 and None not in pair["logits"]["logits"]
        for path in paths:
            path.unlink()
    # Q8_0 takes no importances.
    assert len(files) == len(made) - sum(pair["type"] == "Q8_0" and pair["imatrix"] for pair in made)
    return types


@pytest.mark.slow
def test_files_are_llama_cpps_with_every_mixture(
    tmp_path: Path, make_llama: Any, make_tokenizer: Any, call: Any
) -> None:
    """Eight layers, so that the rules which look at depth have their say."""
    base = make_tokenizer(make_llama(tmp_path / "Whole", hidden=256, intermediate=256, layers=8))
    source = converted(base, "float32", call)
    payload = {"source": str(source), "matrix": str(matrix_for(source)), "folder": str(tmp_path), "ids": IDS}
    types = assert_pairs_are_equal(call("tests.worker.ggml.encode_pairs:both", {**payload, "mixtures": MIXTURES}))
    assert {kind for each in types.values() for kind in each.values()} == {
        "F32",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "Q8_0",
        "Q4_0",
        "Q4_1",
    }
    assert "Q4_1" in types["Q4_0", True].values() and "Q4_1" not in types["Q4_0", False].values()


@pytest.mark.slow
def test_fallbacks_of_a_bfloat16_base_are_llama_cpps(
    tmp_path: Path, make_llama: Any, make_tokenizer: Any, call: Any
) -> None:
    """Rows of 192 hold no super-block, rows of 272 no block at all."""
    base = make_tokenizer(make_llama(tmp_path / "Odd", hidden=192, intermediate=272))
    source = converted(base, "bfloat16", call)
    payload = {"source": str(source), "matrix": str(matrix_for(source)), "folder": str(tmp_path), "ids": IDS}
    types = assert_pairs_are_equal(call("tests.worker.ggml.encode_pairs:both", {**payload, "mixtures": ["Q3_K_M"]}))
    # Q3_K, Q4_K, Q5_K and Q6_K, each as something else.
    assert set(types["Q3_K_M", True].values()) == {"F32", "F16", "Q4_0", "Q5_0", "Q5_1", "Q8_0"}


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    """A file of float16 with three matrices of four experts and a vocabulary of bytes that are no text."""
    import gguf
    import numpy as np

    chance = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "experts.gguf", "llama")
    for key, value in {
        "context_length": 64,
        "embedding_length": 256,
        "block_count": 1,
        "feed_forward_length": 256,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 64,
        "expert_count": 4,
        "expert_used_count": 2,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_token_list([b"a", b"\xff\xfe", b"b"])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_array("numbers", [1.5, 2.5])
    writer.add_file_type(1)
    shapes = {"token_embd": (320, 256), "blk.0.attn_q": (256, 256), "blk.0.ffn_gate_inp": (4, 256)}
    shapes |= {f"blk.0.ffn_{name}_exps": (4, 256, 256) for name in ("down", "gate", "up")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", chance.normal(0, 0.1, shape).astype(np.float16))
    writer.add_tensor("output_norm.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "experts.gguf"


@pytest.mark.slow
def test_each_expert_has_importances_of_its_own(experts: Path, tmp_path: Path, call: Any) -> None:
    payload = {"source": str(experts), "matrix": str(matrix_for(experts)), "folder": str(tmp_path)}
    types = assert_pairs_are_equal(
        call("tests.worker.ggml.encode_pairs:both", {**payload, "mixtures": ["Q4_K_S", "Q2_K"]})
    )
    assert types["Q2_K", True]["blk.0.ffn_gate_exps.weight"] == "Q2_K"
    assert types["Q2_K", True]["blk.0.ffn_gate_inp.weight"] == "F16"


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["llamacpp", "workbench"])
def test_a_matrix_of_another_model_is_refused(experts: Path, tmp_path: Path, call: Any, encoder: str) -> None:
    import numpy as np

    from workbench.worker.ggml import imatrix

    matrix, out = tmp_path / "other.gguf", tmp_path / "out.gguf"
    means = {"blk.0.attn_q.weight": np.ones(128, np.float32)}
    imatrix.write(matrix, means, tokens=1, windows=1, window=1, dataset="none")
    payload = {"source": str(experts), "out": str(out), "imatrix": str(matrix), "threads": 1, "encoder": encoder}
    with pytest.raises(UserError, match="imatrix size 128 is different from tensor size 256 for blk.0.attn_q.weight"):
        call("workbench.worker.methods.gguf:quantize", {**payload, "type": "Q4_K_S"})
    means = {"blk.0.ffn_up_exps.weight": np.ones(4 * 256, np.float32)}
    imatrix.write(matrix, means, tokens=1, windows=1, window=1, dataset="none")
    with pytest.raises(UserError, match="requires an imatrix|Missing importance matrix"):
        call("workbench.worker.methods.gguf:quantize", {**payload, "type": "Q2_K_S"})
    assert not out.exists()


@pytest.mark.slow
def test_weights_that_have_no_blocks_are_named(experts: Path, tmp_path: Path, call: Any) -> None:
    import gguf
    import numpy as np

    for tensor in gguf.GGUFReader(str(experts), "r+").tensors:
        if tensor.name == "blk.0.attn_q.weight":
            tensor.data[3, 5] = np.nan
    out = tmp_path / "out.gguf"
    payload = {"source": str(experts), "out": str(out), "imatrix": None, "threads": 1, "encoder": "workbench"}
    with pytest.raises(UserError, match="blk.0.attn_q.weight cannot be made Q4_K: weight holds NaN or infinity"):
        call("workbench.worker.methods.gguf:quantize", {**payload, "type": "Q4_K_S"})
    assert not out.exists()


@pytest.mark.slow
def test_a_row_says_which_encoder_made_its_file(tmp_path: Path, make_llama: Any, make_tokenizer: Any) -> None:
    make_tokenizer(make_llama(tmp_path / "Whole", hidden=256, intermediate=256))
    recipe = {
        "base": {"path": str(tmp_path / "Whole")},
        "variants": [
            {"gguf": {"type": "Q4_K_M", "encoder": "workbench"}},
            {"gguf": {"type": "Q4_K_M", "encoder": "llamacpp"}},
            {"gguf": "Q8_0"},
        ],
        "backends": ["llamacpp"],
        "workload": {"prompt_tokens": 8, "new_tokens": 4, "repeats": 1},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    home = tmp_path / "home"
    answer = subprocess.run(
        [sys.executable, "-m", "workbench.cli", "run", "r.yaml", "--results", str(tmp_path / "rows")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "WORKBENCH_HOME": str(home), "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
    )
    assert answer.returncode == 0, answer.stderr
    assert "gguf-Q4_K_M-workbench: blocks made by workbench's encoders on" in answer.stderr + answer.stdout
    (rows,) = (tmp_path / "rows").rglob("*.jsonl")
    made = {}
    for line in rows.read_text().splitlines():
        artifact = json.loads(line)["artifact"]
        made[artifact["variant"]] = artifact["provenance"].get("encoder", {}).get("name"), artifact["digest"]
    assert {name: encoder for name, (encoder, _) in made.items() if name != "base"} == {
        "gguf-Q4_K_M-workbench": "workbench",
        "gguf-Q4_K_M-llamacpp": "llamacpp",
        "gguf-Q8_0": made["gguf-Q8_0"][0],
    }
    assert made["gguf-Q8_0"][0] in ("llamacpp", "workbench"), "whichever this machine has"
    assert len({digest for _, digest in made.values()}) == 4
    both = (home / "artifacts" / made[f"gguf-Q4_K_M-{who}"][1] for who in ("workbench", "llamacpp"))
    ours, theirs = (next(folder.glob("*.gguf")).read_bytes() for folder in both)
    assert ours == theirs


@pytest.mark.slow
def test_what_holds_other_types_is_left_to_llama_cpp(experts: Path, tmp_path: Path, call: Any) -> None:
    """A recipe cannot ask for it; a worker can."""
    out = tmp_path / "out.gguf"
    payload = {"source": str(experts), "out": str(out), "type": "IQ4_XS", "imatrix": None, "threads": 1}
    with pytest.raises(UserError, match="workbench did not make IQ4_XS: it has no encoder for IQ4_XS. Leave `encoder`"):
        call("workbench.worker.methods.gguf:quantize", {**payload, "encoder": "workbench"})
    assert not out.exists()
    made = call("workbench.worker.methods.gguf:quantize", {**payload, "encoder": "auto"})
    assert made["provenance"]["encoder"]["name"] == "llamacpp" and "IQ4_XS" in made["tensor_types"].values()
