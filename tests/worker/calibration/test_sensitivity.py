"""What types are said to cost the output, against what they do cost it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.worker.small_models import write_model, write_tokens
from workbench.errors import UserError
from workbench.worker.calibration import run as calibrate
from workbench.worker.calibration import sensitivity
from workbench.worker.ggml.blocks import round_trip

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("llama_cpp")


def quiet(done: float, total: float, text: str) -> None:
    assert 0 <= done <= total


def asked(base: Path, folder: Path) -> dict[str, Any]:
    """A request for prices, with the importance matrix made."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = write_tokens(folder / "tokens.json", [64] * 16)
    request = {"base": str(base), "tokens": str(tokens), "tokens_digest": "t", "device": "cpu", "threads": 1}
    matrix, request["precision"] = folder / "i.gguf", "float32"
    calibrate.run(
        request | {"variants": [], "imatrix_out": str(matrix), "state": str(folder / "pass")}, lambda *_: None
    )
    return request | {"imatrix": str(matrix), "state": str(folder / "state")}


def priced(request: dict[str, Any], progress: Any = quiet) -> Any:
    return sensitivity.run(request, progress)["tensors"]  # type: ignore[index]


EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
}


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3", "cohere", *EXPERTS])
def test_prices_are_what_a_rounded_tensor_moves_the_output_by(kind: str, tmp_path: Path) -> None:
    """Of a model with its own factors, caps, norms and experts: a tensor in Q4_0 at a time, the divergence over the
    tokens."""
    base = write_model(tmp_path / "base", kind, hidden_size=128, **EXPERTS.get(kind, {}))
    request = asked(base, tmp_path / "work")
    found = priced(request)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor(json.loads(Path(request["tokens"]).read_text())["windows"])

    def said() -> Any:
        with torch.no_grad():
            return model(ids).logits.log_softmax(-1)

    before = said()
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.attn_output.weight": "model.layers.0.self_attn.o_proj.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.1.ffn_up.weight": f"model.layers.1.mlp.{'gate_up_proj' if kind == 'phi3' else 'up_proj'}.weight",
        "output.weight": "lm_head.weight",
        "blk.1.ffn_down_exps.weight": "model.layers.1.mlp.experts.down_proj",
    }
    parameters = dict(model.named_parameters())
    checked = {tensor: parameters[name] for tensor, name in names.items() if tensor in found}
    if kind in EXPERTS:
        # A token that is sent to another expert is beyond gradients: only what no router comes after.
        checked = {tensor: checked[tensor] for tensor in ("blk.1.ffn_down_exps.weight", "output.weight")}
    for tensor, parameter in checked.items():
        weight = parameter.data
        kept = weight.clone()
        rows = kept.reshape(-1, kept.shape[-1]).numpy()
        weight.copy_(torch.from_numpy(round_trip("Q4_0", rows)).view(kept.shape))
        measured = float((before.exp() * (before - said())).sum(-1).mean())
        weight.copy_(kept)
        assert found[tensor]["Q4_0"] == pytest.approx(measured, rel=0.3), tensor
        assert found[tensor]["Q8_0"] < found[tensor]["Q5_0"] < found[tensor]["Q4_0"]


def test_an_embedding_that_is_the_output_matrix_has_both_prices(tmp_path: Path) -> None:
    tied = write_model(tmp_path / "tied", "llama-tied")
    model = transformers.AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path / "apart")
    both = priced(asked(tied, tmp_path / "work"))["token_embd.weight"]
    apart = priced(asked(tmp_path / "apart", tmp_path / "work2"))
    for kind, price in both.items():
        assert price == pytest.approx(apart["token_embd.weight"][kind] + apart["output.weight"][kind], rel=1e-4)


def test_an_interrupted_pass_goes_on_to_the_same_prices(tmp_path: Path) -> None:
    request = asked(write_model(tmp_path / "base", "llama"), tmp_path / "work")
    whole = priced(request)
    again = {"prices of the output": "output matrix", "layer 1 of 2: prices": "layer 1 of 2: backward pass"}
    for words in ("layer 2 of 2: forward pass", *again, "prices of the embedding"):
        shutil.rmtree(request["state"])
        heard: list[str] = []

        def stop(done: float, total: float, text: str, words: str = words) -> None:
            if text.startswith(words):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            priced(request, stop)
        assert priced(request, lambda done, total, text, heard=heard: heard.append(text)) == whole
        assert heard[0] == again.get(words, words), "what was done before is not done again"


def test_gradients_that_are_not_finite_are_told(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama")
    request = asked(base, tmp_path / "work")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1e38)
    model.save_pretrained(base)
    with pytest.raises(UserError, match=r"the gradient after the last layer is not finite: .* overflow in float32"):
        priced(request)


def test_windows_are_whole_and_evenly_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(10)
    windows = sensitivity.Windows(ids, [1, 2, 3, 4], [3, 0, 1, 2])
    assert sensitivity._some(windows).numbers == [3, 0, 1, 2]
    monkeypatch.setattr(sensitivity, "RUN_TOKENS", 5)
    some = sensitivity._some(windows)
    assert (some.ids.tolist(), some.lengths, some.numbers) == ([0, 3, 4, 5], [1, 3], [3, 1])
    monkeypatch.setattr(sensitivity, "RUN_TOKENS", 0)
    assert sensitivity._some(windows).lengths == [1]
