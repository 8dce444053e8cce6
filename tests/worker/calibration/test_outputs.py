"""Variants whose objective is the output: what is known of outputs, what it brings, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.worker.small_models import dequantized, pass_request, write_model, write_tokens
from workbench.errors import UserError
from workbench.worker.calibration import outputs
from workbench.worker.calibration import run as calibrate
from workbench.worker.calibration.ends import Head
from workbench.worker.calibration.weights import open_weights
from workbench.worker.layers import Group, Structure

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

OUTPUT = {"group_size": 32, "objective": "output"}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("gptq", OUTPUT),
    "awq": ("awq", OUTPUT),
    "compensated": ("awq", OUTPUT | {"rounding": "compensated"}),
}


def quiet(done: float, total: float, text: str) -> None:
    assert 0 <= done <= total


def test_sums_are_means_over_tokens_and_half_of_the_inputs_counts_by_gradients() -> None:
    chance = torch.Generator().manual_seed(0)
    x, q, k = (torch.randn(40, n, generator=chance) for n in (12, 10, 6))
    q[20:] *= 3
    group = Group(("q", "k"), None)
    sums = outputs._Sums(Structure((group,)), torch.device("cpu"))
    for piece in (slice(0, 16), slice(16, 40)):
        sums.heard("q", x[piece], q[piece], piece)
        sums.heard("k", x[piece], k[piece], piece)
    grams, known = sums.means()
    gram = x.t() @ x / 40
    for name, gradient in (("q", q), ("k", k)):
        minded = (x * gradient.square().mean(1, keepdim=True)).t() @ x
        minded *= gram.trace() / minded.trace()
        assert torch.allclose(known.inputs[name], (gram + minded) / 2, atol=1e-5)
        assert torch.allclose(known.gradients[name], (gradient.t() @ gradient / 40)[None], atol=1e-5)
    assert torch.allclose(grams["q"], (known.inputs["q"] + known.inputs["k"]) / 2)


def test_outputs_beyond_a_run_have_a_matrix_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "RUN", 4)
    x, gradient = torch.randn(30, 8), torch.randn(30, 10)
    sums = outputs._Sums(Structure((Group(("o",), None),)), torch.device("cpu"))
    sums.heard("o", x, gradient, slice(0, 30))
    runs = sums.means()[1].gradients["o"]
    for run, some in enumerate(gradient.split(4, 1)):
        size = some.shape[1]
        assert torch.allclose(runs[run, :size, :size], some.t() @ some / 30, atol=1e-5)
    assert not runs[2, 2:].any() and not runs[2, :, 2:].any()


def test_outputs_that_do_nothing_leave_the_inputs_as_they_are() -> None:
    x = torch.randn(30, 8)
    sums = outputs._Sums(Structure((Group(("o",), None),)), torch.device("cpu"))
    sums.heard("o", x, torch.zeros(30, 5), slice(0, 30))
    assert torch.allclose(sums.means()[1].inputs["o"], x.t() @ x / 30, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "phi3"])
def test_a_checkpoint_diverges_less(kind: str, tmp_path: Path) -> None:
    """On a random model with biases, norms, caps or fused layers, over the tokens that it was calibrated on."""
    base = write_model(tmp_path / "base", kind)
    by_inputs = {name: (method, options | {"objective": "input"}) for name, (method, options) in VARIANTS.items()}
    tokens = write_tokens(tmp_path / "tokens.json", [64] * 48)
    request = pass_request(base, tmp_path / "output", VARIANTS, tokens=tokens)
    told = outputs.run(request, quiet)
    calibrate.run(pass_request(base, tmp_path / "input", by_inputs, tokens=tokens), lambda *_: None)
    assert set(told["variants"]) == set(VARIANTS)  # type: ignore[index]
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.tensor(json.loads(Path(request["tokens"]).read_text())["windows"])

    def said(own: Any) -> Any:
        with torch.no_grad():
            return own(ids).logits.log_softmax(-1)

    before = said(model)
    for name, (method, _) in VARIANTS.items():
        made = {side: dequantized(base, tmp_path / side / name, method, 4) for side in ("input", "output")}
        lost = {side: float((before.exp() * (before - said(own))).sum(-1).mean()) for side, own in made.items()}
        # Rounding to nearest gains the least, and random weights have little to gain by.
        assert 0 < lost["output"] < (1.05 if name == "awq" else 0.99) * lost["input"], name


@pytest.mark.slow
def test_an_interrupted_pass_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama")
    request = pass_request(base, tmp_path / "work", VARIANTS)

    def made() -> list[bytes]:
        return [(tmp_path / "work" / name / "model.safetensors").read_bytes() for name in VARIANTS]

    outputs.run(request, quiet)
    whole = made()
    for words in ("layer 2 of 2: forward pass", "output matrix", "layer 1 of 2: backward pass", "layer 1 of 2: awq"):
        shutil.rmtree(request["state"])
        heard: list[str] = []

        def stop(done: float, total: float, text: str, words: str = words) -> None:
            if text.startswith(words):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            outputs.run(request, stop)
        outputs.run(request, lambda done, total, text, heard=heard: heard.append(text))
        assert made() == whole
        assert heard[0] == words.replace("awq", "backward pass"), "what was done before is not done again"


def test_a_pass_whose_hidden_states_are_gone_begins_anew(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama")
    request = pass_request(base, tmp_path / "work", {"gptq": VARIANTS["gptq"]})
    outputs.run(request, quiet)
    whole = (tmp_path / "work" / "gptq" / "model.safetensors").read_bytes()
    for file in ("hidden-00001.bin", "gradient-1.bin"):
        shutil.rmtree(request["state"])

        def stop(done: float, total: float, text: str) -> None:
            if text == "layer 1 of 2: gptq":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            outputs.run(request, stop)
        (Path(request["state"]) / file).unlink()
        heard: list[str] = []
        outputs.run(request, lambda done, total, text, heard=heard: heard.append(text))
        assert heard[0] == "layer 1 of 2: forward pass"
        assert (tmp_path / "work" / "gptq" / "model.safetensors").read_bytes() == whole


def test_a_device_that_does_not_hold_a_layers_matrices_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(outputs, "backward", full)
    request = pass_request(write_model(tmp_path / "base", "llama"), tmp_path / "work", VARIANTS)
    with pytest.raises(UserError, match="layer 1 and its Gram matrices do not fit .* finished layers are kept"):
        outputs.run(request, quiet)


def test_what_has_no_gradients_to_go_by_is_refused(tmp_path: Path) -> None:
    experts = pass_request(write_model(tmp_path / "experts", "mixtral"), tmp_path / "one", VARIANTS)
    with pytest.raises(UserError, match="`objective: output` takes no model with experts"):
        outputs.run(experts, quiet)
    base = write_model(tmp_path / "base", "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1e38)
    model.save_pretrained(base)
    with pytest.raises(UserError, match="is not finite: .* leave `objective` out"):
        outputs.run(pass_request(base, tmp_path / "two", VARIANTS), quiet)


def test_too_few_tokens_are_told(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens.json", [65, 65])
    base = write_model(tmp_path / "base", "llama", intermediate_size=192)
    told = outputs.run(pass_request(base, tmp_path, VARIANTS, tokens=tokens), quiet)
    for made in told["variants"].values():  # type: ignore[index]
        assert any(line.startswith("130 calibration tokens are fewer than the widest") for line in made["warnings"])


@pytest.mark.parametrize("kind", ["starcoder2", "stablelm", "nemotron"])
def test_a_final_norm_with_a_bias(kind: str, tmp_path: Path) -> None:
    """What is differentiated at the end is what transformers computes there."""
    base = write_model(tmp_path / "base", kind, tie_word_embeddings=False)
    weights = open_weights(base)
    head = Head(weights, torch.device("cpu"))
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert dict(head.norm.state_dict()).keys() == {"weight", "bias"}
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(head.norm(hidden), model.model.norm(hidden))
