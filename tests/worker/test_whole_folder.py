"""A quantized language model back in its multimodal model: what readers make of the folder, of text and of images."""

from __future__ import annotations

import importlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.places import ROOT
from tests.worker.base.bases import run
from tests.worker.small_models import pass_request, relative, write_model, write_tokens
from tests.worker.unpacking import dequantize_awq, dequantize_gptq
from tests.worker.wrappers import write_whole
from workbench.errors import UserError
from workbench.machine import isolate
from workbench.worker import whole_folder
from workbench.worker.backends import BACKENDS
from workbench.worker.base import text_part
from workbench.worker.base.checkpoint import checked_weights
from workbench.worker.calibration import run as calibrate

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2}
"""As vLLM's kernels on a CPU want them."""
IMAGE, START = 158, 157
"""Ids of an image's places, and of where Qwen's begin."""
SIGHT: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {"query_pre_attn_scalar": 32},
        "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"patch_size": 14, "image_size": 56},
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
    },
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}},
        "vision_config": {"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2}
        | {"out_hidden_size": 128, "fullatt_block_indexes": [0]},
        "image_token_id": IMAGE,
        "vision_start_token_id": START,
    },
}
METHODS = ("awq", "gptq")
PARTS = ("qweight", "qzeros", "scales", "g_idx")
NEAR = 0.06
"""Relative difference of logits that the kernels' bfloat16 makes in such models (`test_architectures.py`)."""


def request_of(source: Path, base: Path, whole: str) -> dict[str, Any]:
    return {"base": str(base), "source": str(source), "out": f"{source}-whole", "options": {}, "whole": whole}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By kind: the whole model, its text model, and AWQ and GPTQ of that, carried back."""
    folder = tmp_path_factory.mktemp("whole")
    for kind, sizes in SIGHT.items():
        more = {key: value for key, value in sizes.items() if key != "text_config"}
        write_whole(folder / kind / "whole", kind, WIDE | sizes["text_config"], **more)
        (folder / kind / "whole" / "preprocessor_config.json").write_text('{"do_resize": true}')
        made = run({"path": str(folder / kind / "whole")}, folder / kind / "text")
        assert made["whole"] == str(folder / kind / "whole")
        work = folder / kind / "work"
        work.mkdir()
        variants = {method: (method, {"group_size": 32}) for method in METHODS}
        tokens = write_tokens(work / "tokens.json", [40] * 24, vocabulary=150)
        asked = pass_request(Path(made["path"]), work, variants, imatrix_out=None, tokens=tokens)
        assert calibrate.run(asked, lambda *_: None)["refused"] == {}
        for method in METHODS:
            whole_folder.carry(request_of(work / method, Path(made["path"]), made["whole"]), lambda *_: None)
    return folder


def read(folder: Path) -> dict[str, Any]:
    return {name: tensor.read(name) for name, tensor in checked_weights(folder).items()}


def meant(folder: Path, kind: str, method: str) -> Any:
    """The whole model with what its packed tensors mean in place, float32."""
    written = read(folder / kind / "work" / f"{method}-whole")
    state = {name: tensor.float() for name, tensor in written.items() if name.rpartition(".")[2] not in PARTS}
    for name in written:
        stem = name.removesuffix(".qweight")
        if stem != name:
            parts = {part: written[f"{stem}.{part}"] for part in PARTS if f"{stem}.{part}" in written}
            state[f"{stem}.weight"] = dequantize_awq(parts) if method == "awq" else dequantize_gptq(parts, 4)
    plain = folder / kind / f"{method}-meant"
    plain.mkdir(exist_ok=True)
    (plain / "config.json").write_bytes((folder / kind / "whole" / "config.json").read_bytes())
    from safetensors.torch import save_file

    save_file(state, plain / "model.safetensors", {"format": "pt"})
    return loaded(plain)


def loaded(folder: Path) -> Any:
    kind: Any = transformers.AutoModelForImageTextToText
    model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model.eval()


def inputs(kind: str, seed: int = 0) -> dict[str, Any]:
    """Text around an image of random pixels, as the processors of these models hand it over."""
    chance = torch.Generator().manual_seed(seed)
    before, after = list(range(3, 20)), list(range(40, 70))
    ids = torch.tensor([[*before, START, *[IMAGE] * 4, *after]])
    image = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "gemma3":
        pixels = torch.rand(1, 3, 56, 56, generator=chance) * 2 - 1
        return image | {"pixel_values": pixels, "token_type_ids": (ids == IMAGE).long()}
    pixels = torch.rand(16, 3 * 2 * 14 * 14, generator=chance) * 2 - 1
    more = {"image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (ids == IMAGE).int()}
    return image | {"pixel_values": pixels} | more


@pytest.mark.parametrize("kind", SIGHT)
@pytest.mark.parametrize("method", METHODS)
def test_names_and_other_parts_are_as_they_were(method: str, kind: str, folder: Path) -> None:
    whole, source = folder / kind / "whole", folder / kind / "work" / method
    before, packed, after = read(whole), read(source), read(source.with_name(f"{method}-whole"))
    taken = text_part.inside(checked_weights(whole))
    for name, tensor in after.items():
        if name in before and name not in taken.values():
            assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype
    stems = {name.removesuffix(".qweight") for name in packed if name.endswith(".qweight")}
    assert len(stems) == 14
    gone = {taken[f"{stem}.weight"] for stem in stems}
    assert before.keys() - after.keys() == gone
    ends = [each for each in PARTS if each != "g_idx" or method == "gptq"]
    new = {f"{name.removesuffix('.weight')}.{end}" for name in gone for end in ends}
    assert after.keys() - before.keys() == new
    for stem in stems:
        for end in ends:
            assert torch.equal(
                after[f"{taken[f'{stem}.weight'].removesuffix('.weight')}.{end}"], packed[f"{stem}.{end}"]
            )
    config = json.loads((source.with_name(f"{method}-whole") / "config.json").read_text())
    was = json.loads((whole / "config.json").read_text())
    assert all(config[key] == was[key] for key in ("architectures", "text_config", "vision_config"))
    assert (source.with_name(f"{method}-whole") / "preprocessor_config.json").is_file()


@pytest.mark.slow
def test_transformers_sees_images_still(folder: Path) -> None:
    pytest.importorskip("gptqmodel")
    from safetensors.torch import save_file

    wholes = {f"{kind}/{method}": folder / kind / "work" / f"{method}-whole" for kind in SIGHT for method in METHODS}
    for kind in SIGHT:
        save_file(inputs(kind), folder / f"{kind}.safetensors")
    payload = {
        "models": {name: str(path) for name, path in wholes.items()},
        "inputs": {name: str(folder / f"{name.partition('/')[0]}.safetensors") for name in wholes},
        "out": str(folder / "seen.safetensors"),
    }
    environment = {"PYTHONPATH": str(ROOT), "GPTQMODEL_CPU_WORKERS": "4", "HF_HUB_OFFLINE": "1"}
    reply = isolate.call(
        "tests.worker.wrappers:seen", payload, workdir=folder / "seen", time_limit_s=300, environment=environment
    )
    assert reply.error is None, reply.log
    found = load_file(folder / "seen.safetensors")
    for name in wholes:
        kind, _, method = name.partition("/")
        with torch.inference_mode():
            model = meant(folder, kind, method)
            wanted, other = (model(**inputs(kind, seed)).logits[0] for seed in (0, 1))
            base = loaded(folder / kind / "whole")(**inputs(kind)).logits[0]
        near, blind, far = (relative(found[name], each) for each in (wanted, other, base))
        print(f"{name}: {near:.4f} from its own weights, {far:.4f} from the base, {blind:.4f} of another image")
        assert near < NEAR
        assert far > 2 * NEAR and blind > 2 * NEAR, "or the bound above says nothing"


@pytest.mark.slow
def test_vllm_loads_its_language_model_or_says_what_it_lacks(folder: Path) -> None:
    pytest.importorskip("vllm")
    ids = [7 * i % 150 + 3 for i in range(48)]
    models = {
        f"{kind}/{method}": {"path": str(folder / kind / "work" / f"{method}-whole"), "format": method}
        | {"options": {"enforce_eager": True}}
        for kind in SIGHT
        for method in METHODS
    }
    environment = importlib.import_module(BACKENDS["vllm"]).ENVIRONMENT
    reply = isolate.call(
        "tests.worker.engine_logits:collect",
        {"backend": "vllm", "models": models, "ids": ids, "out": str(folder / "vllm.safetensors")},
        workdir=folder / "vllm",
        time_limit_s=400,
        environment={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"},
    )
    assert reply.error is None, reply.log
    if find_spec("torchvision") is None:
        said = "torchvision, without which vLLM imports no multimodal model"
        assert reply.value.keys() == models.keys() and all(said in each for each in reply.value.values())
        return
    assert reply.value == {}
    found = load_file(folder / "vllm.safetensors")
    for name in models:
        kind, _, method = name.partition("/")
        with torch.inference_mode():
            given = torch.tensor([ids])
            wanted = meant(folder, kind, method)(input_ids=given).logits[0, :-1]
            base = loaded(folder / kind / "whole")(input_ids=given).logits[0, :-1]
        logits = found[name][:, : wanted.shape[1]]
        near, far = relative(logits, wanted), relative(logits, base)
        print(f"{name}: {near:.4f} from its own weights, {far:.4f} from the base")
        assert near < NEAR and far > 2 * NEAR


def test_what_there_is_no_whole_model_for(folder: Path, tmp_path: Path) -> None:
    source = folder / "gemma3" / "work" / "awq"
    request = request_of(source, tmp_path, "") | {"out": str(tmp_path / "out")}
    with pytest.raises(UserError, match="the base is none, or was stored in 8 or 64 bits or rewritten: give a multi"):
        whole_folder.carry(request, lambda *_: None)
    with pytest.raises(UserError, match=r"gone, the multimodal model that the base was taken from, is gone: fetch"):
        whole_folder.carry(request | {"whole": str(tmp_path / "gone")}, lambda *_: None)
    with pytest.raises(UserError, match=r"has no tensor 'model\.layers\.0\.mlp\.experts\.3\.up_proj\.weight'"):
        whole_folder.back("model.layers.0.mlp.experts.3.up_proj.qweight", {"model.norm.weight": "x"})
    assert not (tmp_path / "out").exists()
    assert run({"path": str(write_model(tmp_path / "text", "llama"))}, tmp_path / "made")["whole"] == ""
