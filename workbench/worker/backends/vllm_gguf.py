"""GGUF files in vLLM, which has read none since 0.24: de-quantized while it loads them, by a model loader of ours.

vLLM gets the configuration that the file itself states and each weight under the name that a checkpoint has it by, so
its own code places them. What it makes of them is compared with llama.cpp's logits of the file. Matrices of Q4_0 or
Q8_0 may stay packed instead: GPTQ's layout holds the same codes and scales (`ggml/repack.py`), and vLLM's kernels for
that take them.

Rejected: `vllm-gguf-plugin` 0.0.5. Its operations are built for GPUs only, and it leaves rows of Llama's queries and
keys in GGUF's order, which vLLM no longer undoes: perplexity 408 instead of 17.6 (SmolLM2-135M, Q4_K_M, vLLM 0.32).
`make plugin-check` says whether the newest still does; once it does not, its logits are what to compare next.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from workbench.errors import UserError
from workbench.records import Job
from workbench.shape import Shape, Stored
from workbench.worker import proof
from workbench.worker.base.checkpoint import read_json
from workbench.worker.base.config_json import text_config
from workbench.worker.base.gguf_config import read_gguf
from workbench.worker.base.gguf_weights import tensors_of
from workbench.worker.base.saving import for_both_readers, write_json
from workbench.worker.ggml.mixtures import tensor_bytes
from workbench.worker.ggml.repack import BITS, repacked
from workbench.worker.layers import LAYERS
from workbench.worker.methods import gptq
from workbench.worker.methods.grouped import BLOCK
from workbench.worker.tokens.file import read_tokens

LOAD_FORMAT = "workbench-gguf"
_read = lru_cache(1)(read_gguf)
"""Once for the configuration and the weights; not held longer, since the file is mapped while it is."""
NOTE = "GGUF de-quantized to {dtype} at load: size in memory and speed are those of {dtype}"


@dataclass(frozen=True)
class Packing:
    """What of a file stays packed: the matrices `stems` of the type `kind`, in so many bytes, and how many `others` and
    their weights do not."""

    kind: str = ""
    stems: tuple[str, ...] = ()
    size_bytes: int = 0
    others: int = 0
    other_weights: int = 0

    def told(self, dtype: str) -> str:
        """What the row says of it."""
        if not self.stems:
            return NOTE.format(dtype=dtype)
        rounded = "" if dtype == "float16" else f" rounded to {dtype}"
        return (
            f"{len(self.stems)} matrices of {self.kind} packed in vLLM's kernels for GPTQ: the file's own codes and "
            f"scales{rounded}, in groups of {BLOCK}; {self.others} others de-quantized to {dtype}"
        )

    @property
    def settings(self) -> dict[str, object]:
        """What ran, in the words of `transformers.py`."""
        if not self.stems:
            return {"kernel": "none, de-quantized"}
        return {"kernel": f"vllm, {self.kind} as gptq", "packed": len(self.stems), "unpacked": self.others}

    def weight_bytes(self, parameters: int, width: int) -> int:
        """Bytes of all weights where those that are not packed have `width`."""
        return self.size_bytes + self.other_weights * width if self.stems else parameters * width


def planned_bytes(shape: Shape, stored: Stored, width: int, cpu: bool) -> float:
    """What a file's weights will take, packed where they can stay so."""
    kinds = [kind for kind, bits in BITS.items() if bits == 4 or not cpu]
    layers = [tensor for tensor in shape.tensors if tensor.layer is not None]
    kind = max(kinds, key=[stored.types.get(tensor.name) for tensor in layers].count)
    plain = [tensor for tensor in shape.tensors if tensor not in layers or stored.types.get(tensor.name) != kind]
    packed = sum(tensor_bytes(kind, tensor) for tensor in layers if stored.types.get(tensor.name) == kind)
    return packed + width * sum(tensor.weights for tensor in plain)


def register() -> None:
    """Make the loader known to vLLM, once in each of its processes."""
    import torch
    from vllm.model_executor import model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    if LOAD_FORMAT in model_loader._LOAD_FORMAT_TO_MODEL_LOADER:
        return

    @model_loader.register_model_loader(LOAD_FORMAT)
    class Loader(BaseModelLoader):  # type: ignore[misc,unused-ignore]
        """`model_loader_extra_config` names the `file`."""

        def download_model(self, model_config: Any) -> None:
            """It is there."""

        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            """Hand over every weight; `UserError` if a parameter got none."""
            told = self.load_config.model_loader_extra_config
            path = Path(told["file"])
            loaded = model.load_weights(_weights(path, frozenset(told["packed"])))  # type: ignore[operator]
            _read.cache_clear()
            missing = sorted({name for name, _ in model.named_parameters()} - set(loaded)) if loaded else []
            if missing:
                raise UserError(f"{path}: vLLM's {type(model).__name__} got no {missing[0]} from it")


def _weights(path: Path, packed: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Name and values of each weight of a file: those of the matrices `packed` as GPTQ has them, all others float32."""
    for mapped, name, tensor in tensors_of(path, _read(path)):
        stem = name.removesuffix(".weight")
        if stem not in packed:
            yield name, mapped.dense(tensor)
            continue
        parts = repacked(tensor.tensor_type.name, tensor.data[mapped.row_order(tensor)])
        yield from ((f"{stem}.{part}", values) for part, values in parts.items())


def packing(path: Path, cpu: bool) -> Packing:
    """What of a file can stay packed: the decoder's matrices of that type of `BITS` that most of them have (on a CPU,
    of 4 bits), but for those that vLLM puts into one layer with others that have not."""
    from vllm import ModelRegistry

    kinds = {kind for kind, bits in BITS.items() if bits == 4 or not cpu}

    found, weights = dict[str, dict[str, int]](), dict[str, int]()
    for mapped, name, tensor in tensors_of(path, _read(path)):
        stem, kind = name.removesuffix(".weight"), tensor.tensor_type.name
        weights[stem] = int(tensor.n_elements)
        whole = stem.startswith(f"{LAYERS}.") and len(tensor.shape) == 2 and len(tensor.data) % BLOCK == 0
        if kind in kinds and whole and mapped.row_order(tensor) is not None:
            found.setdefault(kind, {})[stem] = int(tensor.n_bytes)
    kind = max(found, key=lambda each: len(found[each]), default="")
    sizes = found.get(kind, {})
    model: Any = ModelRegistry.models[_architecture(path)]
    together = list(getattr(model.load_model_cls(), "packed_modules_mapping", {}).values())

    def takes_part(stem: str) -> bool:
        parent, _, own = stem.rpartition(".")
        return all(f"{parent}.{part}" in sizes for parts in together if own in parts for part in parts)

    stems = tuple(sorted(filter(takes_part, sizes)))
    others = [count for stem, count in weights.items() if stem not in stems]
    return Packing(kind, stems, sum(map(sizes.__getitem__, stems)), len(others), sum(others)) if stems else Packing()


def _architecture(path: Path) -> str:
    """The class of transformers that the model of a file is of."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return type(AutoModelForCausalLM.from_config(_read(path).config)).__name__


def write_config(path: Path, folder: Path, packed: Packing) -> None:
    """Write the configuration that a GGUF file states as a `config.json`, and GPTQ's of what is `packed`."""
    config = _read(path).config
    config.architectures = [_architecture(path)]
    content = config.to_dict() | {"dtype": "float32"}
    if packed.stems:
        how = gptq.quantization_config(gptq.Options(bits=BITS[packed.kind], group_size=BLOCK))
        # By which vLLM knows what is packed; else it looks into files that are not there.
        content["quantization_config"] = how | {"modules_in_block_to_quantize": list(packed.stems)}
    write_json(folder / "config.json", for_both_readers(content))


def probe(job: Job, folder: Path) -> list[int]:
    """Ids to compare logits on, as many as a window or a prompt may have.

    Text where there is an evaluation: both sides round (vLLM to 16 bits, llama.cpp to 8), and on ids without sense that
    alone was 0.05 nats of SmolLM2-135M.
    """
    count = min(proof.TOKENS, max(job.longest_window, *job.workload.prompt_tokens))
    for evaluation in job.evaluations.values():
        if evaluation.path:
            return read_tokens(evaluation.path).windows[0][:count]
    return proof.ids_over(int(text_config(read_json(folder / "config.json"))["vocab_size"]), count)


def prove(path: Path, ids: list[int], logits: Any) -> str | None:
    """Compare vLLM's `logits` of a file with llama.cpp's, [ids or one less, vocabulary]; or why that cannot be.

    Raises `UserError` if they are of another model.
    """
    from workbench.worker.ggml.logits import logits_of

    try:
        expected = logits_of(path, ids)
    except ImportError:
        expected = None
    if expected is None:
        return (
            f"not proven that {path.name} is the model here that it is in llama.cpp, which cannot load it beside vLLM"
        )
    found = proof.compare(expected[: len(logits)], logits, proof.COARSE_NATS)
    if not found.same:
        raise UserError(f"{path}: vLLM makes another model of it than llama.cpp {found.words}")
    return None
