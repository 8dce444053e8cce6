"""The product with the head in float32: the same sums, none of the rounding; and back again afterwards."""

from __future__ import annotations

from typing import Any

import pytest

from workbench.worker.scoring import head

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 7])
def test_it_is_the_product_in_float64_to_float32s_precision(dtype: str, rows: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(head, "_CHUNK_BYTES", 4 * 64 * 100)  # 100 ids at once, and a rest
    chance = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    hidden = (3 * torch.randn(2, rows, 64, generator=chance)).to(kind)
    weight, bias = torch.randn(1234, 64, generator=chance).to(kind), torch.randn(1234, generator=chance).to(kind)
    found = head.product(hidden, weight, bias)
    exact = hidden.double() @ weight.double().T + bias.double()
    assert found.dtype == torch.float32 and found.shape == (2, rows, 1234)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)
    rounded = (hidden @ weight.T + bias).double()
    assert (rounded - exact).abs().max() > 0.005, "the rounding that is avoided must be there"


def test_rounding_alone_reads_as_divergence() -> None:
    """What the module says: a step of 0.125 between 16 and 32 costs some 4e-4 nats."""
    chance = torch.Generator().manual_seed(1)
    logits = torch.randn(400, 5000, generator=chance).mul(2).add(20)
    p, q = logits.log_softmax(-1), logits.bfloat16().float().log_softmax(-1)
    divergence = float((p.exp() * (p - q)).sum(-1).mean())
    assert 3e-4 < divergence < 1e-3


def test_a_model_is_wide_only_while_it_lasts(tiny_llama: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    ids = torch.arange(3, 43)[None]
    with torch.inference_mode():
        before = model(ids).logits
        with head.in_float32(model) as possible:
            wide = model(ids).logits
        after = model(ids).logits
        hidden = model.model(ids).last_hidden_state
    assert possible and wide.dtype == torch.float32 and before.dtype == torch.bfloat16
    torch.testing.assert_close(wide, hidden.float() @ model.lm_head.weight.float().T)
    assert torch.equal(before, after) and torch.equal(wide.bfloat16(), before)
    with pytest.raises(RuntimeError, match="stop"), head.in_float32(model):
        raise RuntimeError("stop")
    assert "forward" not in model.lm_head.__dict__


def test_float32_and_foreign_heads_stay_as_they_are(tiny_llama: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with head.in_float32(model) as possible:
        assert not possible and "forward" not in model.lm_head.__dict__
    assert not head.fits(torch.empty(0, dtype=torch.bfloat16))  # packed away
    assert not head.fits(torch.zeros(4, 4, dtype=torch.int32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_packed_head_is_wide_too(dtype: str, tiny_llama: Any) -> None:
    from transformers import AutoModelForCausalLM
    from workbench_kernels.encoders.encode import encode
    from workbench_kernels.gguf import blocks
    from workbench_kernels.gguf.types import block_type
    from workbench_kernels.modules import BlockLinear

    kind = getattr(torch, dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=kind)
    model.lm_head = BlockLinear(encode("Q8_0", model.lm_head.weight.detach().float()), "Q8_0")
    weight = blocks.dequantize(block_type("Q8_0"), model.lm_head.planes).double()
    ids = torch.arange(3, 43)[None]
    with torch.inference_mode():
        hidden = model.model(ids).last_hidden_state
        with head.in_float32(model) as possible:
            wide = model(ids).logits
        after = model(ids).logits
    assert (possible, wide.dtype, after.dtype) == (True, torch.float32, kind)
    exact = hidden.double() @ weight.T
    torch.testing.assert_close(wide.double(), exact, rtol=0, atol=1e-5)
    assert (after.double() - exact).abs().max() > 20 * (wide.double() - exact).abs().max()
    assert "forward" not in model.lm_head.__dict__
