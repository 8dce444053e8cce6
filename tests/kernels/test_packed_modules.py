"""The layers: what they compute, what they keep, and that compilers and graphs can hold them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.kernel_cases import by_gguf, random_blocks, weight_of
from tests.places import ROOT

torch = pytest.importorskip("torch")
pytest.importorskip("gguf")

from workbench_kernels import ops  # noqa: E402
from workbench_kernels.gguf.planes import split  # noqa: E402
from workbench_kernels.gguf.types import block_type  # noqa: E402
from workbench_kernels.modules import AwqLinear, BlockEmbedding, BlockLinear, GptqLinear  # noqa: E402

AWQ = {"op": "awq", "N": 24, "K": 96, "group": 32}
GPTQ = {"op": "gptq", "bits": 8, "order": "act", "N": 16, "K": 64, "group": 32}


def layers() -> list[tuple[str, torch.nn.Module, torch.Tensor]]:
    """(name, layer, its weight float32 [out, in])."""
    awq_weight, awq_parts = weight_of(AWQ)
    gptq_weight, gptq_parts = weight_of(GPTQ)
    data = random_blocks("Q5_K", 7, 512)
    return [
        ("awq", AwqLinear(*awq_parts, bias=torch.randn(24)), awq_weight),
        ("gptq", GptqLinear(*gptq_parts, 8), gptq_weight),
        ("blocks", BlockLinear(data, "Q5_K", torch.randn(7)), by_gguf("Q5_K", data)),
    ]


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layers_compute_what_a_linear_layer_does(which: int, dtype: torch.dtype) -> None:
    _, layer, weight = layers()[which]
    x = torch.randn(2, 3, weight.shape[1]).to(dtype)
    exact = x.double() @ weight.double().t() + (0 if layer.bias is None else layer.bias.double())
    y = layer(x)
    assert y.dtype == dtype and y.shape == exact.shape
    bound = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    assert float((y.double() - exact).abs().max() / exact.abs().max()) < bound
    torch.testing.assert_close(layer(x.transpose(0, 1)), y.transpose(0, 1))  # strides are the layer's business


def test_packed_tensors_keep_their_types() -> None:
    for _, layer, _ in layers():
        before = {name: tensor.clone() for name, tensor in layer.named_buffers() if name != "bias"}
        layer.to(torch.bfloat16)
        for name, tensor in before.items():
            now = getattr(layer, name)
            assert now.dtype == tensor.dtype and torch.equal(now, tensor), name
        assert layer.bias is None or layer.bias.dtype == torch.bfloat16


def test_an_embedding_shares_its_matrix_with_a_head() -> None:
    data = random_blocks("Q6_K", 11, 256)
    table = BlockEmbedding(data, "Q6_K", torch.float32)
    head = BlockLinear(table.planes, "Q6_K")
    ids = torch.tensor([[3, 10], [0, 3]])
    assert torch.equal(table(ids), by_gguf("Q6_K", data)[ids])
    both = torch.nn.ModuleList([table, head])
    assert sum(tensor.nbytes for tensor in both.buffers()) == data.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1, 2])
def test_layers_compile_into_one_graph(which: int) -> None:
    _, layer, weight = layers()[which]
    x = torch.randn(2, weight.shape[1])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.slow
def test_operators_are_what_they_say() -> None:
    """PyTorch's own checks: the schema, the fake implementation, no aliasing."""
    kinds = ("test_schema", "test_faketensor")
    planes = split(block_type("Q8_0"), random_blocks("Q8_0", 5, 64))
    torch.library.opcheck(ops.block_matmul, (torch.randn(2, 64), planes, "Q8_0"), test_utils=kinds)
    torch.library.opcheck(ops.block_rows, (torch.tensor([[1, 4]]), planes, "Q8_0", torch.float16), test_utils=kinds)
    torch.library.opcheck(ops.awq_matmul, (torch.randn(2, 96), *weight_of(AWQ)[1]), test_utils=kinds)
    torch.library.opcheck(ops.gptq_matmul, (torch.randn(2, 64), *weight_of(GPTQ)[1], 8, False), test_utils=kinds)


@pytest.mark.gpu
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_cuda_graph_replays_a_layer(which: int) -> None:
    _, layer, weight = layers()[which]
    layer = layer.cuda()
    x = torch.randn(1, weight.shape[1], device="cuda", dtype=torch.float16)
    layer(x)  # tuned and compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, layer(x))


def test_without_triton_the_references_work(tmp_path: Path) -> None:
    """CPU users need not have it: here its import fails."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ModuleNotFoundError('no triton', name='triton')")
    program = (
        "import torch; from workbench_kernels import backend;"
        "from workbench_kernels.gguf import blocks, q8_0;"
        "planes = torch.zeros(3, 17, dtype=torch.int16); x = torch.ones(2, 32);"
        "assert backend.triton is None and blocks.matmul(q8_0.TYPE, x, planes).abs().max() == 0\n"
        "try: blocks.matmul(q8_0.TYPE, x, planes, path='prefill')\n"
        "except ValueError as error: print(error)"
    )
    kernels = ROOT / "kernels"
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={"PYTHONPATH": f"{tmp_path}:{kernels}"}
    )
    assert answer.returncode == 0, answer.stderr
    assert "needs Triton, which is not installed here; supported without it: reference" in answer.stdout
