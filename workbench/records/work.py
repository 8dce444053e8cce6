"""What the parent asks of its workers, what they answer, and what the cache keeps of it.

A worker's function is given the first as JSON and returns the second as JSON; `from_json` and `to_json` stand at the
border, on both sides. Paths are absolute unless it is said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from workbench.records.limits import Count, Seconds, Size
from workbench.records.machine import Conditions
from workbench.records.rows import Evaluation, Job, Task

TEXT_VERSION = 3
"""Version of the way a text is read and spelt in tokens, whose digest tells whether they came out otherwise."""


@dataclass(frozen=True)
class Cost:
    """What a worker took."""

    seconds: Seconds
    peak_rss_bytes: Count | None = None
    memory: dict[str, Count] = field(default_factory=dict)
    """Bytes, as `Monitor.memory` has them."""
    conditions: Conditions = field(default_factory=lambda: Conditions())


@dataclass(frozen=True)
class BaseRequest:
    """`worker.base.prepare:prepare` and, for the shape alone, `worker.base.headers:read`."""

    source: dict[str, Any]
    """One of `worker/base/sources.py`'s kinds, such as `{"hub": "owner/name", "revision": "main"}`."""
    equivalent: dict[str, int] | None = None
    """`hidden` and `seed` of an exact rewrite."""
    out: str = ""
    """An empty folder, used only if the source is no Hugging Face directory already, or is rewritten."""
    allow_remote_code: bool = False
    offline: bool = False


@dataclass(frozen=True)
class PreparedBase:
    """The base as a Hugging Face directory."""

    path: str
    digest: str
    """Changes whenever a weight does."""
    dtype: str
    parameters: Count
    """Tied embeddings once, here and in `weight_bytes`."""
    weight_bytes: Count
    architecture: str = ""
    vocab_size: Count = 0
    context_length: Count = 0
    """Tokens; 0 where it does not say."""
    sliding_window: Count = 0
    """Tokens that its windowed layers look back; 0 if it has none."""
    tokenizer: bool = True
    """Whether it has one."""
    license: str | None = None
    revision: str | None = None
    whole: str = ""
    """The folder of the multimodal model whose language model it is, as that was stored."""
    warnings: list[str] = field(default_factory=list)
    """What of the source was left out."""
    quantized_types: list[str] = field(default_factory=list)
    """Quantized types that its weights were stored in before, by bytes, the most first; empty where they were not, or
    were rewritten since."""
    source: dict[str, Any] = field(default_factory=dict)
    """As it was asked for."""
    cost: Cost | None = None


@dataclass(frozen=True)
class TokenSet:
    """One set of windows to cut from a text."""

    role: str
    """`evaluation` or `calibration`."""
    name: str
    source: dict[str, str]
    window: Count
    windows: Count | None
    """None: all that fit into the text, of an evaluation."""
    score: str
    stride: Count | None = None
    seed: int = 0
    out: str = ""
    """The file to write."""


@dataclass(frozen=True)
class TokensRequest:
    """`worker.tokens.windows:build`."""

    base: str
    sets: list[TokenSet]
    allow_overlap: bool = False
    allow_remote_code: bool = False


@dataclass(frozen=True)
class TokenSets:
    """The sets of a recipe by the stem of their file, calibration among them."""

    sets: dict[str, Evaluation]
    text_version: int
    """`TEXT_VERSION`; a record that names none is made anew."""
    cost: Cost | None = None


@dataclass(frozen=True)
class TextsRequest:
    """`worker.tokens.check:check`."""

    sets: list[TokenSet]
    tasks: dict[str, dict[str, Any]]
    """As in a `TasksRequest`."""
    tokenizer: str | None = None
    """The base's `tokenizer.json`, where it is at hand."""


@dataclass(frozen=True)
class TasksRequest:
    """`worker.tokens.tasks:build`."""

    base: str
    tasks: dict[str, dict[str, Any]]
    """By name: `file`, `limit`, `new_tokens`, `chat`, or `lm_eval`, `include`, `limit`, `shots`."""
    out: str
    """A folder."""
    allow_remote_code: bool = False


@dataclass(frozen=True)
class Tasks:
    """The tasks of a recipe by name; their paths are relative to the folder they were written into."""

    tasks: dict[str, Task]
    text_version: int
    """`TEXT_VERSION`; a record that names none is made anew."""
    cost: Cost | None = None


@dataclass(frozen=True)
class VariantRequest:
    """A method's own worker (`Making.function`): one variant from the base. What `Making.arguments` says comes beside
    it."""

    base: str
    out: str
    """A file or folder that is not there yet."""
    options: dict[str, object]
    source: str | None = None
    """The base's GGUF file, for a method that starts from it."""
    tokens: str | None = None
    """A token file, for a method that looks at it."""
    imatrix: str | None = None
    """An importance matrix, likewise."""
    grams: str | None = None
    """A folder of Gram matrices, likewise."""
    prices: str | None = None
    """Prices of types, likewise."""
    whole: str = ""
    """The base's `PreparedBase.whole`."""
    threads: Count | None = None
    allow_remote_code: bool = False


@dataclass(frozen=True)
class MadeVariant:
    """What a worker says of a variant that it made."""

    tensor_types: dict[str, str]
    disk_bytes: Count | None = None
    """All weights; None: those of the safetensors in the folder."""
    tensor_errors: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Told when it is made."""
    provenance: dict[str, object] = field(default_factory=dict)
    """More to be kept beside the artifact."""
    seconds: Seconds = 0.0
    format: str = ""
    """Of a method that writes several: which."""


@dataclass(frozen=True)
class CheckpointRequest:
    """A variant that the calibration pass is to make."""

    name: str
    method: str
    options: dict[str, object]
    out: str
    """A folder, empty or with interrupted work."""


@dataclass(frozen=True)
class CalibrationRequest:
    """`worker.calibration.run:run`: all calibrated variants of a base, and its importance matrix, in one pass; and
    `outputs:run`, of variants whose objective is the output."""

    base: str
    tokens: str
    """A token file."""
    tokens_digest: str
    variants: list[CheckpointRequest]
    imatrix_out: str | None
    state: str
    """A folder that an interrupted pass goes on from."""
    device: str = "auto"
    threads: Count | None = None
    seed: int = 0
    precision: str = "auto"
    grams_out: str | None = None
    """A folder for the Gram matrices, if they are wanted."""
    devices: Count | None = None
    """Over how many the windows are shared out, a process each; None: all GPUs that are visible, or one process."""


@dataclass(frozen=True)
class LayerKind:
    """Decoder layers of one kind, as running them showed (`worker/calibration/discover.py`)."""

    layers: str
    """`0-29`; `0, 2, 4`."""
    groups: list[str]
    """Linear layers that share an input, and what produces it: `q_proj, k_proj, v_proj <- input_layernorm`."""


@dataclass(frozen=True)
class Calibrated:
    """What a calibration pass made."""

    seconds: dict[str, Seconds]
    """By phase."""
    variants: dict[str, MadeVariant]
    refused: dict[str, str]
    """Variant -> why its options do not fit this base."""
    no_imatrix: str = ""
    """Why there is no importance matrix though one was asked for."""
    layers: list[LayerKind] = field(default_factory=list)
    experts: dict[str, list[Count]] = field(default_factory=dict)
    """Module with a layer's experts -> calibration tokens that each of them saw."""
    devices: Count = 1
    """Over how many the windows were shared out."""


@dataclass(frozen=True)
class CalibrationTokens:
    """The tokens that methods may look at."""

    path: str
    digest: str


@dataclass(frozen=True)
class ImportanceMatrix:
    """llama.cpp's importance matrix of a base and its calibration tokens."""

    digest: str
    calibration: str = ""
    """The tokens' digest."""
    cost: Cost | None = None
    path: str = ""
    grams: str = ""
    """The folder of the Gram matrices of the same tokens, where a variant needs them too."""


@dataclass(frozen=True)
class GramMatrices:
    """The Gram matrices of a base and its calibration tokens (`worker/ggml/grams.py`)."""

    digest: str
    calibration: str = ""
    """The tokens' digest."""
    cost: Cost | None = None


@dataclass(frozen=True)
class PricesRequest:
    """`worker.calibration.sensitivity:run`: what each type of llama.cpp does to the output, tensor by tensor."""

    base: str
    tokens: str
    """A token file."""
    tokens_digest: str
    imatrix: str
    """The importance matrix that files are made with."""
    state: str
    """A folder that an interrupted pass goes on from."""
    device: str = "auto"
    threads: Count | None = None
    seed: int = 0
    precision: str = "auto"


@dataclass(frozen=True)
class Priced:
    """What a sensitivity pass found."""

    tensors: dict[str, dict[str, float]]
    """Tensor, as GGUF files call it -> type -> the divergence that it causes, nats a token."""
    tokens: Count
    """That it ran over."""
    seconds: dict[str, Seconds]
    """By phase."""


@dataclass(frozen=True)
class Prices:
    """The prices of a base's tensors, of its calibration tokens and of the importance matrix."""

    digest: str
    calibration: str = ""
    """The tokens' digest."""
    seconds: dict[str, Seconds] = field(default_factory=dict)
    """By phase."""
    cost: Cost | None = None
    path: str = ""
    """A `Priced` as JSON."""
    imatrix: str = ""
    """The importance matrix's file."""


@dataclass(frozen=True)
class ReferRequest:
    """`worker.measure.job:refer`: score the job's artifact, the base, and keep what it says."""

    job: Job
    out: str


@dataclass(frozen=True)
class Reference:
    """What the base says of every scored token of an evaluation set (`worker/scoring/reference.py`)."""

    digest: str
    """Digest of its content."""
    settings: dict[str, object] = field(default_factory=dict)
    """Dtype and device that it was made with."""
    base: str = ""
    evaluation: str = ""
    """Digests of what it is of."""
    cost: Cost | None = None
    path: str = ""


@dataclass(frozen=True)
class BandwidthRequest:
    """`worker.measure.bandwidth:copy_bandwidth`."""

    threads: Count
    device: str
    """`cpu` or `cuda`."""


@dataclass(frozen=True)
class Bandwidth:
    """What a memory copies, read and written both counted."""

    bytes_per_s: Size
