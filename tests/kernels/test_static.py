"""What Triton's compiler makes of the kernels for GPUs that are not here, as their launchers have them.

The interpreter says whether a kernel is right; whether it spills, loads two bytes at a time, or leaves multiprocessors
without work shows here. The table is printed when the tests are through; `python kernels/static_table.py` prints it
alone.

All of it takes three to four minutes of one processor.
"""

from __future__ import annotations

import importlib.util
import os
import re
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

SHAPES = ((1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336))
"""Outputs and inputs of a matrix of Llama-3.1-8B."""


@pytest.fixture(scope="module")
def static_table() -> Any:
    sys.path.insert(0, str(ROOT / "kernels"))
    try:
        import static_table
    finally:
        sys.path.remove(str(ROOT / "kernels"))
    return static_table


def test_the_operations_are_all_there_is(static_table: Any) -> None:
    assert set(OPERATIONS) == set(static_table.operations("meta"))
    assert set(SHAPES) == set(static_table.SHAPES["Llama-3.1-8B"])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("kernel", ["decode", "prefill", "dequantize"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_kernel(
    static_table: Any, operation: str, kernel: str, architecture: int, static_lines: list[str]
) -> None:
    """A line of the table that stands at the end of the tests' output: decode at every shape of Llama-3.1-8B, the
    others at the first, each with its first tile."""
    (line,) = static_table.table([operation], [kernel], [architecture])
    static_lines += [str(line)] if static_lines else [static_table.HEADER, str(line)]
    assert line.wrong == []
    assert len(line.found) == (len(SHAPES) if kernel == "decode" else 1)
    for found in line.found:
        assert found.access_bytes["codes"] and 0 < found.registers <= 255
        assert bool(found.access_bytes["activations"]) == (kernel != "dequantize")
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


def test_the_table_has_the_worst_and_the_exit_code_tells_of_it(
    static_table: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = {"codes": [16], "activations": [16, 8], "scales": [2], "stores": [2]}
    made = {
        1024: static_table.Facts(40, 0, 32, 400, 0, wide, 1024),
        4096: static_table.Facts(72, 0, 64, 300, 0, wide | {"codes": [8, 16]}, 512),
        14336: static_table.Facts(50, 0, 16, 700, 0, wide, 256),
    }
    asked = []

    def facts(launch: Any, architecture: int, config: Any) -> Any:
        asked.append((launch.function.__name__, architecture))
        return made.get(launch.out.shape[-1], made[1024])

    def told(*words: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["static_table.py", *words])
        asked.clear()
        code = static_table.main()
        return code, capsys.readouterr().out.splitlines()

    monkeypatch.setattr(static_table, "facts", facts)
    code, (header, line) = told("Q4_K", "--kernels", "decode", "--architectures", "90")
    assert header.split() == ["sm", "registers", "spilled", "shared", "instr.", "codes", "x", "stores", "programs"]
    assert line.split() == ["Q4_K", "decode", "90", "72", "0", "64", "700", "8", "8", "2", "256"] and code == 0
    assert [header.index(name) + len(name) for name in header.split()] == [
        match.end() for match in list(re.finditer(r"\S+", line))[2:]
    ]
    made[4096] = replace(made[4096], spilled_bytes=12, programs=128)
    code, (_, line) = told("Q4_K", "--kernels", "decode", "--architectures", "90")
    assert line.endswith(" 12     64    700     8   8      2      128 spills, few programs") and code == 1
    made[1024] = replace(made[1024], access_bytes=wide | {"activations": [], "stores": [16]})
    code, lines = told()
    assert len(lines) == 1 + 3 * 3 * len(OPERATIONS) and code == 1
    assert {architecture for _, architecture in asked} == {80, 90, 100}
    some = len(asked)
    assert some == 3 * (len(SHAPES) + 1 + 1) * len(OPERATIONS)
    told("--all-tiles")
    assert len(asked) > some
    code, (_, line) = told("Q4_K", "--kernels", "dequantize", "--architectures", "90")
    assert code == 0 and line.split() == ["Q4_K", "dequantize", "90", "40", "0", "32", "400", "16", "16", "1024"]


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
