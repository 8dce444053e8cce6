"""The references against GPTQModel's own de-quantizing, and AutoAWQ's functions as GPTQModel carries them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.kernel_cases import weight_of

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow

from workbench_kernels import awq, gptq  # noqa: E402


@pytest.fixture(autouse=True)
def workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPTQModel sizes its pools by the cores and refuses to start on two."""
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "4")
    pytest.importorskip("gptqmodel")


@pytest.mark.parametrize("group", [32, 128])
def test_autoawq(group: int) -> None:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    _, parts = weight_of({"op": "awq", "N": 64, "K": 128, "group": group})
    theirs = dequantize_gemm(*parts, 4, group)
    assert torch.equal(awq.dequantize(*parts, torch.float16), theirs.t())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("order", ["plain", "act"])
def test_gptqmodel(bits: int, order: str) -> None:
    """Stored zeros are all below the largest code: GPTQModel adds one to whole words, where the largest would carry."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    _, (qweight, _, scales, g_idx) = weight_of(
        {"op": "gptq", "bits": bits, "order": order, "N": 64, "K": 128, "group": 32}
    )
    stored = torch.randint(0, 2**bits - 1, (4, 64 * bits // 32, 32 // bits), dtype=torch.int64)
    words = (stored << torch.arange(0, 32, bits)).sum(2)
    qzeros = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    layer: Any = TorchLinear(
        bits=bits,
        group_size=32,
        sym=False,
        desc_act=order == "act",
        in_features=128,
        out_features=64,
        bias=False,
        pack_dtype=torch.int32,
        register_buffers=True,
    )
    for name, tensor in (("qweight", qweight), ("qzeros", qzeros.clone()), ("scales", scales), ("g_idx", g_idx)):
        assert getattr(layer, name).shape == tensor.shape and getattr(layer, name).dtype == tensor.dtype
        setattr(layer, name, tensor)
    convert_gptq_v1_to_v2_format_module(layer, bits=bits, pack_dtype=torch.int32)
    layer.post_init()
    theirs = layer.dequantize_weight().t()
    assert torch.equal(gptq.dequantize(qweight, qzeros, scales, g_idx, bits, theirs.dtype), theirs)
