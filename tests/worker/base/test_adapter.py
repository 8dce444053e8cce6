"""LoRA adapters merged into a base: what peft itself makes of both, and what is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fake_hub import hub
from tests.places import ROOT
from tests.worker.base.bases import logits, refusal, run
from workbench.recipe.load import parse
from workbench.worker.base.prepare import identify

pytest.importorskip("peft")
torch = pytest.importorskip("torch")
IDS = [[7 * i % 250 + 3 for i in range(24)]]


def train(base: Path, out: Path, **options: Any) -> Path:
    """An adapter with random matrices, saved by peft."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings | options)).save_pretrained(str(out))
    return out


def in_type(model: Path, dtype: Any) -> Path:
    """Have a model's file of weights in one type."""
    from safetensors.torch import load_file, save_file

    file = model / "model.safetensors"
    save_file({name: each.to(dtype) for name, each in load_file(file).items()}, file, metadata={"format": "pt"})
    return file


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    return train(model, tmp_path / "lora", alpha_pattern={"layers.1.mlp.down_proj": 3}, use_rslora=True)


def test_it_computes_what_the_base_and_the_adapter_do(model: Path, adapter: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    in_type(model, torch.float32)
    made = run({"path": str(model), "adapter": str(adapter)}, tmp_path / "o")
    beside: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), str(adapter)
    )
    with torch.no_grad():
        expected = beside(torch.arange(3, 99)[None]).logits[0].double()
    torch.testing.assert_close(logits(made["path"]), expected, rtol=1e-4, atol=1e-4)
    assert (logits(model) - expected).abs().max() > 0.1, "it changes something"
    before, after = load_file(model / "model.safetensors"), dict[str, Any]()
    for file in Path(made["path"]).glob("*.safetensors"):
        after |= load_file(file)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"model.layers.{i}.{each}.weight" for i in range(2) for each in ("self_attn.q_proj", "mlp.down_proj")
    }
    (said,) = made["warnings"]
    assert said.startswith("lora is merged into 4 matrices; it says that it is an adapter of ")
    names = {path.name for path in Path(made["path"]).iterdir()}
    assert "tokenizer.json" in names and not names & {"adapter_config.json", ".plain"}


def test_another_adapter_is_another_base(model: Path, adapter: Path, tmp_path: Path) -> None:
    source = {"path": str(model), "adapter": str(adapter)}
    plain, with_it = (run(each, tmp_path / str(i)) for i, each in enumerate(({"path": str(model)}, source)))
    assert plain["digest"] != with_it["digest"]
    assert identify(source) != identify({"path": str(model)})
    other = train(model, tmp_path / "lora2", r=2)
    assert run({**source, "adapter": str(other)}, tmp_path / "2")["digest"] not in (plain["digest"], with_it["digest"])


def test_a_bfloat16_base_is_rounded_once(model: Path, adapter: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    file = in_type(model, torch.bfloat16)
    made = run({"path": str(model), "adapter": str(adapter)}, tmp_path / "o")
    assert made["dtype"] == "bfloat16"
    name = "model.layers.0.self_attn.q_proj"
    parts = load_file(adapter / "adapter_model.safetensors")
    a, b = (parts[f"base_model.model.{name}.lora_{each}.weight"] for each in "AB")
    meant = (load_file(file)[f"{name}.weight"].float() + b @ a * (8 / 4**0.5)).bfloat16()
    after: dict[str, Any] = {}
    for shard in Path(made["path"]).glob("*.safetensors"):
        after |= load_file(shard)
    assert (after[f"{name}.weight"] != meant).float().mean() < 0.01, (
        "but where the sum lies between two, to the last bit"
    )


@pytest.mark.slow
def test_from_the_hub(model: Path, adapter: Path, tmp_path: Path) -> None:
    from workbench.machine import isolate

    here = run({"path": str(model), "adapter": str(adapter)}, tmp_path / "here")
    with hub({"someone/lora": adapter}) as (endpoint, _):
        environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        reply = isolate.call(
            "workbench.worker.base.prepare:prepare",
            {"source": {"path": str(model), "adapter": "someone/lora"}, "out": str(tmp_path / "there")},
            workdir=tmp_path / "work",
            environment=environment | {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)},
        )
    assert reply.error is None, reply.log
    assert reply.value["digest"] == here["digest"]


def configured(**entries: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))

    return change


def reshaped(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        file = folder / "adapter_model.safetensors"
        save_file({key: each.contiguous() for key, each in change(load_file(file)).items()}, file)

    return write


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (configured(use_dora=True), "lora is DoRA, which also scales the base's rows, which is not merged here"),
        (configured(bias="all"), "lora changes biases, which is not merged here"),
        (configured(modules_to_save=["lm_head"]), "brings whole modules of its own"),
        (configured(peft_type="IA3"), "an adapter of the kind IA3, and only LORA is merged"),
        (
            reshaped(lambda t: {k: v[..., :8] if "lora_A" in k else v for k, v in t.items()}),
            "is 48 x 8, the base's 48 x 96",
        ),
        (
            reshaped(lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()}),
            "2 of its 4 modules are not in",
        ),
        (
            reshaped(lambda t: {k: v for k, v in t.items() if "layers.1" not in k or "lora_A" in k}),
            "one of its two matrices",
        ),
        (reshaped(lambda t: t | {"base_model.model.lm_head.weight": torch.ones(2, 2)}), "which is no matrix of LoRA"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (
            lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
            "holds only pickled weights",
        ),
        (lambda folder: (folder / "adapter_config.json").unlink(), "is no adapter: it has no adapter_config.json"),
    ],
)
def test_what_is_refused(change: Callable[[Path], Any], why: str, model: Path, adapter: Path, tmp_path: Path) -> None:
    change(adapter)
    assert why in refusal({"path": str(model), "adapter": str(adapter)}, tmp_path / "o")


def test_where_a_recipe_finds_it(model: Path, adapter: Path, tmp_path: Path) -> None:
    def source(**more: Any) -> Any:
        recipe = parse(
            {"base": {"path": "base", **more}, "variants": ["awq"], "backends": ["vllm"]} | TEXT, tmp_path / "r.yaml"
        )
        return recipe.base.source(tmp_path)

    assert source(adapter="lora")["adapter"] == str(tmp_path / "lora")
    assert source(adapter="someone/lora")["adapter"] == "someone/lora"
    shutil.copytree(adapter, tmp_path / "someone" / "lora")
    assert source(adapter="someone/lora")["adapter"] == str(tmp_path / "someone" / "lora")
    assert "adapter" not in source()


TEXT = {"calibration": {"source": {"text": "x"}}}
