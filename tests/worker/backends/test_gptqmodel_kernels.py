"""Which kernels GPTQModel chooses among, asked of GPTQModel itself, in a process of its own"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from workbench.worker.backends.gptqmodel_kernels import why_slow

pytestmark = pytest.mark.slow
ASK = """
import json, sys
from workbench.worker.backends import gptqmodel_kernels as kernels
from gptqmodel.quantization import FORMAT, METHOD
from gptqmodel.utils import importer

def left():
    ours = ((METHOD.GPTQ, FORMAT.GPTQ), (METHOD.AWQ, FORMAT.GEMM), (METHOD.AWQ, FORMAT.GEMV))
    return [[each.value for each in importer.AUTO_BACKEND_KERNEL_MAPPING[method][form]] for method, form in ours]

before = left()
kernels.keep(kernels.KEPT)
kept = left()
kernels.ready(4)
print(json.dumps([before, kept, left()]), file=sys.stderr)
"""


def test_no_kernel_is_left_that_needs_a_download_and_marlin_only_where_it_compiles() -> None:
    environment = os.environ | {"GPTQMODEL_CPU_WORKERS": "4", "CUDA_VISIBLE_DEVICES": ""}
    answer = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr
    before, kept, compiled = json.loads(answer.stderr.strip().splitlines()[-1])
    assert "gptq_machete" in before[0] and "awq_swordfish" in before[1] and before[2] == ["awq_gemv"]
    downloads = ("machete", "swordfish", "exllama", "bitblas")
    for gptq, awq, gemv in (kept, compiled):
        assert not [name for name in (*gptq, *awq) if any(word in name for word in downloads)]
        assert gemv == before[2], "the only kernel of a layout stays"
        assert "gptq_triton" in gptq and "awq_gemm_triton" in awq
    assert "gptq_marlin" in kept[0] and "awq_marlin" in kept[1]
    # Here is neither a GPU nor its compiler, so that Marlin's own words are that it cannot be had.
    assert "gptq_marlin" not in compiled[0] and "awq_marlin" not in compiled[1]


def test_a_row_says_when_marlin_did_not_compute() -> None:
    assert why_slow("AwqMarlinLinear") is None
    assert "TritonV2Linear: GPTQModel's Marlin kernel did not compile" in str(why_slow("TritonV2Linear"))
