"""Checkpoints that others packed: compared with the base tensor by tensor, linked, refused in one line, planned.

Measured by real engines: `tests/cases/test_found.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fake_hub import SHA, hub
from tests.worker.others import configure, pack_as_autoawq
from workbench.errors import UserError
from workbench.machine import isolate
from workbench.plan.tensors import shape_of
from workbench.recipe.load import parse
from workbench.records import to_json
from workbench.worker.base.headers import read
from workbench.worker.methods.checkpoint import adopt, headers, scheme

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def packed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model as AutoAWQ would have it, groups of 32."""
    return pack_as_autoawq(tiny_llama, tmp_path_factory.mktemp("packed") / "X-AWQ", 32)


@pytest.fixture
def spoiled(packed: Path, tmp_path: Path) -> Path:
    """A copy, to be spoiled."""
    return Path(shutil.copytree(packed, tmp_path / "X-AWQ"))


def silent(done: float, total: float, text: str) -> None:
    assert 0 <= done <= total and text


def options(path: Path | str, hub: str = "") -> dict[str, str]:
    return {"hub": hub, "revision": "", "path": str(path)}


def found(base: Path, folder: Path, out: Path) -> Any:
    return adopt({"base": str(base), "out": str(out), "options": options(folder)}, silent)


def refusal(base: Path, folder: Path, out: Path) -> str:
    with pytest.raises(UserError) as caught:
        found(base, folder, out)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of a folder."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_checkpoint_is_linked_and_told_as_it_is(tiny_llama: Path, packed: Path, tmp_path: Path) -> None:
    made = found(tiny_llama, packed, tmp_path / "out")
    assert made["format"] == "awq" and made["provenance"]["limits"] == {}
    types = made["tensor_types"]
    assert types["model.layers.1.mlp.down_proj.weight"] == "I4-g32" and types["model.norm.weight"] == "F16"
    assert len(types) == 21 and not any("qweight" in name for name in types)
    links = {link.name for link in (tmp_path / "out").iterdir() if link.is_symlink()}
    assert links == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert made["provenance"]["options"]["group_size"] == 32
    assert made["provenance"]["found"]["header"]["quant_method"] == "awq"
    assert len(made["provenance"]["found"]["sha256"]["model.safetensors"]) == 64
    (told,) = made["warnings"]
    assert told.endswith("measured as it is: X-AWQ; by a packer that it does not name")


def halve(name: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name][: len(tensors[name]) // 2].contiguous()

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (halve("model.embed_tokens.weight"), "model.embed_tokens.weight is 177 x 64, in the base 354 x 64"),
        (
            halve("model.layers.0.mlp.up_proj.qweight"),
            "model.layers.0.mlp.up_proj.weight is 128 x 32, in the base 128 x 64",
        ),
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.qweight"), "lacks 1 of the base's tensors"),
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.scales"), "up_proj.scales is missing"),
    ],
)
def test_tensors_that_are_not_the_bases(change: Any, why: str, tiny_llama: Path, spoiled: Path) -> None:
    changed(spoiled, change)
    assert why in refusal(tiny_llama, spoiled, spoiled.with_name("out"))


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "of the architecture Qwen2ForCausalLM, the base of LlamaForCausalLM"),
        ({"vocab_size": 512}, "has a vocabulary of 512 tokens, the base of 354"),
        ({"num_hidden_layers": 3}, "has 3 decoder layers, the base 2"),
        ({"num_attention_heads": 2}, "not of the base's shape: its `num_attention_heads` is 2, the base's 4"),
        ({"quantization_config": None}, "is no quantized checkpoint: its config.json has no `quantization_config`"),
        ({"quantization_config": {"quant_method": "awq", "version": "gemv"}}, r"is packed as awq (gemv)"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "names no `config_groups` with weights"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "is packed as aqlm (gptq): what is read here is awq"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 5, "group_size": 32}},
            "has bits 5 and group_size 32",
        ),
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "`trust_remote_code: true` under `base`"),
    ],
)
def test_a_configuration_that_is_not_the_bases(
    entries: dict[str, Any], why: str, tiny_llama: Path, spoiled: Path
) -> None:
    configure(spoiled, **entries)
    assert why in refusal(tiny_llama, spoiled, spoiled.with_name("out"))


def test_what_is_no_checkpoint_or_not_whole(tiny_llama: Path, spoiled: Path, tmp_path: Path) -> None:
    weights = spoiled / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-500])
    assert "is truncated" in refusal(tiny_llama, spoiled, tmp_path / "out")
    weights.unlink()
    assert "has no *.safetensors" in refusal(tiny_llama, spoiled, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refusal(tiny_llama, tmp_path / "empty", tmp_path / "out")
    assert "does not exist. Did you mean 'X-AWQ'?" in refusal(tiny_llama, tmp_path / "X-AVQ", tmp_path / "out")
    unpacked = Path(shutil.copytree(tiny_llama, tmp_path / "unpacked"))
    configure(unpacked, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 32})
    assert "none of its tensors ends in `.qweight`" in refusal(tiny_llama, unpacked, tmp_path / "out")


def test_tokenizers_templates_and_ropes(tiny_llama: Path, spoiled: Path, tmp_path: Path) -> None:
    file = spoiled / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    names = {token: name for name, token in vocabulary.items()}
    vocabulary[names[300]], vocabulary[names[301]] = 301, 300
    file.write_text(json.dumps(content))
    configure(spoiled, rope_theta=5e5)
    (spoiled / "chat_template.jinja").write_text("{{ messages }}")
    assert found(tiny_llama, spoiled, tmp_path / "out")["warnings"][1:] == [
        "its `rope_theta` is 500000.0, the base's 10000.0",
        f"2 of 354 tokens are not the base's (id 300: {names[300]!r} in the base, {names[301]!r} here)",
        "it has a chat template, and the base has none",
    ]
    content["model"]["vocab"] = {name: (token + 1) % 354 for name, token in vocabulary.items()}
    file.write_text(json.dumps(content))
    assert "has another tokenizer than the base: 350 of 354" in refusal(tiny_llama, spoiled, tmp_path / "other")


def test_what_engines_cannot_load_is_told(packed: Path) -> None:
    said = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False, "desc_act": True}
    how = scheme({"quantization_config": said}, "X")
    assert set(how.limits) == {"vllm", "llamacpp", "mlx"} and how.options.sym is False
    assert scheme({"quantization_config": {"quant_method": "awq", "w_bit": 4, "q_group_size": 64}}, "X").kind == "Q4_1"


def test_names_in_a_recipe() -> None:
    entries = [{"checkpoint": "dir/X-AWQ"}, {"checkpoint": {"hub": ["someone/X-AWQ", "other/X-AWQ"]}}]
    recipe = parse({"base": {"path": "base"}, "variants": entries}, Path("r.yaml"))
    assert [each.name for each in recipe.variants[1:]] == ["X-AWQ", "someone-X-AWQ", "other-X-AWQ"]
    for entry, why in (("X.gguf", "a GGUF file is a `file`"), ({"hub": "x"}, "write `owner/name`")):
        with pytest.raises(UserError, match=why):
            parse({"base": {"path": "base"}, "variants": [{"checkpoint": entry}]}, Path("r.yaml"))


def test_a_plan_and_the_hub(tiny_llama: Path, packed: Path, tmp_path: Path) -> None:
    """Headers by range requests; then the repository itself, in the hub's own cache, at its commit."""
    shape = shape_of(read({"source": {"path": str(tiny_llama)}}, silent), "here")
    own: Any = headers({"options": options(packed), "shape": to_json(shape)}, silent)
    size = sum(each.numel() * each.element_size() for each in _tensors(packed))
    assert own["awq"]["disk_bytes"] == size and own["gguf"]["types"]["blk.0.attn_q.weight"] == "Q4_1"
    with hub({"someone/X-AWQ": packed}) as (endpoint, asked):
        environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}

        def call(function: str, payload: dict[str, Any]) -> isolate.Reply:
            where = {"workdir": tmp_path / "work", "environment": environment | {"HF_HUB_DISABLE_XET": "1"}}
            return isolate.call(f"workbench.worker.methods.checkpoint:{function}", payload, **where)

        planned = call("headers", {"options": options("", "someone/X-AWQ"), "shape": to_json(shape)})
        assert planned.value == own, planned.error
        assert [line for line in asked if "GET model.safetensors" in line] == ["GET model.safetensors 0-100000"]
        place = {"base": str(tiny_llama), "out": str(tmp_path / "out")}
        reply = call("adopt", {**place, "options": options("", "someone/X-AWQ")})
        assert reply.error is None, reply.log
        assert reply.value["provenance"]["found"]["revision"] == SHA
        assert f"measured as it is: someone/X-AWQ at {SHA[:12]}; by" in reply.value["warnings"][0]
        gated = call("adopt", {**place, "options": options("", "owner/gated")})
        assert gated.user_error and "is gated" in (gated.error or "")
        absent = call("headers", {"options": options("", "owner/absent"), "shape": to_json(shape)})
        assert "does not exist, or is private" in absent.value["awq"]["refused"]


def _tensors(folder: Path) -> list[Any]:
    from safetensors.torch import load_file

    return list(load_file(folder / "model.safetensors").values())
