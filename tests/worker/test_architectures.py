"""The model types of plans' table, each from a random model to the logits of three engines.

What is held against what: an engine's logits of a checkpoint against transformers' float32 logits of the same
checkpoint de-quantized by our own unpacking (by the `gguf` package where the checkpoint is a GGUF file), so that what
is left is the engine's arithmetic. How near that must be is `NEAR`; that the same logits are several times farther
from the base's shows that the bound could fail.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from tests.places import ROOT
from tests.worker.others import convert
from tests.worker.small_models import (
    CARRIED,
    MODELS,
    WIDE,
    dequantized,
    pass_request,
    relative,
    write_model,
    write_sentencepiece,
)
from tests.worker.unpacking import dequantize_gptq, exact, from_gguf, load_base
from workbench.machine import isolate
from workbench.worker.architectures import ARCHITECTURES
from workbench.worker.backends import BACKENDS
from workbench.worker.calibration import run as calibrate
from workbench.worker.ggml import carry
from workbench.worker.ggml.index import entries
from workbench.worker.ggml.quantizer import run_quantizer

# --- engines ------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    **CARRIED,
    # vLLM's rotary kernel on a CPU takes eight pairs at a time and writes past the end of what is no multiple of it.
    "phi4-mini": {"hidden_size": 256, "head_dim": 64},
}
WINDOW = 48
METHODS = ("awq", "gptq")
TYPES = ("Q8_0", "Q4_0")
EVERY_TYPE = ("Q2_K", "Q3_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0")
NEAR, NEAR_EXACT = 0.06, 0.005
"""Relative root mean square difference of the logits, for quantized and for exact weights. These random models enlarge
a rounding several times on the way to the logits. llama.cpp keeps keys and values in float16 (0.0005 a number; 0.0016
seen at most). transformers' and vLLM's kernels on a CPU multiply in bfloat16 (0.004 a number; 0.025 seen); llama.cpp
rounds what meets quantized weights to 8 bits with one scale for 32 numbers, and vLLM may where the processor has tiles
for it (0.005 to 0.01 a number; 0.033 seen). Four bits are 0.25 to 0.43 from the base."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its calibrated variants and its importance matrix for every kind."""
    pytest.importorskip("transformers")
    made = tmp_path_factory.mktemp("architectures")
    for seed, (kind, sizes) in enumerate(KINDS.items()):
        base = write_sentencepiece(write_model(made / kind / "base", kind, seed, **(WIDE | sizes)))
        variants = {method: (method, {"group_size": 32}) for method in METHODS}
        if kind == "llama":
            variants["gptq-8bit"] = ("gptq", {"group_size": 32, "bits": 8})
        calibrate.run(pass_request(base, made / kind, variants), lambda *_: None)
    return made


@pytest.fixture(scope="module")
def ids() -> list[int]:
    import torch

    return list(torch.randint(3, 300, (WINDOW,), generator=torch.Generator().manual_seed(9)).tolist())


@pytest.fixture(scope="module")
def logits_of(folder: Path, ids: list[int]) -> Any:
    """(backend, models) -> name -> logits, and name -> why there are none, from one child process."""
    from safetensors.torch import load_file

    def run(backend: str, models: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
        out = folder / f"{backend}.safetensors"
        payload = {"backend": backend, "models": models, "ids": ids, "out": str(out)}
        environment = importlib.import_module(BACKENDS[backend]).ENVIRONMENT
        reply = isolate.call(
            "tests.worker.engine_logits:collect",
            payload,
            workdir=folder / f"{backend}-log",
            time_limit_s=400,
            environment={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"},
        )
        assert reply.error is None, reply.log
        return dict(load_file(out)), dict(reply.value)

    return run


@pytest.fixture(scope="module")
def checkpoints(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        f"{kind}/{method}": {"path": str(folder / kind / method), "format": method}
        for kind in KINDS
        for method in METHODS
    }


@pytest.fixture(scope="module")
def in_transformers(logits_of: Any, checkpoints: dict[str, Any]) -> dict[str, Any]:
    pytest.importorskip("gptqmodel")
    found, failures = logits_of("transformers", checkpoints)
    assert failures == {}
    return dict(found)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of every kind a file in which the decoder's matrices take turns at every type: vLLM starts once a kind."""
    pytest.importorskip("llama_cpp")
    found = {}
    for seed, (kind, sizes) in enumerate(KINDS.items()):
        folder = tmp_path_factory.mktemp(f"mixed-{kind}")
        # Rows of whole blocks of 256, and as many matrices as there are types at least.
        shape = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 3}
        shape |= {"query_pre_attn_scalar": 64} if kind.startswith("gemma") else {}
        shape |= {key: value for key, value in sizes.items() if key not in shape or key == "num_hidden_layers"}
        base = write_sentencepiece(write_model(folder / "base", kind, seed, **(WIDE | shape)))
        source, found[kind] = convert(base, folder / "exact.gguf"), folder / "mixed.gguf"
        matrices = [each.name for each in entries(str(source)) if each.name.startswith("blk.") and each.shape[1] > 1]
        types = {name: EVERY_TYPE[(seed + place) % len(EVERY_TYPE)] for place, name in enumerate(matrices)}
        run_quantizer(str(source), str(found[kind]), "Q8_0", None, 2, progress=lambda *_: None, types=types)
    return found


@pytest.fixture(scope="module")
def from_vllm(
    logits_of: Any, checkpoints: dict[str, Any], folder: Path, files: dict[str, dict[str, str]], mixed: dict[str, Path]
) -> Any:
    pytest.importorskip("vllm")
    last = {"llama/gptq-8bit": {"path": str(folder / "llama/gptq-8bit"), "format": "gptq"}}
    every = checkpoints | {"llama/Q4_0": in_gguf(files)["llama/Q4_0"]} | last
    asked = {name: {**model, "options": {"enforce_eager": True}} for name, model in every.items()}
    exactly = {"format": "gguf", "options": {"enforce_eager": True, "dtype": "float32"}}
    asked |= {f"{kind}/mixed": {"path": str(path), **exactly} for kind, path in mixed.items()}
    packed = {"format": "gguf", "options": {"enforce_eager": True, "gguf": "repack"}}
    asked |= {f"{kind}/repacked": {"path": each["Q4_0"], **packed} for kind, each in files.items()}
    return logits_of("vllm", asked)


def in_gguf(files: dict[str, dict[str, str]]) -> dict[str, dict[str, Any]]:
    """The files as models to collect logits of."""
    return {
        f"{kind}/{name}": {"path": path, "format": "gguf"}
        for kind, made in files.items()
        for name, path in made.items()
    }


@pytest.fixture(scope="module")
def in_vllm(from_vllm: Any) -> dict[str, Any]:
    found, failures = from_vllm
    assert set(failures) <= {"llama/gptq-8bit"}, failures
    return dict(found)


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, dict[str, str]]:
    """GGUF files by kind and type, as the program makes them: converted once, quantized with the matrix."""
    pytest.importorskip("llama_cpp")
    models = {
        kind: {"base": str(folder / kind / "base"), "imatrix": str(folder / kind / "imatrix.gguf")} for kind in KINDS
    }
    reply = isolate.call(
        "tests.worker.engine_logits:convert_and_quantize",
        {"models": models, "types": TYPES, "folder": str(folder)},
        workdir=folder / "convert-log",
        time_limit_s=200,
        environment={"PYTHONPATH": str(ROOT)},
    )
    assert reply.error is None, reply.log
    return dict(reply.value)


@pytest.fixture(scope="module")
def carried(checkpoints: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """AWQ and GPTQ checkpoints as GGUF files."""
    pytest.importorskip("llama_cpp")
    found = {}
    for name, model in checkpoints.items():
        out = f"{model['path']}.gguf"
        carry.carry({"base": "", "source": model["path"], "out": out, "options": {}}, lambda *_: None)
        found[name] = {"path": out, "format": "gguf"}
    return found


@pytest.fixture(scope="module")
def in_llamacpp(logits_of: Any, files: dict[str, dict[str, str]], carried: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found, failures = logits_of("llamacpp", in_gguf(files) | carried)
    assert failures == {}
    return dict(found)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["transformers", "vllm", "llamacpp"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_awq_and_gptq_from_the_pass_to_an_engines_logits(
    kind: str, engine: str, folder: Path, ids: list[int], request: pytest.FixtureRequest
) -> None:
    found = request.getfixturevalue(f"in_{engine}")
    base = exact(load_base(folder / kind / "base"), ids)
    for method in METHODS:
        logits = found[f"{kind}/{method}"][:, : base.shape[1]]
        wanted = exact(dequantized(folder / kind / "base", folder / kind / method, method, 4), ids)
        near, far = relative(logits, wanted), relative(logits, base)
        print(f"{kind} {method} {engine}: {near:.4f} from its own weights, {far:.4f} from the base")
        assert near < NEAR, method
        assert far > 3 * NEAR, "or the bound above says nothing"


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_gguf_with_the_matrix_from_the_pass_to_llamacpps_logits(
    kind: str, folder: Path, files: dict[str, dict[str, str]], in_llamacpp: dict[str, Any], ids: list[int]
) -> None:
    base = exact(load_base(folder / kind / "base"), ids)
    assert relative(in_llamacpp[f"{kind}/F32"], base) < NEAR_EXACT
    print(f"{kind} F32: {relative(in_llamacpp[f'{kind}/F32'], base):.4f} from the base")
    for name in TYPES:
        wanted = exact(from_gguf(folder / kind / "base", files[kind][name]), ids)
        near, far = (relative(in_llamacpp[f"{kind}/{name}"], other) for other in (wanted, base))
        print(f"{kind} {name}: {near:.4f} from its own weights, {far:.4f} from the base")
        assert near < NEAR, name
        assert far > 3 * NEAR or name == "Q8_0", "or the bound above says nothing"


@pytest.mark.slow
def test_gguf_to_vllms_logits_as_it_is_measured(
    folder: Path, files: dict[str, dict[str, str]], in_vllm: dict[str, Any], ids: list[int]
) -> None:
    """In bfloat16, which it computes in unless it is told."""
    base = exact(load_base(folder / "llama/base"), ids)
    wanted = exact(from_gguf(folder / "llama/base", files["llama"]["Q4_0"]), ids)
    near, far = (relative(in_vllm["llama/Q4_0"][:, : base.shape[1]], other) for other in (wanted, base))
    assert near < NEAR and far > 3 * NEAR


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_type_of_gguf_in_engines_that_unpack_it(
    kind: str, mixed: dict[str, Path], in_vllm: dict[str, Any], ids: list[int]
) -> None:
    """The weights that vLLM's loader gets, vLLM's and transformers' logits, by gguf's own de-quantization; Llama's
    files have the rows of queries and keys in another order than checkpoints, for one."""
    import torch

    from workbench.worker.base.gguf_config import load_gguf, read_gguf
    from workbench.worker.base.gguf_weights import weights_of

    path, base = mixed[kind], mixed[kind].parent / "base"
    assert {each.kind for each in entries(str(path))} - {"F32"} == {*EVERY_TYPE}
    model = from_gguf(base, str(path))
    state, given = model.state_dict(), dict(weights_of(path, read_gguf(path)))
    matrices = {name for name in state if name.endswith("_proj.weight")}
    assert set(given) >= matrices
    assert [name for name in matrices if not torch.equal(given[name], state[name])] == []
    wanted = exact(model, ids)
    # Gemma 2's capped scores are left out by the fast kernel.
    eagerly = {"dtype": torch.float32, "attn_implementation": "eager"}
    found = exact(load_gguf(path, eagerly).eval(), ids)[:, : wanted.shape[1]]
    assert relative(found, wanted) < 1e-4
    near = relative(in_vllm[f"{kind}/mixed"][:, : wanted.shape[1]], wanted)
    print(f"{kind} mixed vllm: {near:.1e} from its own weights")
    assert near < NEAR_EXACT
    for each in EVERY_TYPE:
        other = relative(exact(from_gguf(base, str(path), without=each), ids), wanted)
        print(f"{kind} without {each}: {other:.1e}")
        assert other > max(1e-3, 2 * near), f"the bound says nothing of {each}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_gguf_repacked_for_vllms_kernels(
    kind: str, folder: Path, files: dict[str, dict[str, str]], in_vllm: dict[str, Any], ids: list[int]
) -> None:
    """The file's weights, bit for bit, as its loader gets them (of 8 bits where a GPU's kernels take them), and the
    logits of those that a CPU's take."""
    import torch
    from safetensors import safe_open

    from workbench.worker.backends import vllm_gguf

    base = folder / kind / "base"
    for name, bits in (("Q4_0", 4), ("Q8_0", 8)):
        path = Path(files[kind][name])
        packing = vllm_gguf.packing(path, cpu=False)
        state = from_gguf(base, str(path)).state_dict()
        assert set(packing.stems) == {each.removesuffix(".weight") for each in state if each.endswith("_proj.weight")}
        assert (packing.kind, vllm_gguf.packing(path, cpu=True).kind) == (name, name if bits == 4 else "")
        given = dict(vllm_gguf._weights(path, packing.stems))
        for stem in packing.stems:
            parts = {part: given[f"{stem}.{part}"] for part in ("qweight", "qzeros", "scales")}
            runs = torch.arange(state[f"{stem}.weight"].shape[1]) // 32
            assert torch.equal(dequantize_gptq(parts | {"g_idx": runs}, bits), state[f"{stem}.weight"]), stem
    with safe_open(folder / "vllm.safetensors", framework="pt") as file:
        assert file.metadata()[f"{kind}/repacked"] == "vllm, Q4_0 as gptq"
    plain, wanted = (exact(each, ids) for each in (load_base(base), from_gguf(base, files[kind]["Q4_0"])))
    near, far = (relative(in_vllm[f"{kind}/repacked"][:, : plain.shape[1]], each) for each in (wanted, plain))
    print(f"{kind} Q4_0 repacked vllm: {near:.4f} from its own weights, {far:.4f} from the base")
    assert near < NEAR and far > 3 * NEAR


@pytest.mark.slow
def test_the_program_says_what_vllm_on_a_cpu_refuses(from_vllm: Any, folder: Path, ids: list[int]) -> None:
    """Eight bits: loaded on a GPU; on a CPU the engine fails, so the pair is shown as one that cannot run."""
    import torch

    from workbench.records import Artifact
    from workbench.worker.backends import vllm

    def said(bits: int, cuda: bool) -> str | None:
        return vllm.unsupported(
            Artifact("x", "gptq", "gptq", "", "", 0, 0, provenance={"options": {"bits": bits}}), cuda
        )

    found, failures = from_vllm
    if torch.cuda.is_available():
        base = folder / "llama/base"
        wanted = exact(dequantized(base, folder / "llama/gptq-8bit", "gptq", 8), ids)
        assert relative(found["llama/gptq-8bit"][:, : wanted.shape[1]], wanted) < NEAR
    else:
        assert "does not support weight_bits" in failures["llama/gptq-8bit"]
    assert said(8, cuda=False) == "vLLM reads GPTQ of 8 bits on GPUs only; its kernels on a CPU take 4"
    assert said(4, cuda=False) is said(8, cuda=True) is None


@pytest.mark.slow
def test_checkpoints_name_the_dtype_that_a_gpus_kernels_run_in(folder: Path) -> None:
    """vLLM refuses Gemma in float16, and its activations leave that range."""
    from workbench.worker.backends import vllm

    found = {kind: {vllm._kernel_dtype(str(folder / kind / method)) for method in METHODS} for kind in KINDS}
    assert found == {kind: {"bfloat16" if kind.startswith("gemma") else "float16"} for kind in KINDS}


def test_kinds_are_all_of_the_table() -> None:
    """And hold what the issue names: tied and untied heads, grouped queries, fused projections, softcaps."""
    assert {MODELS[kind].get("model_type", kind) for kind in KINDS} == set(ARCHITECTURES)
