"""How a variant is made. A method is one module and one line here; the recipe's word is the key.

`Method` is what such a module says to everybody else, readable without any engine; what takes part in the calibration
pass says what `CalibratedMethod` adds. The base is no entry: it is what all of them start from (`base.py`).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast, runtime_checkable

from workbench.shape import Shape, Stored
from workbench.worker import Tensors
from workbench.worker.layers import Layer

METHODS = {
    "gguf": "workbench.worker.methods.gguf",
    "awq": "workbench.worker.methods.awq",
    "gptq": "workbench.worker.methods.gptq",
    "file": "workbench.worker.methods.file",
    "checkpoint": "workbench.worker.methods.checkpoint",
    "compressed-tensors": "workbench.worker.methods.compressed_tensors",
    "bitsandbytes": "workbench.worker.methods.bitsandbytes",
    "torchao": "workbench.worker.methods.torchao",
}
BASE = "base"
"""The word of the base among variants; `base.py` says of it what a method says."""


@dataclass(frozen=True)
class Making:
    """How the bytes of a variant with certain options come about, and what they depend on."""

    stage: Literal["base", "gguf", "pass", "load", "carry"]
    """Where: in a worker of its own from the base's directory, from the base's GGUF file, or from another form of the
    variant; in the calibration pass; or nowhere, because the engine quantizes the base as it loads it."""
    calibration: Literal["", "tokens", "imatrix", "prices"] = ""
    """What it looks at: nothing, the calibration's tokens (in the pass: their Gram matrices), the importance matrix
    that the pass makes of them, or that and the prices of types (`calibration/sensitivity.py`)."""
    packages: tuple[str, ...] = ()
    """Distributions whose versions the bytes depend on."""
    python: str = ""
    """Whose interpreter does the work, as in `WORKBENCH_PYTHON_<NAME>`; by default the program's own."""
    source: Making | None = None
    """Of the stage `gguf`: how the file came about that it starts from."""
    function: str = ""
    """Of the stages `base` and `gguf`: the worker as `module:function`. It is given a `VariantRequest` and `arguments`,
    writes `out`, and answers with a `MadeVariant`."""
    arguments: Mapping[str, object] = field(default_factory=dict)
    maker: str = ""
    """Who makes the bytes, where that is not told by the options as they stand."""
    maker_packages: tuple[str, ...] = ()
    """The same as `packages`, of a maker that an option chooses."""
    ignored: tuple[str, ...] = ()
    """Options that change no byte by themselves."""
    file_name: str = ""
    """What the result is called, after the model's name; by default the variant's name, for a directory. Of the stage
    `carry`: what is added to the name of what it is carried from."""
    label: str = ""
    """Before the variant's name, where progress is shown."""
    environment: Mapping[str, str] = field(default_factory=dict)
    grams: bool = False
    """Whether it looks at the pass's Gram matrices too."""
    gradients: bool = False
    """Of the stage `pass`: whether it looks at gradients, which takes a pass of its own (`calibration/outputs.py`)."""
    headers: str = ""
    """Of what others made, which is linked to where it lies: the worker that a plan asks what it holds, given a
    `worker.base.found.HeadersRequest`."""
    carried: Mapping[str, Making] = field(default_factory=dict)
    """How its further forms are made of it (stage `carry`, `source` included): format -> how."""


@runtime_checkable
class Method(Protocol):
    """What a method's module says of it. Three more may be there: `AXES`, the options of which a recipe may give a
    list, for a variant each; `LATER`, options that came after others and are left out of a variant at their default, so
    that keys stay; and of the stage `load` `quantization_config(options)`, as transformers takes it."""

    Options: type[Any]
    """The recipe's keys: a frozen dataclass, on which every function below is asked."""
    SHORTHAND: str
    """The option that a bare value stands for (`gguf: Q8_0`), if any."""
    WRITES: tuple[str, ...]
    """The formats of its artifacts, as backends know them: what is made, and then what that is carried to for engines
    that read nothing else."""
    LIBRARY: str
    """What opens an artifact, in the hub's words, for a model card."""
    TAGS: tuple[str, ...]
    """More words for a model card."""

    def default_name(self, options: Any) -> str:
        """What a variant is called that the recipe gives no name."""

    def check(self, options: Any) -> None:
        """Raise `UserError`, when the recipe is read, for what could never be made."""

    def limits(self, options: Any) -> dict[str, str]:
        """Backend name -> why that engine cannot load what these options make, though it loads the format."""

    def making(self, options: Any, cuda: bool) -> Making:
        """How it is made; `cuda`: on a machine with a GPU."""

    def sizes(self, shape: Shape, options: Any, form: str) -> Stored:
        """What the artifact will hold for a base of this shape, in one of the formats it `WRITES`; of the stage `load`,
        what its weights take in memory."""


@runtime_checkable
class CalibratedMethod(Method, Protocol):
    """What a method says beside that if it takes part in the calibration pass, where it writes a checkpoint."""

    CONFIG_FILE: str
    """Where its `quantization_config` is written beside config.json; empty: nowhere."""

    def check_linear(self, options: Any, where: str, rows: int, columns: int, group_sizes: list[str]) -> None:
        """Raise `UserError` if a linear layer of that shape cannot be held; `where` names variant and layer."""

    def quantizes(self, options: Any, linear: str) -> bool:
        """Whether this linear layer (its full name) is quantized."""

    def stored(self, options: Any, linear: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors a linear layer becomes: suffix -> (safetensors dtype, shape). The bias is the caller's."""

    def tensor_type(self, options: Any) -> str:
        """What a quantized tensor is called in an artifact's record."""

    def quantization_config(self, options: Any, kept: Sequence[str] = ()) -> dict[str, object]:
        """What config.json says of it; `kept`: linear layers of decoder layers that the pass leaves as they are."""

    def quantize(self, layer: Layer, options: Any) -> tuple[Tensors, dict[str, float], list[str]]:
        """A decoder layer's tensors as stored, each linear's relative error, and warnings."""


def method_named(name: str) -> Method:
    """The module of a method, or what the base says in its place."""
    module = importlib.import_module("workbench.worker.methods.base" if name == BASE else METHODS[name])
    assert isinstance(module, Method), f"{module.__name__} does not say all that `Method` asks for"
    return cast(Method, module)
