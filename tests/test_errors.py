"""What an exception is taken for."""

from __future__ import annotations

import pytest

from workbench.errors import WorkFailed, out_of_memory


@pytest.mark.parametrize(
    ("problem", "full"),
    [
        (MemoryError(), True),
        (type("OutOfMemoryError", (RuntimeError,), {})("Allocation on device"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("llama_decode failed with status -2: failed to allocate compute buffers"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (WorkFailed("ValueError: Free memory on device cuda:0 (0.3/79.2 GiB) on startup is less than desired"), True),
        (WorkFailed("ValueError: No available memory for the cache blocks (log: x/log.txt)"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448"), False),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_full_memory_is_known_by_its_words(problem: Exception, full: bool) -> None:
    """torch has a class for it, but the libraries below it raise `RuntimeError`, and a worker's reason is text."""
    assert out_of_memory(problem) is full
