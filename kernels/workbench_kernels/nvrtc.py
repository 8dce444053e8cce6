"""CUDA C++ compiled for the GPU at hand when it is first needed, by NVRTC, and launched on torch's stream.

Both libraries come with torch for CUDA (`cuda.bindings`, `nvidia-cuda-nvrtc`): no compiler is asked of the machine.
What was compiled is kept in `$WORKBENCH_KERNELS_CACHE`, by default `workbench_kernels` in the user's cache folder, a
file a program, architecture and version of NVRTC. Compiling needs no GPU; launching may stand in a CUDA graph, once a
function has been loaded by a first launch outside.
"""

import ctypes
import functools
import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

try:
    from cuda.bindings import driver, nvrtc
except ImportError:
    driver = nvrtc = None

Argument = torch.Tensor | int | float | Any
"""Of a function: a tensor's address, an int (32 bits), a float (32 bits), or a value of `ctypes` for any other size."""
LEAST_ARCHITECTURE = 80


def architecture_of(device: torch.device) -> int:
    """90 for a GPU of compute capability 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def available(device: torch.device) -> bool:
    """Whether what is compiled here can be launched on that device: an NVIDIA GPU that this NVRTC knows."""
    if driver is None or device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return False
    try:
        known = _checked(nvrtc.nvrtcGetSupportedArchs())[-1]
    except RuntimeError:  # what cuda.bindings raises where there is no NVRTC to load
        return False
    return architecture_of(device) >= LEAST_ARCHITECTURE and architecture_of(device) in known


@dataclass(frozen=True)
class Program:
    """CUDA C++ whose functions are `extern "C" __global__`, and options of NVRTC such as `-DBITS=4`."""

    source: str
    options: tuple[str, ...] = ()

    def cubin(self, architecture: int) -> bytes:
        """Machine code for `sm_<architecture>`, compiled or as it was kept. `RuntimeError` with NVRTC's log if it does
        not compile."""
        return _cubin(self, architecture)

    def launch(
        self,
        function: str,
        grid: Sequence[int],
        block: int,
        arguments: Sequence[Argument],
        *,
        shared_bytes: int = 0,
        dependent: bool = False,
    ) -> None:
        """Launch on the current stream of the first tensor's device. `dependent`: it may start before the launch ahead
        of it on the stream has ended, and waits itself (`griddepcontrol.wait`, sm_90 on) before it reads or writes
        what that one touches.
        """
        device = next(value.device for value in arguments if isinstance(value, torch.Tensor))
        values = [_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes = shared_bytes
        attributes = []
        if dependent and architecture_of(device) >= 90:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        config.attrs, config.numAttrs = attributes, len(attributes)
        with torch.cuda.device(device):
            config.hStream = torch.cuda.current_stream().cuda_stream
            kernel = _function(self, function, device.index, shared_bytes)
            _checked(driver.cuLaunchKernelEx(config, kernel, ctypes.addressof(pointers), 0))


@functools.cache
def compiled(source: str, *options: str) -> Program:
    """The program of that source: the same one for the same source, so that it is loaded once."""
    return Program(source, options)


def _value(argument: Argument) -> Any:
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, int):
        return ctypes.c_int32(argument)
    return ctypes.c_float(argument) if isinstance(argument, float) else argument  # already of ctypes


@functools.cache
def _function(program: Program, name: str, device: int, shared_bytes: int) -> int:
    """The driver's handle of a function, which may have so many bytes of shared memory on this device."""
    kernel = _checked(
        driver.cuLibraryGetKernel(_library(program, architecture_of(torch.device("cuda", device))), name.encode())
    )[0]
    if shared_bytes > 48 * 1024:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuKernelSetAttribute(attribute, shared_bytes, kernel, driver.CUdevice(device)))
    return int(kernel)


@functools.cache
def _library(program: Program, architecture: int) -> Any:
    return _checked(driver.cuLibraryLoadData(program.cubin(architecture), [], [], 0, [], [], 0))[0]


@functools.cache
def _cubin(program: Program, architecture: int) -> bytes:
    version = "{}.{}".format(*_checked(nvrtc.nvrtcVersion()))
    options = [f"--gpu-architecture=sm_{architecture}", "--std=c++17", *program.options]
    digest = hashlib.sha256("\0".join([version, *options, program.source]).encode()).hexdigest()
    kept = cache_folder() / f"{digest[:32]}.cubin"
    try:
        return kept.read_bytes()
    except OSError:
        cubin = _compile(program.source, options)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when it is whole: others may compile the same, and look meanwhile.
        with tempfile.NamedTemporaryFile(dir=kept.parent, suffix=".part", delete=False) as file:
            file.write(cubin)
        os.replace(file.name, kept)
    except OSError:
        pass  # a folder that cannot be written costs the next process the second that this one took
    return cubin


def cache_folder() -> Path:
    """Where machine code is kept."""
    if named := os.environ.get("WORKBENCH_KERNELS_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "workbench_kernels"


def _compile(source: str, options: Sequence[str]) -> bytes:
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], []))[0]
    try:
        coded = [option.encode() for option in options]
        (outcome,) = nvrtc.nvrtcCompileProgram(program, len(coded), coded)
        if outcome != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program))[0])
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"NVRTC with {' '.join(options)}: {log.rstrip(bytes(1)).decode()}")
        cubin = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program))[0])
        _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(answer: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a function of `cuda.bindings` gave, without its error code, which is raised if it is one."""
    code, *rest = answer
    if int(code):
        raise RuntimeError(f"{type(code).__name__} {code.name}")
    return tuple(rest)
