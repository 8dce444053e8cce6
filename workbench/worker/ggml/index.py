"""What tensors a GGUF file holds, by llama.cpp's own reader (`gguf.h`, in the library of llama-cpp-python).

Rejected: `gguf.GGUFReader`. It makes a Python object of every piece of the vocabulary: two to four seconds for 49,152
tokens, three times that for Llama 3's, and every file that is made is read back.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, NamedTuple

from workbench.errors import UserError


class Entry(NamedTuple):
    """A tensor: llama.cpp's name of its type in capitals (`Q4_K`), its sizes, the fastest-running first, and where it
    begins in the file."""

    name: str
    kind: str
    shape: tuple[int, int, int, int]
    size_bytes: int
    offset: int


class _How(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def library() -> ctypes.CDLL:
    """ggml's own library as llama-cpp-python brings it, for what that package has no function for."""
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent
    return ctypes.CDLL(str(next(folder.glob("lib*/*ggml-base.*"))))


def block_maker() -> Any:
    """ggml's function that makes blocks of rows and answers with their bytes: a type's number, pointers to the weights
    (float32) and to the blocks, number of the first weight, how many rows, their length, a pointer to the importances
    (float32) or None."""
    make = library().ggml_quantize_chunk
    make.restype = ctypes.c_size_t
    make.argtypes = (ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p)
    return make


def entries(path: str) -> list[Entry]:
    """The tensors of a GGUF file in its order; no weight is read. `UserError` for what is no whole header."""
    lib = library()
    for name, answers, *takes in (
        ("gguf_init_from_file", ctypes.c_void_p, ctypes.c_char_p, _How),
        ("gguf_free", None, ctypes.c_void_p),
        ("gguf_get_n_tensors", ctypes.c_int64, ctypes.c_void_p),
        ("gguf_get_tensor_name", ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64),
        ("gguf_get_tensor_type", ctypes.c_int, ctypes.c_void_p, ctypes.c_int64),
        ("gguf_get_tensor_ne", ctypes.POINTER(ctypes.c_int64), ctypes.c_void_p, ctypes.c_int64),
        ("gguf_get_data_offset", ctypes.c_size_t, ctypes.c_void_p),
        ("gguf_get_tensor_offset", ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int64),
        ("gguf_get_tensor_size", ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int64),
        ("ggml_type_name", ctypes.c_char_p, ctypes.c_int),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = answers, takes
    file = lib.gguf_init_from_file(path.encode(), _How(no_alloc=True, ctx=None))
    if not file:
        raise UserError(f"{path} is no GGUF file that llama.cpp can read; see the log for its words")
    try:
        return [
            Entry(
                name=lib.gguf_get_tensor_name(file, place).decode(),
                kind=lib.ggml_type_name(lib.gguf_get_tensor_type(file, place)).decode().upper(),
                shape=tuple(lib.gguf_get_tensor_ne(file, place)[:4]),
                size_bytes=lib.gguf_get_tensor_size(file, place),
                offset=lib.gguf_get_data_offset(file) + lib.gguf_get_tensor_offset(file, place),
            )
            for place in range(lib.gguf_get_n_tensors(file))
        ]
    finally:
        lib.gguf_free(file)
