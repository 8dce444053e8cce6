"""What Triton's compiler makes of the kernels for GPUs that are not here, as their launchers have them.

The interpreter says whether a kernel is right; whether it spills, loads two bytes at a time, or leaves multiprocessors
without work shows here. `python kernels/static_table.py` prints all of it, for three architectures.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace
from typing import Any

import pytest

from tests.places import ROOT

pytest.importorskip("torch")

# Said before Triton is first imported, as `static_table.py` says it.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

OPERATIONS = (
    "awq-4", "gptq-4", "gptq-8", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "Q3_K", "Q2_K",
    "IQ4_XS", "IQ4_NL",
)  # fmt: skip


@pytest.fixture(scope="module")
def static_table() -> Any:
    sys.path.insert(0, str(ROOT / "kernels"))
    try:
        import static_table
    finally:
        sys.path.remove(str(ROOT / "kernels"))
    return static_table


def found_of(static_table: Any, operation: str, kernel: str, architecture: int = 90) -> Any:
    """The facts of a launch at the first shape, its programs the fewest of all shapes."""
    planned = list(static_table.launches(operation, kernel))
    found = static_table.facts(planned[0], architecture)
    return replace(found, programs=min(static_table.programs(launch) for launch in planned))


def test_the_operations_are_all_there_is(static_table: Any) -> None:
    assert set(OPERATIONS) == set(static_table.operations("meta"))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_decode(static_table: Any, operation: str, architecture: int) -> None:
    found = found_of(static_table, operation, "decode", architecture)
    assert found.access_bytes["codes"] and found.access_bytes["activations"] and 0 < found.registers <= 255
    assert static_table.failures("decode", [found]) == []


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["prefill", "dequantize"])
@pytest.mark.parametrize("operation", ["awq-4", "gptq-4", "Q4_K", "Q6_K"])
def test_prefill_and_dequantize(static_table: Any, operation: str, kernel: str) -> None:
    found = found_of(static_table, operation, kernel)
    assert static_table.failures(kernel, [found]) == []
    assert (found.matrix_instructions > 0) == (kernel == "prefill")


def test_what_a_kernel_should_be(static_table: Any) -> None:
    """One narrow load among wide ones is enough."""
    wide = {"codes": [16, 8], "activations": [16], "scales": [2], "stores": [2]}
    good = static_table.Facts(40, 0, 32, 400, 0, wide, 132)
    assert static_table.failures("decode", [good]) == []
    for change, words in (
        ({"access_bytes": wide | {"codes": [16, 4]}}, "narrow codes"),
        ({"access_bytes": wide | {"activations": [16, 2]}}, "narrow x"),
        ({"access_bytes": wide | {"codes": []}}, "narrow codes"),
        ({"spilled_bytes": 4}, "spills"),
        ({"programs": 131}, "few programs"),
    ):
        assert static_table.failures("decode", [good, replace(good, **change)]) == [words]


def test_loads_are_told_apart(static_table: Any) -> None:
    """By the function that a line stands in, whatever inline assembly counts; copies to shared memory count too."""
    from workbench_kernels import awq, compiled
    from workbench_kernels.gguf import kernels, loads

    paths = [loads.__file__, kernels.__file__, awq.__file__]
    lines = {
        (place, name): first for place, path in enumerate(paths, 1) for first, _, name in compiled._functions(path)
    }
    ptx = f"""
	.loc	1 {lines[1, "words_at"]} 12
	.loc	1 {lines[1, "word_at"]} 12, function_name $L__info_string0, inlined_at 1 1 1
	// begin inline asm
	.loc	1 {lines[1, "words_at"]} 3
	@%p3 ld.global.b32 {{ %r21 }}, [ %rd18 + 0 ];
	// end inline asm
	.loc	1 {lines[1, "words_at"]} 12
	@%p3 ld.global.v4.b32 {{ %r17, %r18, %r19, %r20 }}, [ %rd17 + 0 ];
	cp.async.cg.shared.global [ %r5 + 0 ], [ %rd1 + 0 ], 0x10, %r9;
	.loc	2 {lines[2, "decode"] + 30} 12
	ld.global.L1::evict_last.v2.b16 {{ %rs1, %rs2 }}, [ %rd17 + 0 ];
	@%p3 st.global.b16 [ %rd17 + 0 ], {{ %rs1 }};
	.loc	3 {lines[3, "_decode"] + 30} 12
	ld.global.b64 {{ %rs1 }}, [ %rd17 + 0 ];
	.file	1 "{paths[0]}"
	.file	2 "{paths[1]}"
	.file	3 "{paths[2]}"
    """
    assert compiled._accesses(ptx) == {"codes": [16, 16], "activations": [4, 8], "scales": [4], "stores": [2]}
